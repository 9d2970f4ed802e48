"""One folder with data of every format and stopped runs on them, copied for each test; the command line in process."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchive.cli import main
from torchive.engine.recipe import load_recipe
from torchive.engine.train import train

from . import shapes

SMALL = """
task: classification
model: {class_path: torchive.nn.Classifier, init_args: {network: {class_path: tests.engine.toys.TinyNet}}}
data: {source: folder, image_size: 16, batch_size: 4}
train: {steps: 6, evaluate_every: 0, checkpoint_every: 2, log_every: 1}
"""
DENSE = SMALL.replace("task: classification", "task: segmentation").replace("TinyNet", "TinyDense")
DENSE = DENSE.replace("torchive.nn.Classifier", "torchive.nn.Segmenter").replace("source: folder", "source: masks")
#: format -> (recipe, source); every one has a run in ``runs/FORMAT``, stopped after two of six steps.
ROADS = {
    "folder": ("small.yaml", "folder"),
    "csv": ("small.yaml", "csv/table.csv"),
    "coco": ("dense.yaml", "coco/annotations.json"),
    "masks": ("dense.yaml", "masks"),
    "voc": ("ssd", "voc"),
}
SSD = ["data.image_size=64", "model.image_size=64", "model.backbone=timm/resnet10t", "data.batch_size=4"]
SSD += ["train.steps=6", "train.evaluate_every=0", "data.workers=0"]


def overrides(kind: str) -> list[str]:
    """The words that make a recipe small."""
    return SSD if ROADS[kind][0] == "ssd" else []


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


def assert_refused(ended: Ended, *parts: str) -> None:
    """Exit status 2 and one line on stderr that names file and reason."""
    assert ended.status == 2, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("torchive: ")
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def fingerprint(*folders: Path) -> dict[str, str]:
    """A hash of every file."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that every test gets a copy of."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "small.yaml").write_text(SMALL)
    (root / "dense.yaml").write_text(DENSE)
    for kind, draw in shapes.FORMATS.items():
        draw(root / kind)
    before, cache = Path.cwd(), os.environ.get("TORCHIVE_CACHE")
    os.environ["TORCHIVE_CACHE"] = str(root / "cache")
    os.chdir(root)
    try:
        for kind, (recipe, source) in ROADS.items():
            read = load_recipe(recipe, [f"data.source={source}", *overrides(kind)])
            assert train(read, Path("runs") / kind, progress=False, stop_after=2).interrupted
    finally:
        os.chdir(before)
        os.environ.pop("TORCHIVE_CACHE")
        if cache is not None:
            os.environ["TORCHIVE_CACHE"] = cache
    shutil.rmtree(root / "cache")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with data, recipes and stopped runs, and an empty cache."""
    root = tmp_path / "place"
    shutil.copytree(prepared, root, symlinks=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("TORCHIVE_CACHE", str(tmp_path / "cache"))
    return root


@pytest.fixture
def torchive(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``torchive("train", "small.yaml")`` runs the command line in this process."""
    monkeypatch.delenv("TORCHIVE_DEBUG", raising=False)

    def run(*words: str | Path) -> Ended:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as ended:  # the parser's own refusals
            status = int(ended.code or 0)
        told = capsys.readouterr()
        return Ended(status, told.out, told.err)

    return run


@pytest.fixture
def continued(torchive: Run, place: Path) -> Run:
    """``continued("coco")`` goes on with the stopped run on that format."""

    def run(kind: str, *words: str) -> Ended:
        recipe, source = ROADS[kind]
        return torchive("train", recipe, "--data", source, "--out", f"runs/{kind}", "--quiet", *words, *overrides(kind))

    return run
