"""What both arms cost, measured in one run on one machine: the arms take turns, so that a busy moment hits both."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from torchive.engine.build import build_optimizer
from torchive.engine.loop import Trainable, progress_calls
from torchive.engine.recipe import Recipe
from torchive.structures import Batch

_MEGABYTE = 2**20
_WARM_UP = 3


def measure_costs(
    models: Mapping[str, nn.Module],
    recipes: Mapping[str, Recipe],
    train_batch: Batch,
    test_batch: Batch,
    *,
    seconds: float = 2.0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Parameters, operations, times and memory of each arm.

    Args:
        models: arm -> model; their modes are restored, their weights are trained on by a few steps.
        recipes: arm -> its recipe, for optimiser and layout.
        train_batch: of the recipe's size, as the loop gives it.
        test_batch: 16 images as for prediction.
        seconds: spent on each time of each arm, at least five rounds, at most 100.

    Returns:
        ``arms`` with the figures, ``note`` and ``how`` in words.
    """
    device = torch.device(device)
    layout = recipes["baseline"].train.channels_last
    one, many = (_first(test_batch, n).to(device, channels_last=layout) for n in (1, 16))
    batch = train_batch.to(device, channels_last=layout)
    arms: dict[str, dict[str, Any]] = {arm: {} for arm in models}
    steps: dict[str, _Stepper] = {}
    for arm, model in models.items():
        model.to(device)
        if layout:
            model.to(memory_format=torch.channels_last)
        arms[arm]["parameters"] = sum(p.numel() for p in model.parameters())
        arms[arm]["operations"] = _operations(model, one.inputs)
        steps[arm] = _Stepper(model, recipes[arm], batch)
    arms_now = list(models)
    with _predicting(models.values()):
        for arm in arms_now:
            arms[arm]["memory_predict_mb"] = _memory(partial(_predict, models[arm], many.inputs), models[arm], device)
        for key, inputs in (("latency_1_ms", one.inputs), ("latency_16_ms", many.inputs)):
            calls = {arm: partial(_predict, models[arm], inputs) for arm in arms_now}
            for arm, times in in_turn(calls, seconds, device).items():
                arms[arm][key] = times
    for model in models.values():
        model.train()
    for arm, times in in_turn(steps, seconds, device).items():
        arms[arm]["train_step_ms"] = times
    for arm in arms_now:
        arms[arm]["memory_train_mb"] = _memory(steps[arm], models[arm], device)
    return {
        "arms": arms,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        **_words(device, many, batch),
    }


def _words(device: torch.device, many: Batch, batch: Batch) -> dict[str, Any]:
    place = f"{_threads()} of the processor" if device.type == "cpu" else _device_name(device)
    shape = tuple(many.inputs[0].shape)
    size = " x ".join(map(str, shape[-2:]))
    return {
        "image": list(shape),
        "note": f"Both arms in one run on one machine, taking turns: {place}, float32, images of {size} pixels.",
        "how": {
            "Operations": "counted by PyTorch on one image; a multiplication and an addition are two",
            "Training step": f"losses, gradients and optimiser step on a batch of {len(batch)}, data already loaded",
            "Latency": f"predict on batches of 1 and {len(many)} real images, from tensors to results",
            "Peak memory": "the most that tensors held at once, weights included"
            + (", from the allocator's record" if device.type == "cpu" else ", from the device's allocator"),
        },
    }


def _first(batch: Batch, count: int) -> Batch:
    """The first samples of a batch, repeated where there are fewer."""
    index = [i % len(batch) for i in range(count)]
    inputs = batch.inputs[index] if isinstance(batch.inputs, Tensor) else [batch.inputs[i] for i in index]
    return Batch(inputs, None, tuple(batch.ids[i] for i in index))


def _predict(model: nn.Module, inputs: Any) -> Any:
    return model.predict(inputs) if hasattr(model, "predict") else model(inputs)  # type: ignore[operator]


@contextmanager
def _predicting(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode without gradients; modes are restored."""
    modes = [(model, model.training) for model in models]
    try:
        with torch.no_grad():
            for model, _ in modes:
                model.eval()
            yield
    finally:
        for model, mode in modes:
            model.train(mode)


def _operations(model: nn.Module, inputs: Any) -> int:
    with _predicting([model]), FlopCounterMode(display=False) as counter:
        _predict(model, inputs)
    return int(counter.get_total_flops())


class _Stepper:
    """One optimiser step on a batch, as the loop does it."""

    def __init__(self, model: nn.Module, recipe: Recipe, batch: Batch) -> None:
        self.trainable, self.model = Trainable(model), model
        self.optimizers = {p: build_optimizer(recipe, group, model) for p, group in self.trainable.groups().items()}
        self.progress_calls = progress_calls(model)
        self.after_step = getattr(model, "after_step", None)
        size = recipe.train.micro_batch
        self.parts = [batch] if size is None or size >= len(batch) else list(batch.split(size))
        self.samples = len(batch)

    def __call__(self) -> None:
        for call in self.progress_calls:
            call(0.0)  # of a run in stages, the first one
        for player, optimizer in self.optimizers.items():
            self.clear()
            for part in self.parts:
                losses = self.trainable(part) if player is None else self.trainable(part, player)
                (sum(losses.values()) * (len(part) / self.samples)).backward()
            optimizer.step()
        if self.after_step is not None:
            self.after_step()

    def clear(self) -> None:
        """Drop the gradients."""
        self.trainable.zero_grad(set_to_none=True)

    def state(self) -> Iterator[Tensor]:
        """What the optimisers keep between steps."""
        for optimizer in self.optimizers.values():
            for values in optimizer.state.values():
                yield from (value for value in values.values() if isinstance(value, Tensor))


def in_turn(
    calls: Mapping[str, Callable[[], Any]], seconds: float, device: torch.device
) -> dict[str, dict[str, float]]:
    """Median and 95th percentile in milliseconds; the arms alternate, and every round begins with the other one."""
    names = list(calls)
    slowest = max([_timed(calls[name], device) for _ in range(_WARM_UP) for name in names][len(names) :])
    rounds = min(max(int(1000 * seconds / max(slowest, 1e-6)), 5), 100)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(_timed(calls[name], device))
    return {
        name: {"median": statistics.median(v), "p95": _percentile(v, 0.95), "rounds": rounds}
        for name, v in times.items()
    }


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - start) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _memory(call: Callable[[], Any], model: nn.Module, device: torch.device) -> float:
    """Megabytes that tensors held at the peak of a call, with what model and optimiser held already."""
    call()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device)) / _MEGABYTE
    before = [*model.parameters(), *model.buffers()]
    if isinstance(call, _Stepper):
        call.clear()
        before += list(call.state())
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    events = record.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return (peak + sum(t.numel() * t.element_size() for t in before)) / _MEGABYTE


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's native part writes lines of its own to stderr; they help nobody here."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
