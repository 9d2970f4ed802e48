"""Training a recipe: one run folder, resumed where it was stopped."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchive.data.drawing import kept_generators
from torchive.data.samples import SampleSet
from torchive.engine.build import build_model, fill_recipe, open_split
from torchive.engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
    write_atomically,
)
from torchive.engine.evaluate import evaluate
from torchive.engine.loop import Loop, Step
from torchive.engine.metrics import METRICS
from torchive.engine.pictures import batch_sheet, predicted_samples, prediction_sheet, save_picture, spread
from torchive.engine.processes import any_process, placed, share_buffers, start_processes
from torchive.engine.progress import Progress
from torchive.engine.recipe import Recipe
from torchive.engine.run import RunFolder, deployable_of
from torchive.engine.selection import class_order, counts_in_words
from torchive.engine.views import names_of, stuff_of


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    ``metrics`` are those of the validation split at the end, ``seconds`` the time spent in steps, ``waited`` the part
    of it spent waiting for data (of this process since it started), ``history`` the lines of ``metrics.jsonl``,
    ``left_out`` how many faults the data have whose samples were left out.
    """

    metrics: dict[str, float]
    seconds: float
    steps: int
    run: Path
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    interrupted: bool = False
    waited: float = 0.0
    left_out: int = 0

    def __str__(self) -> str:
        verb = "stopped after" if self.interrupted else "trained"
        head = f"{self.run}: {verb} {self.steps} steps in {self.seconds:.1f} s"
        if self.interrupted:
            return f"{head}; the same command continues"
        lines = [f"  {name:<22} {value:.4f}" for name, value in self.metrics.items()]
        if self.left_out:
            lines.append(
                f"  left out for {self.left_out} fault(s) of the data, listed in {self.run / 'environment.json'}"
            )
        return "\n".join([head, *lines])


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool = True,
    progress: bool = True,
    stop_after: int | None = None,
    samples: Mapping[str, SampleSet] | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> TrainResult:
    """Train a recipe into a run folder; a run that was stopped there goes on and ends as if it had not been.

    Args:
        out: the run folder.
        resume: False starts again.
        progress: a bar on stderr.
        stop_after: leave off after that many steps, with a checkpoint, as Ctrl-C does.
        samples: the sample sets by split ("train", "val") instead of those of the recipe's source.
        initial: values for the parameters and buffers that bear these names and shapes, instead of the drawn ones.

    Raises:
        DataError, RecipeError, ConversionError, CheckpointError: one line each.
        TrainingError: a loss was not finite; the message names the samples.
    """
    return _Training(recipe, Path(out), samples, progress).run(resume=resume, stop_after=stop_after, initial=initial)


class _Training:
    """One call of ``train``."""

    def __init__(self, recipe: Recipe, out: Path, samples: Mapping[str, SampleSet] | None, progress: bool) -> None:
        self.samples = dict(samples or {})
        if "train" not in self.samples:
            self.samples = {split: open_split(recipe, split) for split in ("train", "val")}
        self.recipe = fill_recipe(recipe, self.samples["train"])
        self.folder, self.shown = RunFolder(out), progress
        self.scores: dict[str, float] = {}
        self.scored_at = -1
        self.top: float | None = None
        self.window = _Window()

    def run(self, *, resume: bool, stop_after: int | None, initial: Mapping[str, Tensor] | None) -> TrainResult:
        with kept_generators():
            model = build_model(self.recipe)
            if initial is not None:
                _copy_shared(model, initial)
            self.accelerator = start_processes(
                self.recipe, unused=hasattr(model, "players") or hasattr(model, "before_step")
            )
            self.main = self.accelerator.is_main_process
            resuming = self.folder.begin(self.recipe, resume=resume) if self.main else False
            self.accelerator.wait_for_everyone()
            resuming = resuming if self.main else self.folder.last.exists()
            if resuming and self.folder.result.exists() and self.folder.model.exists():
                return self._finished_before()
            placed(model, self.accelerator.device, channels_last=self.recipe.train.channels_last)
            loop = Loop(self.recipe, model, self._loader(model), self.accelerator, self.folder.path)
            if resuming:
                self._restore(loop)
            if self.main:
                self.folder.cut_records(loop.step)
                self.folder.write_environment(self.samples, torch.get_num_threads(), str(self.accelerator.device))
                self._draw_samples(loop)
            return self._train(loop, stop_after)

    def _train(self, loop: Loop, stop_after: int | None) -> TrainResult:
        train = self.recipe.train
        bar = Progress(
            self.recipe.name, train.steps, start=loop.step, seconds=train.seconds, shown=self.shown and self.main
        )
        for line in counts_in_words(self.samples["train"]) if self.shown and self.main and loop.step == 0 else ():
            bar.say(line)
        if loop.step:
            bar.say(f"{self.folder.path}: goes on after step {loop.step}")
        interrupted = False
        with _signals() as stop:
            try:
                interrupted = stop_after is not None and loop.step >= stop_after
                for step in () if interrupted else loop.steps():
                    self.window.add(step.losses)
                    if step.number % train.log_every == 0 or step.number == 1 or loop.finished:
                        self._log(loop, step, bar)
                    if train.evaluate_every and step.number % train.evaluate_every == 0 and not loop.finished:
                        self._evaluate(loop, bar)
                    interrupted = self._asked(stop, step.number) or step.number == stop_after
                    if interrupted and not loop.finished:
                        break
                    if train.checkpoint_every and step.number % train.checkpoint_every == 0:
                        self._save(loop)
                interrupted = interrupted and not loop.finished
                self._save(loop)
                if not interrupted:
                    self._finish(loop, bar)
            finally:
                bar.close()
                self.folder.close()
                loop.loader.close()
        history = self.folder.history() if self.main else []
        waited, left_out = loop.loader.waited, len(self.samples["train"].left_out)
        return TrainResult(
            self.scores, loop.elapsed, loop.step, self.folder.path, history, interrupted, waited, left_out
        )

    def _loader(self, model: nn.Module) -> Any:
        from torchive.data import Loader
        from torchive.transforms import build

        data, samples = self.recipe.data, self.samples["train"]
        world = self.accelerator.num_processes
        augment: Any = data.augment
        if self.recipe.task == "selfsupervised" and augment == "default" and hasattr(model, "views"):
            augment = model.views(data.image_size, **data.views)  # type: ignore[operator]
        transform = build(
            self.recipe.task, image_size=data.image_size, train=True, channels=data.channels, augment=augment
        )
        return Loader(
            samples,
            transform,
            batch_size=data.batch_size // world,
            seed=self.recipe.train.seed,
            shuffle=True,
            workers=data.workers,
            rank=self.accelerator.process_index,
            world=world,
            drop_last=len(samples) >= data.batch_size,
            order=class_order(self.recipe, samples, getattr(model, "sampling", None)),
        )

    def _log(self, loop: Loop, step: Step, bar: Progress) -> None:
        loop.settle()
        losses = {name: float(self.accelerator.reduce(value, "mean")) for name, value in self.window.take().items()}
        if not self.main:
            return
        total = sum(losses.values())
        speed = self.recipe.data.batch_size * step.number / max(loop.elapsed, 1e-9)
        named = losses if len(losses) > 1 or "loss" not in losses else {}
        values = {"loss": total, **named, "lr": step.rate, "seconds": loop.elapsed, "samples_per_second": speed}
        self.folder.record("train", step.number, values)
        bar.update(step.number, loop.elapsed, total, speed)

    def _evaluate(self, loop: Loop, bar: Progress) -> None:
        """Score the validation split; keep the weights if they are the best so far."""
        if self.scored_at == loop.step or not len(self.samples.get("val", ())):
            return
        loop.settle()
        if self.accelerator.num_processes > 1:
            share_buffers(loop.model)
        self.scores = evaluate(
            deployable_of(loop.model),
            self.samples["val"],
            self.recipe,
            reference=self.samples["train"],
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        self.scored_at = loop.step
        if not self.main or not self.scores:
            return
        name = self.recipe.decides
        self.folder.record("val", loop.step, self.scores)
        if name not in self.scores:
            return
        value = self.scores[name]
        bar.scored(name, value)
        sign = 1 if name not in METRICS or METRICS[name].higher_is_better else -1
        if self.top is None or sign * value > sign * self.top:
            self.top = value
            self._write_model(loop, self.folder.best)

    def _asked(self, stop: threading.Event, step: int) -> bool:
        """Whether to stop; several processes agree on it at the steps that are logged."""
        if self.accelerator.num_processes == 1:
            return stop.is_set()
        return step % self.recipe.train.log_every == 0 and any_process(stop.is_set(), self.accelerator.device)

    def _save(self, loop: Loop) -> None:
        """Write ``last.safetensors``: weights, optimiser state and step are the whole state of a run."""
        loop.settle()
        if not self.main:
            return
        tensors = {f"model.{k}": v for k, v in loop.model.state_dict().items()}
        plain: dict[str, Any] = {}
        for name, optimizer in loop.plain.items():
            found, rest = optimizer_tensors(optimizer, f"optimizer.{name or 'all'}")
            tensors, plain = tensors | found, plain | rest
        scaler = self.accelerator.scaler
        values = {
            "step": loop.step,
            "elapsed": loop.elapsed,
            "top": self.top,
            "window": self.window.values(),
            "optimizer": plain,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "fingerprint": self.recipe.fingerprint(),
            "samples": self._samples(),
        }
        save_checkpoint(self.folder.last, tensors, values | self._about())

    def _samples(self) -> str:
        """A hash of the ids and classes trained on: a run continues with the samples it began with, or not at all."""
        samples = self.samples["train"]
        return sha256(json.dumps([list(samples.ids), list(samples.classes)]).encode()).hexdigest()[:16]

    def _check_samples(self, known: str | None, path: Path) -> None:
        if known is not None and known != self._samples():
            raise CheckpointError(
                f"{path}: trained on other samples than {self.samples['train'].name} now holds; "
                "choose another folder (--out), or start again (--fresh)"
            )

    def _about(self) -> dict[str, Any]:
        samples = self.samples["train"]
        channels = self.recipe.data.channels or samples.channels
        names = {"classes": list(samples.classes), "stuff": list(stuff_of(samples))}
        return {"recipe": self.recipe.to_dict(), **names, "channels": channels}

    def _restore(self, loop: Loop) -> None:
        checkpoint = load_checkpoint(self.folder.last)
        values = checkpoint.values
        if values.get("fingerprint") != self.recipe.fingerprint():
            raise CheckpointError(f"{self.folder.last}: a checkpoint of another recipe")
        self._check_samples(values.get("samples"), self.folder.last)
        load_weights(loop.model, checkpoint.part("model"), self.folder.last)
        for name, optimizer in loop.plain.items():
            load_optimizer(optimizer, checkpoint.tensors, values["optimizer"], f"optimizer.{name or 'all'}")
        if values.get("scaler") and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.window = _Window.of(values["window"], self.accelerator.device)
        loop.step, loop.elapsed, self.top = values["step"], values["elapsed"], values["top"]

    def _finish(self, loop: Loop, bar: Progress) -> None:
        self._evaluate(loop, bar)
        if self.main:
            self._write_model(loop, self.folder.model)
            self._draw_predictions(loop)
            result = {"metrics": self.scores, "seconds": loop.elapsed, "steps": loop.step, "samples": self._samples()}
            write_atomically(self.folder.result, json.dumps(result, indent=1).encode())
        self.accelerator.wait_for_everyone()

    def _write_model(self, loop: Loop, path: Path) -> None:
        tensors = {f"model.{k}": v for k, v in deployable_of(loop.model).state_dict().items()}
        values = {"step": loop.step, "metrics": self.scores, "deployable": True}
        save_checkpoint(path, tensors, values | self._about())

    def _finished_before(self) -> TrainResult:
        path = self.folder.result
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values["metrics"], values["seconds"], values["steps"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{path}: broken, so the run cannot be read; start again (--fresh)") from error
        self._check_samples(values.get("samples"), path)
        return TrainResult(*found, self.folder.path, self.folder.history())

    def _draw_samples(self, loop: Loop) -> None:
        """``pictures/train.png``: the first batch as it reaches the network."""
        path = self.folder.pictures / "train.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            batch = next(loop.loader.epoch(0))
            save_picture(batch_sheet(batch, self.recipe, names_of(self.samples["train"])), path)

    def _draw_predictions(self, loop: Loop) -> None:
        """``pictures/val.png``: the final model's predictions beside the targets."""
        model, samples = deployable_of(loop.model), self.samples.get("val")
        if samples is not None and len(samples) and hasattr(model, "predict"):
            chosen, found = predicted_samples(model, samples, spread(samples), self.recipe)
            sheet = prediction_sheet(chosen, found, self.recipe, names_of(samples))
            save_picture(sheet, self.folder.pictures / "val.png")


class _Window:
    """Losses since the last record, summed where they are, so that a step does not wait for the device."""

    def __init__(self) -> None:
        self.count, self.sums = 0, dict[str, Tensor]()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        self.count += 1
        for name, value in losses.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self) -> dict[str, Tensor]:
        """The means, and start again."""
        means = {name: value / self.count for name, value in self.sums.items()}
        self.count, self.sums = 0, {}
        return means

    def values(self) -> dict[str, Any]:
        return {"count": self.count, "sums": {name: float(value) for name, value in self.sums.items()}}

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device) -> _Window:
        window = cls()
        window.count = values["count"]
        window.sums = {name: torch.tensor(value, device=device) for name, value in values["sums"].items()}
        return window


def _copy_shared(model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in initial and initial[name].shape == value.shape:
                value.copy_(initial[name])


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a polite kill sets; a second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
