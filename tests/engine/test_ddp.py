"""Two processes under torchrun: one set of weights, and the evaluation of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.toys import ToySet, toy_recipe

from torchive.engine.build import build_trainable
from torchive.engine.evaluate import evaluate, score_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "tests/engine/two_processes.py", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("name", ["classification", "two players", "detection"])
def test_both_processes_end_with_the_same_weights(ran: Path, name: str) -> None:
    one, other = (load_file(ran / name / f"rank{rank}.safetensors") for rank in (0, 1))
    assert one
    assert all(torch.equal(one[key], other[key]) for key in one)
    kept = load_file(ran / name / "last.safetensors")
    assert all(torch.equal(kept[f"model.{key}"], one[key]) for key in one)
    steps = [json.loads(line)["step"] for line in (ran / name / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 8


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_two_processes_score_as_one_does(ran: Path, task: str) -> None:
    """21 samples on two processes: uneven shards, no sample twice."""
    samples = ToySet(task, 21, seed=1)
    alone = evaluate(build_trainable(toy_recipe(task), samples), samples, toy_recipe(task))
    for rank in (0, 1):
        found = json.loads((ran / f"scores{rank}.json").read_text())[task]
        assert found.pop("count") == 21
        assert found.pop("ids") == list(samples.ids)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            exact = name in ("accuracy", "balanced_accuracy", "mean_iou", "dice", "pixel_accuracy")
            assert found[name] == (value if exact else pytest.approx(value, rel=1e-5)), name


def test_a_run_of_two_processes_is_scored_the_same_by_one(ran: Path) -> None:
    found = score_run(ran / "classification", samples=ToySet("classification", 21, seed=1)).metrics
    together = [json.loads((ran / f"scores{rank}.json").read_text())["run"] for rank in (0, 1)]
    assert together[0] == together[1]
    assert found["accuracy"] == together[0]["accuracy"]
