"""The engine's step against a loop written by hand: the same model, the same loaded batches, alternating in one run.

    python benchmarks/engine_step.py [--steps 30] [--rounds 7] [--network timm/resnet18] [--size 64] [--batch 32]

Prints the median seconds of both, and the ratio of the medians (aim: at most 1.03).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from torchive.engine.build import build_model
from torchive.engine.loop import Loop
from torchive.engine.processes import placed, start_processes
from torchive.engine.recipe import Recipe, resolve_recipe
from torchive.structures import Batch


class Loaded:
    """Batches that are already in memory, in place of a loader."""

    waited = 0.0

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches from one on."""
        yield from self.batches[start_batch:]


def by_hand(recipe: Recipe, model: nn.Module, batches: list[Batch]) -> Iterator[float]:
    """What one would write without an engine: rate, zero, forward, backward, clip, step; yields seconds per step."""
    optimizer = torch.optim.AdamW(model.parameters(), **recipe.optimizer.init_args)
    criterion, device = nn.CrossEntropyLoss(), next(model.parameters()).device
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.train.steps)
    model.train()
    while True:
        for batch in batches:
            start = time.perf_counter()
            images = batch.inputs.to(device, memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss = criterion(model.network(images), batch.targets.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            _wait(device)
            yield time.perf_counter() - start


def by_engine(loop: Loop) -> Iterator[float]:
    """Seconds per step of the engine's own loop."""
    steps = loop.steps()
    while True:
        start = time.perf_counter()
        next(steps)
        _wait(loop.device)
        yield time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps of each loop in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--network", default="timm/resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    a = parser.parse_args()
    values: dict[str, Any] = {
        "task": "classification",
        "model": {
            "class_path": "torchive.nn.Classifier",
            "init_args": {"network": a.network, "num_classes": 4, "in_channels": 1},
        },
        "data": {"image_size": a.size, "batch_size": a.batch},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        "train": {"steps": 10**6},
    }
    recipe = resolve_recipe(values)
    accelerator = start_processes(recipe)
    batches = [
        Batch(torch.randn(a.batch, 1, a.size, a.size), torch.randint(0, 4, (a.batch,)), tuple(map(str, range(a.batch))))
        for _ in range(4)
    ]
    models = [placed(build_model(recipe), accelerator.device, channels_last=True) for _ in range(2)]
    loop = Loop(recipe, models[0], Loaded(batches), accelerator, Path())  # type: ignore[arg-type]
    runs = {"engine": by_engine(loop), "by hand": by_hand(recipe, models[1], batches)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(a.rounds + 1):  # the first round warms up
        for name, run in runs.items() if number % 2 else reversed(runs.items()):
            taken = [next(run) for _ in range(a.steps)]
            if number:
                times[name] += taken
    medians = {name: median(taken) for name, taken in times.items()}
    print(f"{a.network}, {a.size} pixels, batch {a.batch}, {torch.get_num_threads()} threads, {accelerator.device}")
    for name, value in medians.items():
        print(f"{name:8}  {value * 1e3:8.2f} ms a step")
    print(f"ratio of medians (engine / by hand)  {medians['engine'] / medians['by hand']:.3f}   aim: at most 1.03")


if __name__ == "__main__":
    main()
