"""Training, resuming, scoring and predicting where the network lies on another device than the data."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.engine.toys import KINDS, toy_recipe, toy_samples

from torchive.engine.evaluate import score_run
from torchive.engine.predict import predict
from torchive.engine.train import train
from torchive.testing import PretendedDevice


@pytest.mark.parametrize(("task", "model"), KINDS, ids=lambda v: str(v))
def test_trains_resumes_and_scores_there_as_on_the_cpu(
    task: str, model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, samples = toy_recipe(task, model), toy_samples(task)
    scored = {"samples": samples["val"], "reference": samples["train"]}
    expected = train(recipe, tmp_path / "cpu", samples=samples, progress=False)
    on_cpu = score_run(tmp_path / "cpu", **scored).metrics if model is None else {}
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda _: torch.device("cuda", 0)))
    with PretendedDevice():
        train(recipe, tmp_path / "gpu", samples=samples, progress=False, stop_after=7)
        found = train(recipe, tmp_path / "gpu", samples=samples, progress=False)
        there = score_run(tmp_path / "gpu", **scored).metrics if model is None else {}
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "gpu"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (found.metrics, there) == (expected.metrics, on_cpu)
    assert '"device": "cuda:0"' in (tmp_path / "gpu" / "environment.json").read_text()


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_predicts_there_as_on_the_cpu(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(toy_recipe(task), tmp_path / "run", samples=toy_samples(task), progress=False)
    Image.new("L", (16, 16), 128).save(tmp_path / "grey.png")
    predict(tmp_path / "run", [str(tmp_path / "grey.png")], out=tmp_path / "cpu", progress=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with PretendedDevice():
        predict(tmp_path / "run", [str(tmp_path / "grey.png")], out=tmp_path / "gpu", progress=False)
    one, other = ((tmp_path / name / "predictions.json").read_text() for name in ("cpu", "gpu"))
    assert one == other
