"""One loop for every contract; a stopped run ends where an uninterrupted one does."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.engine.toys import KINDS, ToyContrast, ToySet, toy_recipe, toy_samples, train_toy
from torch import nn

from torchive.data import collate
from torchive.engine.build import build_model, build_optimizer, build_trainable, fill_recipe
from torchive.engine.checkpoint import load_checkpoint
from torchive.engine.loop import Loop, TrainingError
from torchive.engine.processes import start_processes
from torchive.engine.recipe import RecipeError, ScheduleSpec
from torchive.engine.run import load_run
from torchive.engine.train import train
from torchive.structures import Batch, Sample

ROOT = Path(__file__).parents[2]


def _same(one: Path, other: Path, file: str = "last.safetensors") -> bool:
    a, b = load_file(one / file), load_file(other / file)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("task", "model"), KINDS, ids=lambda v: str(v))
def test_one_loop_trains_every_contract_and_resumes_bit_for_bit(
    task: str, model: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, samples = toy_recipe(task, model), toy_samples(task)
    before = torch.get_rng_state()
    whole = train(recipe, tmp_path / "whole", samples=samples, progress=False)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator moved"
    assert whole.steps == 12
    assert not whole.interrupted
    assert recipe.decides in whole.metrics or model is not None
    first = train(recipe, tmp_path / "parts", samples=samples, progress=False, stop_after=3)
    assert first.interrupted
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train(recipe, tmp_path / "parts", samples=samples, progress=True, stop_after=7)  # within the second epoch
    assert "goes on after step 3" in capsys.readouterr().err.replace("\n", "")
    last = train(recipe, tmp_path / "parts", samples=samples, progress=False)
    assert last.steps == 12
    assert _same(tmp_path / "whole", tmp_path / "parts")
    assert _same(tmp_path / "whole", tmp_path / "parts", "model.safetensors")
    records = [[(r["kind"], r["step"], r.get("loss")) for r in result.history] for result in (whole, last)]
    assert records[0] == records[1]
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "pictures/train.png", "best.safetensors"):
        assert (tmp_path / "whole" / name).exists() == (name != "best.safetensors" or bool(whole.metrics)), name
    assert list((tmp_path / "whole").glob("events.out.*"))


def test_training_learns_and_reports_it(tmp_path: Path) -> None:
    recipe = toy_recipe(train={"steps": 150, "evaluate_every": 0}, data={"augment": "none"})
    result = train(recipe, tmp_path, samples=toy_samples("classification"), progress=False)
    assert result.metrics["accuracy"] > 0.9
    losses = [record["loss"] for record in result.history if record["kind"] == "train"]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    again = train(recipe, tmp_path, samples=toy_samples("classification"), progress=False)
    assert (again.metrics, again.seconds) == (result.metrics, result.seconds), "a finished run trained again"


def test_workers_and_reports_do_not_change_the_weights(tmp_path: Path) -> None:
    samples = toy_samples("classification")
    train(toy_recipe(), tmp_path / "a", samples=samples, progress=False)
    other = toy_recipe(data={"workers": 1}, train={"evaluate_every": 2, "checkpoint_every": 3, "log_every": 1})
    assert other.fingerprint() == toy_recipe().fingerprint()
    train(other, tmp_path / "b", samples=samples, progress=False)
    assert _same(tmp_path / "a", tmp_path / "b")


def test_a_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    samples = toy_samples("classification")
    train(toy_recipe(), tmp_path, samples=samples, progress=False)
    other = toy_recipe(train={"seed": 1})
    with pytest.raises(RecipeError, match=r"train\.seed"):
        train(other, tmp_path, samples=samples, progress=False)
    result = train(other, tmp_path, samples=samples, progress=False, resume=False)
    assert [r["step"] for r in result.history if r["kind"] == "train"] == [1, 4, 8, 12]


def test_the_loop_takes_the_same_step_as_plain_pytorch() -> None:
    """Against a loop written out in the test: rates, clipping, micro-batches whose last part is smaller."""
    recipe = toy_recipe(
        data={"batch_size": 8}, train={"micro_batch": 3, "clip_norm": 0.1, "channels_last": False}, model={}
    )
    recipe = recipe.override(["model.network.init_args={width: 4}"])
    samples = ToySet("classification")
    recipe = fill_recipe(recipe, samples)
    images = torch.stack([samples[i].image for i in range(8)]).float() / 255
    labels = torch.tensor([samples[i].target for i in range(8)])

    class Fixed:
        waited = 0.0

        def __len__(self) -> int:
            return 6

        def epoch(self, epoch: int, start: int = 0) -> Any:
            for _ in range(start, 6):
                yield Batch(images, labels, tuple("abcdefgh"))

    model = build_model(recipe)
    for module in (model, twin := build_model(recipe)):
        module.network.drop.p = 0.0
    loop = Loop(recipe, model, Fixed(), start_processes(recipe), Path())  # type: ignore[arg-type]
    taken = [step for _, step in zip(range(4), loop.steps(), strict=False)]
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    for number in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * ScheduleSpec().factor(number / 12)
        optimizer.zero_grad()
        total = 0.0
        for part in (slice(0, 3), slice(3, 6), slice(6, 8)):
            share = len(labels[part]) / 8
            loss = nn.functional.cross_entropy(twin.network(images[part]), labels[part]) * share
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        assert taken[number].losses["loss"].item() == pytest.approx(total, rel=1e-5)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_a_micro_batch_of_the_whole_batch_changes_nothing(tmp_path: Path) -> None:
    samples = toy_samples("classification")
    train(toy_recipe(), tmp_path / "a", samples=samples, progress=False)
    train(toy_recipe(train={"micro_batch": 8}), tmp_path / "b", samples=samples, progress=False)
    assert _same(tmp_path / "a", tmp_path / "b", "model.safetensors")
    train(toy_recipe(train={"micro_batch": 2}), tmp_path / "c", samples=samples, progress=False)
    assert not _same(tmp_path / "a", tmp_path / "c", "model.safetensors"), "batch norm saw the whole batch"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tmp_path: Path) -> None:
    recipe = toy_recipe().override(["model={class_path: tests.engine.toys.Bursting}"])
    samples = toy_samples("classification")
    with pytest.raises(TrainingError, match="step 3 is not finite") as caught:
        train(recipe, tmp_path, samples=samples, progress=False)
    (kept,) = tmp_path.glob("nonfinite_*.safetensors")
    checkpoint = load_checkpoint(kept)
    assert checkpoint.values["ids"]
    assert all(name in str(caught.value) for name in checkpoint.values["ids"])
    assert checkpoint.tensors["inputs"].shape == (8, 1, 16, 16)
    assert not (tmp_path / "last.safetensors").exists(), "weights were kept after the fault"


def test_on_a_device_the_loss_is_looked_at_one_step_later_but_before_anything_is_kept(tmp_path: Path) -> None:
    recipe = fill_recipe(
        toy_recipe().override(["model={class_path: tests.engine.toys.Bursting}"]), ToySet("classification")
    )
    samples = ToySet("classification")
    batches = [collate([_float(samples[i]) for i in range(8 * k, 8 * k + 8)]) for k in range(6)]

    class Fixed:
        def __len__(self) -> int:
            return 6

        def epoch(self, epoch: int, start: int = 0) -> Any:
            return iter(batches[start:])

    for asked in (False, True):
        loop = Loop(recipe, build_model(recipe), Fixed(), start_processes(recipe), tmp_path)  # type: ignore[arg-type]
        loop.lazy = True
        steps = loop.steps()
        for _ in range(4):  # the fourth loss is infinite, and nobody has looked yet
            next(steps)
        with pytest.raises(TrainingError, match=f"step 3 is not finite; samples {', '.join(batches[3].ids)}"):
            loop.settle() if asked else next(steps)


def test_views_of_a_procedure_take_their_options_from_the_recipe(tmp_path: Path) -> None:
    samples = toy_samples("selfsupervised")
    for name, noise in (("a", 0.05), ("b", 0.5)):
        recipe = toy_recipe("selfsupervised", data={"views": {"noise": noise}})
        train(recipe, tmp_path / name, samples=samples, progress=False)
    assert not _same(tmp_path / "a", tmp_path / "b")


def test_after_step_is_called_once_a_step(tmp_path: Path) -> None:
    train(toy_recipe("selfsupervised"), tmp_path, samples=toy_samples("selfsupervised"), progress=False)
    assert load_file(tmp_path / "last.safetensors")["model.steps"].item() == 12
    _, model = load_run(tmp_path)
    assert type(model) is type(ToyContrast().deployable())


def test_half_precision(tmp_path: Path) -> None:
    samples = toy_samples("classification")
    for name, precision in (("a", "no"), ("b", "bf16"), ("c", "bf16")):
        recipe = toy_recipe(train={"precision": precision, "steps": 6})
        train(recipe, tmp_path / name, samples=samples, progress=False, stop_after=3 if name == "c" else None)
    train(recipe, tmp_path / "c", samples=samples, progress=False)
    assert not _same(tmp_path / "a", tmp_path / "b"), "bf16 changed nothing"
    assert _same(tmp_path / "b", tmp_path / "c"), "bf16 does not resume bit for bit"
    assert {v.dtype for k, v in load_file(tmp_path / "b" / "model.safetensors").items()} == {torch.float32, torch.int64}
    train(toy_recipe(), tmp_path / "d", samples=samples, progress=False)  # another precision in the same process
    with pytest.raises(RecipeError, match=r"train\.precision=fp16"):
        train(toy_recipe(train={"precision": "fp16", "cpu": True}), tmp_path / "e", samples=samples, progress=False)


def test_a_budget_in_seconds(tmp_path: Path) -> None:
    result = train(
        toy_recipe(train={"seconds": 0.5, "steps": 1}),
        tmp_path,
        samples=toy_samples("classification"),
        progress=False,
    )
    assert result.steps > 3
    assert 0.5 <= result.seconds < 5


def test_given_initial_values_are_used_where_they_fit(tmp_path: Path) -> None:
    recipe, samples = toy_recipe(train={"steps": 1, "clip_norm": None}), toy_samples("classification")
    model = build_trainable(recipe, samples["train"])
    initial = {
        "network.last.weight": torch.full((2, 8), 7.0),
        "network.first.bias": torch.zeros(3),
        "stranger": torch.ones(1),
    }
    train(recipe, tmp_path, samples=samples, progress=False, initial=initial)
    after = load_file(tmp_path / "last.safetensors")
    assert (after["model.network.last.weight"] - 7).abs().max() < 0.1
    assert (after["model.network.first.bias"] - model.state_dict()["network.first.bias"]).abs().max() < 0.1


@pytest.mark.parametrize("name", ["cosine", "constant", "step"])
def test_schedules(name: str) -> None:
    schedule = ScheduleSpec(name=name, warmup=0.1, final=0.2)  # type: ignore[arg-type]
    assert schedule.factor(0.05) == pytest.approx(0.5)
    assert schedule.factor(0.1) == pytest.approx(1.0)
    assert schedule.factor(1.0) == pytest.approx({"cosine": 0.2, "constant": 1.0, "step": 0.01}[name])


def test_optimisers_over_the_parameters_that_are_trained() -> None:
    recipe, samples = toy_recipe(), ToySet("classification")
    model = build_trainable(recipe, samples)
    model.network.first.weight.requires_grad_(False)
    optimizer = build_optimizer(recipe, model.parameters())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters())) - 1
    assert model.network.first.in_channels == 1
    assert model.network.last.out_features == 2


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``start(folder, steps=60, workers=0)`` trains in a process of its own, forked from a server that imported all."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.engine.toys", "torchive.engine.train", "torch.utils.tensorboard", "accelerate"]
    )

    def begin(out: Path, steps: int = 60, workers: int = 0) -> Any:
        process = context.Process(target=train_toy, args=(str(out), steps, workers))
        process.start()
        return process

    return begin


def _wait_for(path: Path, process: Any) -> None:
    limit = time.monotonic() + 120
    while not path.exists() and process.is_alive() and time.monotonic() < limit:
        time.sleep(0.005)


def _float(sample: Sample) -> Sample:
    return Sample(sample.image.float() / 255, sample.target, sample.id)


def _end(process: Any) -> int | None:
    process.join(120)
    return process.exitcode


def test_a_run_killed_three_times_ends_where_an_uninterrupted_one_does(tmp_path: Path, start: Any) -> None:
    assert _end(start(tmp_path / "whole")) == 0
    draws = random.Random(0)
    for _ in range(3):
        process = start(tmp_path / "killed")
        _wait_for(tmp_path / "killed" / "last.safetensors", process)
        time.sleep(draws.uniform(0.0, 0.3))
        process.kill()
        _end(process)
    assert _end(start(tmp_path / "killed")) == 0
    assert _same(tmp_path / "whole", tmp_path / "killed")
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in lines if record["kind"] == "train"]
    assert steps == sorted(set(steps)), "a record stands twice"


def test_ctrl_c_ends_with_a_checkpoint(tmp_path: Path, start: Any) -> None:
    process = start(tmp_path, 100_000)
    _wait_for(tmp_path / "last.safetensors", process)
    before = load_checkpoint(tmp_path / "last.safetensors").values["step"]
    os.kill(process.pid, signal.SIGINT)
    assert _end(process) == 130
    assert load_checkpoint(tmp_path / "last.safetensors").values["step"] >= before


def test_a_kill_that_reaches_the_workers_first_ends_with_a_checkpoint(tmp_path: Path, start: Any) -> None:
    process = start(tmp_path, 100_000, workers=1)
    _wait_for(tmp_path / "last.safetensors", process)
    before = load_checkpoint(tmp_path / "last.safetensors").values["step"]
    workers = psutil.Process(process.pid).children()
    assert workers
    for worker in workers:
        worker.terminate()
    time.sleep(0.3)  # time for the training to miss them
    assert process.is_alive()
    process.terminate()
    assert _end(process) == 130
    assert load_checkpoint(tmp_path / "last.safetensors").values["step"] >= before
    assert not any(worker.is_running() for worker in workers)
