"""Checkpoints, run folders and recipes that are damaged, foreign or hostile; a disk that fills up."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from torchive.engine import checkpoint

from .conftest import Run, assert_refused, assert_same, fingerprint

ROOT = Path(__file__).parents[2]
RUN = Path("runs/folder")
LAST = RUN / "last.safetensors"


class Payload:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("marker", "w"))


def test_the_payload_works(place: Path) -> None:
    pickle.loads(pickle.dumps(Payload()))
    assert Path("marker").exists()


def _zipped(path: Path) -> None:
    torch.save({"weight": torch.ones(2), "other": Payload()}, path)


def _zip_with_code(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
        archive.writestr("archive/version", "3")


PICKLES: dict[str, Callable[[Path], Any]] = {
    **{f"protocol {n}": lambda path, n=n: path.write_bytes(pickle.dumps(Payload(), n)) for n in range(6)},
    "torch": _zipped,
    "torch, the old way": lambda path: torch.save(Payload(), path, _use_new_zipfile_serialization=False),
    "zip": _zip_with_code,
}


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.safetensors", "model.safetensors"])
@pytest.mark.parametrize("how", PICKLES)
def test_a_pickle_never_runs(how: str, name: str, place: Path, torchive: Run) -> None:
    file = Path("evil") / name
    file.parent.mkdir()
    PICKLES[how](file)
    given = file.parent if name == "model.safetensors" else file
    Path("marker").unlink(missing_ok=True)
    for words in (("predict", given, "folder"), ("evaluate", given), ("export", given)):
        assert_refused(torchive(*words), str(file))
    PICKLES[how](LAST)
    Path("marker").unlink(missing_ok=True)
    assert_refused(torchive("train", "small.yaml", "--out", RUN, "--quiet"), str(LAST))
    assert not Path("marker").exists(), "the pickle ran"
    assert not Path("predictions").exists()


def test_a_checkpoint_cannot_start_a_program(place: Path, torchive: Run) -> None:
    """A recipe within a checkpoint may nest classes; one that starts a program is refused before it is made."""
    program = place / "program.sh"
    program.write_text("#!/bin/sh\ntouch marker\n")
    program.chmod(0o755)
    evil = {"class_path": "subprocess.Popen", "init_args": {"args": str(program)}}
    model = {"class_path": "torch.nn.Transformer", "init_args": {"custom_encoder": evil}}
    _values(lambda v: v.update(recipe=json.dumps({**json.loads(v["recipe"]), "model": model})))(LAST)
    assert_refused(torchive("predict", LAST, "folder"), "subprocess.Popen is no torch.nn.Module")
    assert not Path("marker").exists()


def _values(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        with safe_open(path, "pt") as source:
            values = dict(source.metadata())
        change(values)
        save_file(load_file(path), path, values)

    return damage


def _reshaped(path: Path) -> None:
    with safe_open(path, "pt") as source:
        values = source.metadata()
    tensors = load_file(path)
    tensors["model.network.last.weight"] = torch.ones(9, 9)
    del tensors["model.network.first.bias"]
    save_file(tensors, path, values)


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "empty": (lambda path: path.write_bytes(b""), ["truncated or no safetensors file"]),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-50]), ["truncated or no safetensors file"]),
    "text": (lambda path: path.write_text("weights"), ["truncated or no safetensors file"]),
    "of another model": (_reshaped, ["another model", "network.last.weight is (9, 9)", "first.bias is missing"]),
    "of another library": (lambda path: save_file({"w": torch.ones(1)}, path), []),
    "without values": (_values(lambda v: [v.pop(key) for key in list(v) if key != "format"]), []),
    "with broken values": (_values(lambda v: v.update(recipe="{")), []),
    "with nested values": (_values(lambda v: v.update(recipe="[" * 100_000)), []),
    "with a recipe that is none": (_values(lambda v: v.update(recipe="[1, 2]")), []),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), []),
}


@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpoints_that_cannot_be_used(how: str, place: Path, torchive: Run) -> None:
    damage, parts = CHECKPOINTS[how]
    damage(LAST)
    before = fingerprint(RUN)
    assert_refused(torchive("predict", LAST, "folder"), str(LAST), *parts)
    assert_refused(torchive("evaluate", LAST), str(LAST), *parts)
    if "recipe" not in how and "broken" not in how and "nested" not in how:  # the run itself keeps its recipe in a file
        assert_refused(torchive("train", "small.yaml", "--out", RUN, "--quiet"), str(LAST), *parts)
    assert {name: value for name, value in fingerprint(RUN).items() if name in before} == before


def test_a_run_of_another_recipe_stays(place: Path, torchive: Run) -> None:
    before = fingerprint(RUN)
    told = torchive("train", "small.yaml", "train.seed=1", "--out", RUN, "--quiet")
    assert_refused(told, str(RUN), "train.seed", "--out", "--fresh")
    assert fingerprint(RUN) == before


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_whose_samples_changed_is_not_taken_up_silently(finished: bool, place: Path, torchive: Run) -> None:
    words = ("train", "small.yaml", "--out", RUN, "--quiet")
    if finished:
        assert torchive(*words).status == 0
    before = fingerprint(RUN)
    for number in range(20):
        shutil.copy("folder/circle/000.png", f"folder/circle/new{number}.png")
    assert_refused(torchive(*words), str(RUN), "other samples", "--fresh")
    assert fingerprint(RUN) == before
    assert torchive(*words, "--fresh").status == 0


def test_a_broken_result_and_torn_records(place: Path, torchive: Run) -> None:
    words = ("train", "small.yaml", "--out", RUN, "--quiet")
    with open(RUN / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    assert torchive(*words).status == 0
    steps = [json.loads(line)["step"] for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 6]
    (RUN / "result.json").write_text("{")
    assert_refused(torchive(*words), str(RUN / "result.json"), "--fresh")


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "result.json"])
def test_a_folder_that_no_run_wrote_is_left_alone(name: str, fresh: bool, place: Path, torchive: Run) -> None:
    Path("mine").mkdir()
    Path("mine", name).write_text("precious")
    Path("mine", ".notes.tmp").write_text("precious")
    before = fingerprint(Path("mine"))
    words = ["train", "small.yaml", "--out", "mine", "--quiet", *(["--fresh"] if fresh else [])]
    assert_refused(torchive(*words), "mine", name)
    assert fingerprint(Path("mine")) == before


def test_predictions_never_replace_pictures(place: Path, torchive: Run) -> None:
    before = fingerprint(Path("folder"))
    told = torchive("predict", RUN, "folder/circle", "--out", "folder/circle")
    assert_refused(told, "folder/circle", "choose an empty or new folder")
    assert fingerprint(Path("folder")) == before
    for _ in range(2):  # again into its own folder, which lies below the source and is no source itself
        assert torchive("predict", RUN, "folder/circle", "--out", "folder/circle/predictions").status == 0
        assert len(json.loads(Path("folder/circle/predictions/predictions.json").read_text())["predictions"]) == 8


@pytest.mark.parametrize("moment", range(1, 6))
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_during_a_checkpoint(
    call: str, moment: int, place: Path, torchive: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever write the disk is full: one line, the last checkpoint is whole, and the run goes on from it."""
    assert torchive("train", "small.yaml", "--out", RUN, "--quiet").status == 0
    whole = load_file(RUN / "model.safetensors")
    words = ("train", "small.yaml", "--out", "runs/new", "--quiet", "train.checkpoint_every=1")
    countdown = [moment]

    def full(name: str) -> None:
        countdown[0] -= "safetensors" in name
        if countdown[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real_open, real_fsync, real_replace = open, os.fsync, os.replace
    if call == "write":
        monkeypatch.setattr(
            checkpoint, "open", lambda name, *a: (full(str(name)), real_open(name, *a))[1], raising=False
        )
    elif call == "fsync":
        names: dict[int, str] = {}

        def opened(name: Any, *options: Any) -> Any:
            file = real_open(name, *options)
            names[file.fileno()] = str(name)
            return file

        monkeypatch.setattr(checkpoint, "open", opened, raising=False)
        monkeypatch.setattr(os, "fsync", lambda number: (full(names.pop(number, "")), real_fsync(number))[1])
    else:
        monkeypatch.setattr(os, "replace", lambda old, new: (full(str(new)), real_replace(old, new))[1])
    told = torchive(*words)
    assert_refused(told, "runs/new", os.strerror(errno.ENOSPC))
    assert not list(Path("runs/new").glob(".*.tmp"))
    monkeypatch.undo()
    monkeypatch.chdir(place)
    if moment > 1:
        assert checkpoint.load_checkpoint(Path("runs/new/last.safetensors")).values["step"] == moment - 1
        assert "intact" in told.err
    assert torchive(*words).status == 0
    assert_same(load_file("runs/new/model.safetensors"), whole)


def test_a_full_disk_during_a_record(place: Path, torchive: Run) -> None:
    (RUN / "metrics.jsonl").unlink()
    (RUN / "metrics.jsonl").mkdir()  # any write into it fails
    before = fingerprint(RUN)
    assert_refused(torchive("train", "small.yaml", "--out", RUN, "--quiet"), str(RUN / "metrics.jsonl"))
    assert fingerprint(RUN)[str(LAST)] == before[str(LAST)]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_limit_on_the_size_of_files(share: float, place: Path) -> None:
    """The system's own refusal in a process of its own, as under a quota."""
    limit = int(LAST.stat().st_size * share)
    program = (
        "import resource, sys; limit = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2)"
    )
    program += "; from torchive.cli import main; sys.exit(main(sys.argv[1:]))"
    before = fingerprint(RUN)[str(LAST)]
    command = [sys.executable, "-c", program, str(limit), "train", "small.yaml", "--out", str(RUN), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"torchive: {LAST}: cannot be written")
    assert "intact" in line
    assert fingerprint(RUN)[str(LAST)] == before


RECIPES: dict[str, tuple[str, list[str]]] = {
    "unknown key": ("task: classification\nmodle: a\n", ["unknown key 'modle'", "did you mean 'model'?"]),
    "unknown argument": (
        "task: classification\nmodel: {class_path: torchive.nn.Classifier, init_args: {netwrk: a}}\n",
        ["unknown key 'netwrk'", "did you mean 'network'?"],
    ),
    "no mapping": ("- a\n- b\n", ["a recipe is a mapping"]),
    "empty": ("", ["a recipe is a mapping"]),
    "broken": ("task: [a\n", ["broken YAML", "line 2"]),
    "deep": ("[" * 5000, ["nested too deeply"]),
    "code": ("a: !!python/object/apply:os.mkdir [marker]\n", ["broken YAML"]),
    "aliases": ("a: &a [x, x]\nb: &b [*a, *a]\n", ["aliases"]),
    "a program": (
        "task: classification\nmodel: {class_path: torch.nn.Transformer, init_args: {custom_encoder: "
        "{class_path: os.mkdir, init_args: {}}}}\n",
        ["os.mkdir", "no class"],
    ),
    "a model that is none": ("task: classification\nmodel: {class_path: pathlib.Path}\n", ["pathlib.Path"]),
}


@pytest.mark.parametrize("how", RECIPES)
def test_faulty_recipes(how: str, place: Path, torchive: Run) -> None:
    text, parts = RECIPES[how]
    Path("bad.yaml").write_text(text)
    before = fingerprint(Path("runs"))
    assert_refused(torchive("train", "bad.yaml", "--data", "folder", "--out", RUN), "bad.yaml", *parts)
    assert fingerprint(Path("runs")) == before
    assert not Path("marker").exists()


NAMES = {
    ("train", "solr"): "did you mean solar",
    ("train", "folder"): "--data",
    ("train", "nowhere.yaml"): "nowhere.yaml: no such file",
    ("train", "small.yaml", "trian.steps=3"): "did you mean 'train'?",
    ("train", "small.yaml", "train.step=3"): "did you mean 'train.steps'?",
    ("train", "small.yaml", "train.steps=many"): "many",
    ("train", "small.yaml", "train.steps=0"): "out of range",
    ("train", "small.yaml", "metric=acuracy"): "did you mean 'accuracy'?",
    ("train", "small.yaml", "model.network=timm/resnt18"): "did you mean timm/resne",
    ("train", "small.yaml", "data.augment=[flp]"): "did you mean 'flip'?",
    ("train", "small.yaml", "convert=[{method: gcnett}]"): "did you mean gcnet",
    ("train", "small.yaml", "--data", "voc"): "recipes for detection: ",
    ("compare", "gcnt", "--data", "folder"): "did you mean gcnet",
    ("compare", "gcnet", "--data", "folder", "--seeds", "2"): "at least 3",
    ("compare", "gcnet", "--data", "folder", "--budget", "3 x"): "budget",
    ("bench", "gcnt"): "did you mean gcnet",
    ("show", "gcnt"): "did you mean gcnet",
    ("data", "get", "solr"): "did you mean solar?",
    ("data", "check", "solr"): "did you mean solar?",
    ("evaluate", "nowhere"): "no trained run",
    ("predict", "nowhere", "folder"): "no trained run",
    ("export", "nowhere"): "no trained run",
    ("predict", "runs/folder", "nowhere.png", "--out", "p"): "nowhere.png: no such file",
    ("predict", "runs/folder", "*.tiff", "--out", "p"): "*.tiff: no images or videos found",
    ("train", "small.yaml", "--out", "small.yaml/run"): "small.yaml/run",
}


@pytest.mark.parametrize("words", NAMES, ids=" ".join)
def test_wrong_names_are_told_with_what_was_meant(words: tuple[str, ...], place: Path, torchive: Run) -> None:
    before = fingerprint(Path("runs"))
    ended = torchive(
        *words, *(["--out", "runs/new"] if words[0] in ("train", "compare") and "--out" not in words else [])
    )
    assert_refused(ended, NAMES[words])
    assert {k: v for k, v in fingerprint(Path("runs")).items() if k in before} == before


@pytest.mark.parametrize(("word", "meant"), [("shwo", "show"), ("comapre", "compare"), ("data gte", "get")])
def test_a_mistyped_verb_is_told_with_what_was_meant(word: str, meant: str, place: Path, torchive: Run) -> None:
    ended = torchive(*word.split(), "x")
    assert ended.status == 2
    assert f"did you mean {meant}?" in ended.err.splitlines()[-1]
