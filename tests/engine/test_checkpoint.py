"""Checkpoints are whole or not there; what does not fit, or could run code, is refused in one line."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.engine.toys import TinyNet, toy_recipe, toy_samples
from torch import nn

from torchive.engine import checkpoint as module
from torchive.engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
)
from torchive.engine.run import load_run
from torchive.engine.train import train


def test_tensors_and_values_come_back(tmp_path: Path) -> None:
    shared = torch.randn(4)
    tensors = {
        "model.a": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "model.b": shared,
        "optimizer.c": shared,
        "model.empty": torch.zeros(0, 3),
        "model.count": torch.tensor(7),
    }
    save_checkpoint(tmp_path / "x.safetensors", tensors, {"step": 3, "names": ["a"], "none": None})
    found = load_checkpoint(tmp_path / "x.safetensors")
    assert found.values == {"step": 3, "names": ["a"], "none": None}
    assert all(torch.equal(found.tensors[k], v) for k, v in tensors.items())
    assert set(found.part("model")) == {"a", "b", "empty", "count"}


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "Adagrad"])
def test_an_optimiser_goes_on_as_if_it_had_not_stopped(kind: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    images = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()

    one, other = (TinyNet().eval().to(memory_format=torch.channels_last) for _ in range(2))
    first = getattr(torch.optim, kind)(one.parameters(), lr=0.01, **options)
    step(one, first)
    other.load_state_dict(one.state_dict())
    second = getattr(torch.optim, kind)(other.parameters(), lr=0.01, **options)
    tensors, plain = optimizer_tensors(first, "optimizer.all")
    load_optimizer(second, {k: v.contiguous() for k, v in tensors.items()}, plain, "optimizer.all")
    for state, parameter in zip(second.state.values(), other.parameters(), strict=True):
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride(), "the state lost its layout"
    step(one, first)
    step(other, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, {"model.a": torch.ones(3)}, {"step": 1})

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: .*No space left on device; .*intact") as caught:
        save_checkpoint(path, {"model.a": torch.zeros(3)}, {"step": 2})
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert load_checkpoint(path).values["step"] == 1
    assert os.listdir(tmp_path) == ["last.safetensors"], "a temporary file was left"


def test_a_header_of_any_length_is_taken_for_what_it_is(tmp_path: Path) -> None:
    """The first byte of the file is the low byte of the header's length, and may be that of a pickle or an archive."""
    seen = set()
    for extra in range(0, 600, 4):
        save_checkpoint(tmp_path / "x", {"model.a": torch.ones(3)}, {"text": "a" * extra})
        seen.add((tmp_path / "x").read_bytes()[0])
        assert len(load_checkpoint(tmp_path / "x").values["text"]) == extra
    assert 0x80 in seen


@pytest.mark.parametrize("keep", [0, 5, 100, -7])
def test_a_truncated_file(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {"model.a": torch.ones(300)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: truncated"):
        load_checkpoint(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="no trained run"):
        load_run(tmp_path)


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "plain pickle", "old torch"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    path, proof = tmp_path / "weights.pt", tmp_path / "ran"
    content = {"a": torch.ones(2), "trap": Trap(proof)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"trap": Trap(proof)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"weights\.pt: .*(refused|no table)"):
        load_checkpoint(path)
    assert not proof.exists(), "the code in the pickle ran"


def test_foreign_weights_are_read_as_tensors_only(tmp_path: Path) -> None:
    weights = TinyNet().state_dict()
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "a.pth")
    save_file({k: v.clone() for k, v in weights.items()}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        model = TinyNet()
        load_weights(model, load_checkpoint(tmp_path / name).part("model"), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))


def test_weights_of_another_model_name_the_differences_and_change_nothing(tmp_path: Path) -> None:
    model = TinyNet()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(CheckpointError, match=r"another model: first\.weight is missing; .* and \d+ more"):
        load_weights(model, other.state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"last\.weight is \(3, 8\), not \(2, 8\)"):
        load_weights(model, TinyNet(num_classes=3).state_dict(), tmp_path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_run_whose_checkpoint_is_of_another_model(tmp_path: Path) -> None:
    samples = toy_samples("classification")
    train(toy_recipe(), tmp_path / "a", samples=samples, progress=False, stop_after=3)
    train(toy_recipe("segmentation"), tmp_path / "b", samples=toy_samples("segmentation"), progress=False, stop_after=3)
    (tmp_path / "a" / "last.safetensors").write_bytes((tmp_path / "b" / "last.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="another recipe"):
        train(toy_recipe(), tmp_path / "a", samples=samples, progress=False)


def test_a_disk_that_is_full_during_training_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, recipe = toy_samples("classification"), toy_recipe()
    train(recipe, tmp_path / "whole", samples=samples, progress=False)
    train(recipe, tmp_path / "full", samples=samples, progress=False, stop_after=4)
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        train(recipe, tmp_path / "full", samples=samples, progress=False)
    monkeypatch.undo()
    train(recipe, tmp_path / "full", samples=samples, progress=False)
    one, other = (load_checkpoint(tmp_path / name / "model.safetensors").tensors for name in ("whole", "full"))
    assert all(torch.equal(one[k], other[k]) for k in one)
