"""The training loop. It knows the contracts only: a system, a procedure, two players."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchive.data import Loader
from torchive.data.drawing import key_seed, seed_generators
from torchive.engine.build import build_optimizer
from torchive.engine.checkpoint import save_checkpoint
from torchive.engine.recipe import Recipe
from torchive.structures import Batch


class TrainingError(ValueError):
    """A run that cannot go on; the message names the samples and the file that keeps them."""


def progress_calls(model: nn.Module) -> list[Callable[[float], None]]:
    """``before_step`` of the model and of all parts that have it; each is told the share of the run that is done."""
    return [part.before_step for part in model.modules() if hasattr(part, "before_step")]  # type: ignore[misc]


class Trainable(nn.Module):
    """``losses`` as ``forward``, since distributed wrappers only see ``forward``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.players: tuple[str, ...] = tuple(model.players()) if hasattr(model, "players") else ()  # type: ignore[operator]
        self.is_procedure = hasattr(model, "deployable")

    def forward(self, batch: Batch, player: str | None = None) -> dict[str, Tensor]:
        model: Any = self.model
        if self.is_procedure:
            return model.losses(batch)
        if player is not None:
            return model.losses(batch.inputs, batch.targets, player)
        return model.losses(batch.inputs, batch.targets)

    def groups(self) -> dict[str | None, list[nn.Parameter]]:
        """The parameters that are stepped together, by player; one group without a name where there are no players."""
        if not self.players:
            return {None: list(self.model.parameters())}
        return {name: list(group) for name, group in self.model.players().items()}  # type: ignore[operator]


@dataclass
class Step:
    """What one optimiser step gave: losses by name (not yet fetched from the device) and samples of this process."""

    number: int
    losses: dict[str, Tensor]
    rate: float
    samples: int


@dataclass
class Loop:
    """State and rules of a run; ``steps`` yields after each optimiser step.

    Everything drawn is a function of (seed, step), so ``step`` and the tensors are the whole state.
    """

    recipe: Recipe
    model: nn.Module
    loader: Loader
    accelerator: Any
    folder: Path
    step: int = 0
    elapsed: float = 0.0
    optimizers: dict[str | None, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trainable = Trainable(self.model)
        self.plain = {
            k: build_optimizer(self.recipe, group, self.model) for k, group in self.trainable.groups().items()
        }
        # Accelerate's optimiser is needed for scaled gradients (fp16) only; it looks for a package on disk at each step
        self.scaled = self.accelerator.scaler is not None
        prepare = self.accelerator.prepare_optimizer if self.scaled else (lambda optimizer: optimizer)
        self.optimizers = {k: prepare(o) for k, o in self.plain.items()}
        self.wrapped = self.accelerator.prepare_model(self.trainable)
        self.device = self.accelerator.device
        self.lazy = self.device.type != "cpu"
        self.pending: tuple[Tensor, Batch, int] | None = None
        self.progress_calls = progress_calls(self.model)
        self.after_step = getattr(self.model, "after_step", None)

    @property
    def finished(self) -> bool:
        """Whether the budget is spent."""
        train = self.recipe.train
        return self.step >= train.steps if train.seconds is None else self.elapsed >= train.seconds

    def steps(self) -> Iterator[Step]:
        """Train until the budget is spent, one ``Step`` at a time."""
        channels_last = self.recipe.train.channels_last
        self.wrapped.train()
        batches = self._batches()
        while not self._agreed(self.finished):
            start = time.perf_counter()
            batch = next(batches).to(self.device, channels_last=channels_last)
            result = self._step(batch)
            self.step += 1
            self.elapsed += time.perf_counter() - start
            yield result

    def _batches(self) -> Iterator[Batch]:
        epoch, place = divmod(self.step, len(self.loader))
        while True:
            yield from self.loader.epoch(epoch, place)
            epoch, place = epoch + 1, 0

    def _step(self, batch: Batch) -> Step:
        seed = key_seed("step", self.recipe.train.seed, self.step, self.accelerator.process_index)
        seed_generators(seed)
        if self.lazy:
            torch.cuda.manual_seed(seed)
        progress = self._progress()
        for call in self.progress_calls:
            call(progress)
        factor = self.recipe.schedule.factor(progress)
        clip, rate, losses = self.recipe.train.clip_norm, 0.0, {}
        for player, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                rate = group["lr"] = group["initial_lr"] * factor
            self.trainable.zero_grad(set_to_none=True)
            found = self._gradients(batch, player)
            self._check(found, batch)
            if clip is not None:
                if self.scaled:
                    self.accelerator.unscale_gradients(optimizer)
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
            optimizer.step()
            losses.update(found if player is None else {f"{player}/{k}": v for k, v in found.items()})
        if self.after_step is not None:
            self.after_step()
        return Step(self.step + 1, losses, rate, len(batch))

    def _gradients(self, batch: Batch, player: str | None) -> dict[str, Tensor]:
        """Add the gradients of a batch's mean loss, part by part; the losses, detached."""
        size = self.recipe.train.micro_batch
        parts = [batch] if size is None or size >= len(batch) else list(batch.split(size))
        total: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            share = len(part) / len(batch)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                found = self.wrapped(part) if player is None else self.wrapped(part, player)
                loss = sum(found.values())
                self.accelerator.backward(loss if share == 1 else loss * share)
            for name, value in found.items():
                value = value.detach() if share == 1 else value.detach() * share
                total[name] = value if name not in total else total[name] + value
        return total

    def _check(self, losses: dict[str, Tensor], batch: Batch) -> None:
        """Stop at a loss that is not finite: at once on a CPU, one step later where asking would halt the device."""
        values = list(losses.values())
        total = values[0] if len(values) == 1 else torch.stack(values).sum()
        if not self.lazy:
            if not math.isfinite(total.item()):
                self._stop(batch, self.step)
            return
        self.settle()
        self.pending = (total, batch, self.step)

    def settle(self) -> None:
        """Look at the last step's loss; call it before anything is kept."""
        if self.pending is not None:
            total, batch, step = self.pending
            self.pending = None
            if not math.isfinite(total.item()):
                self._stop(batch, step)

    def _stop(self, batch: Batch, step: int) -> None:
        path = self.folder / f"nonfinite_step{step}_process{self.accelerator.process_index}.safetensors"
        save_checkpoint(
            path, dict(_tensors("inputs", batch.inputs)) | dict(_tensors("targets", batch.targets)), {"ids": batch.ids}
        )
        raise TrainingError(f"the loss of step {step} is not finite; samples {', '.join(batch.ids)}; kept in {path}")

    def _progress(self) -> float:
        train = self.recipe.train
        return self.step / train.steps if train.seconds is None else self.elapsed / train.seconds

    def _agreed(self, flag: bool) -> bool:
        """With a budget in seconds, the first process decides for all."""
        if self.recipe.train.seconds is None or self.accelerator.num_processes == 1:
            return flag
        value = torch.tensor(int(flag), device=self.device)
        torch.distributed.broadcast(value, 0)
        return bool(value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}", item)
