"""Time a method against its baseline: eager, compiled and exported forms of both arms, in one run and in turn.

Every figure stands beside the machine's own matrix-product rate, so that a reader sees how much of it a form uses.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchive.engine.arms import ARMS, make_arms
from torchive.engine.build import build_trainable, open_split
from torchive.engine.export import OnnxModel, write_onnx
from torchive.engine.recipe import Recipe
from torchive.engine.run import deployable_of

FORMS = ("eager", "compiled", "onnx")


@dataclass(frozen=True)
class Timing:
    """One form of one arm at one batch size.

    ``share_of_peak`` is its operations per second over those of a large matrix product on this machine.
    """

    arm: str
    form: str
    batch: int
    median_ms: float
    p95_ms: float
    ratio: float
    share_of_peak: float


@dataclass(frozen=True)
class BenchReport:
    """All timings; ``ratio`` is the method's median over the baseline's in the same form and batch size."""

    method: str
    recipe: str
    shape: tuple[int, ...]
    threads: int
    peak_gflops: float
    operations: dict[str, int]
    timings: list[Timing]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        machine = f"{self.threads} threads, matrix product {self.peak_gflops:.0f} GFLOP/s"
        head = f"{self.method} in {self.recipe}, input {size}, {machine}"
        counts = ", ".join(f"{arm} {count / 1e6:.1f} M" for arm, count in self.operations.items())
        lines = [head, f"operations per image: {counts}", ""]
        lines.append(f"{'form':<10}{'batch':>6}{'arm':>10}{'median ms':>12}{'p95 ms':>10}{'ratio':>8}{'of peak':>9}")
        for t in self.timings:
            ratio = f"{t.ratio:.2f}" if t.arm == "method" else ""
            row = f"{t.form:<10}{t.batch:>6}{t.arm:>10}{t.median_ms:>12.2f}{t.p95_ms:>10.2f}{ratio:>8}"
            lines.append(f"{row}{t.share_of_peak:>9.1%}")
        return "\n".join(lines)


def bench(
    method: str,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    forms: Sequence[str] = ("eager", "onnx"),
    batches: Sequence[int] = (1, 16),
    rounds: int = 20,
) -> BenchReport:
    """Time prediction's ``forward`` of both arms of a method's comparison.

    Args:
        method: a built method's name.
        recipe, overrides: as in ``compare``.
        forms: of "eager", "compiled" (``torch.compile``) and "onnx" (ONNX Runtime on the CPU).
        batches: batch sizes.
        rounds: timed calls of each; the arms take turns.

    Raises:
        ValueError: an unknown form, or a method that is no model and no part of one.
    """
    for form in forms:
        if form not in FORMS:
            raise ValueError(f"a form is one of {', '.join(FORMS)}, got {form!r}")
    arms = dict(zip(ARMS, make_arms(method, recipe=recipe, overrides=overrides), strict=True))
    recipes = {name: arm.recipe for name, arm in arms.items()}
    models = {name: _model(recipe) for name, recipe in recipes.items()}
    one = _example(recipes["baseline"])
    operations = {name: _operations(model, one) for name, model in models.items()}
    peak = matrix_rate()
    timings = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for form in forms:
            calls = {name: _form(model, form, one, Path(folder) / f"{name}.onnx") for name, model in models.items()}
            for batch in batches:
                inputs = torch.cat([one] * batch)  # keeps the layout
                timings += _alternating(calls, inputs, form, rounds, operations, peak)
    name = recipes["baseline"].name
    return BenchReport(method, name, tuple(one.shape[1:]), torch.get_num_threads(), peak / 1e9, operations, timings)


def _model(recipe: Recipe) -> nn.Module:
    """A recipe's untrained model; weights do not change how long it takes."""
    model = deployable_of(build_trainable(recipe, open_split(recipe, "test"))).eval()
    return model.to(memory_format=torch.channels_last) if recipe.train.channels_last else model


def _example(recipe: Recipe) -> Tensor:
    size = recipe.data.image_size or 224
    channels = recipe.data.channels or open_split(recipe, "test").channels
    image = torch.rand(1, channels, size, size)
    return image.to(memory_format=torch.channels_last) if recipe.train.channels_last else image


def _operations(model: nn.Module, one: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(one)
    return int(counter.get_total_flops())


def matrix_rate(size: int = 1024, rounds: int = 10) -> float:
    """Operations per second of a float32 matrix product of this size: the best of some rounds."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _form(model: nn.Module, form: str, one: Tensor, path: Path) -> Callable[[Tensor], Any]:
    if form == "eager":
        return model
    if form == "compiled":
        torch._dynamo.reset()
        return torch.compile(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_onnx(model, one.repeat(2, *[1] * (one.ndim - 1)), path)
    return OnnxModel(path)


def _alternating(
    calls: dict[str, Callable[[Tensor], Any]],
    inputs: Tensor,
    form: str,
    rounds: int,
    operations: dict[str, int],
    peak: float,
) -> list[Timing]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name in list(calls) if turn % 2 else list(reversed(calls)):
            start = time.perf_counter()
            calls[name](inputs)
            if turn >= 3:
                times[name].append((time.perf_counter() - start) * 1e3)
    base = median(times["baseline"])
    found = []
    for name, values in times.items():
        mid, batch = median(values), len(inputs)
        rate = operations[name] * batch / (mid / 1e3)
        found.append(Timing(name, form, batch, mid, float(np.percentile(values, 95)), mid / base, rate / peak))
    return found
