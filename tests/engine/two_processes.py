"""Run by ``torchrun`` in test_ddp.py: trains every toy, evaluates, and writes what each process ended with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.engine.toys import ToySet, toy_recipe, toy_samples

from torchive.engine import train as training
from torchive.engine.build import build_trainable
from torchive.engine.evaluate import score, score_run
from torchive.engine.loop import Loop
from torchive.engine.processes import start_processes


def main(out: Path) -> None:
    """Train, score, and write."""
    torch.set_num_threads(1)
    loops: list[Loop] = []
    kept = training.Loop
    training.Loop = lambda *a, **k: loops.append(kept(*a, **k)) or loops[-1]  # type: ignore[assignment, func-returns-value]
    rank = 0
    for name, task in (
        ("classification", "classification"),
        ("two players", "classification"),
        ("detection", "detection"),
    ):
        recipe = toy_recipe(task, name, train={"micro_batch": 3, "steps": 8})
        training.train(recipe, out / name, samples=toy_samples(task), progress=False, stop_after=4)
        training.train(recipe, out / name, samples=toy_samples(task), progress=False)
        rank = loops[-1].accelerator.process_index
        weights = {n: p.detach().contiguous() for n, p in loops[-1].model.named_parameters()}
        save_file(weights, out / name / f"rank{rank}.safetensors")
    scores = {}
    for task in ("classification", "segmentation", "detection"):
        recipe, samples = toy_recipe(task), ToySet(task, 21, seed=1)
        model = build_trainable(recipe, samples)
        accelerator = start_processes(recipe)
        found = score(model, samples, recipe, rank=accelerator.process_index, world=accelerator.num_processes)
        scores[task] = {**found.metrics, "count": len(found.predictions), "ids": list(found.ids)}
    whole = score_run(out / "classification", samples=ToySet("classification", 21, seed=1), predictions=False)
    scores["run"] = whole.metrics
    (out / f"scores{rank}.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
