"""The folder of a run: recipe, environment, records, checkpoints, pictures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from torchive.data.samples import SampleSet
from torchive.engine.build import build_model
from torchive.engine.checkpoint import CheckpointError, load_checkpoint, load_weights, write_atomically
from torchive.engine.recipe import Recipe, RecipeError, resolve_recipe
from torchive.engine.resolve import read_yaml

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "torchmetrics", "numpy", "safetensors", "pillow")


class RunFolder:
    """Where one run keeps what it wrote. Only one process writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.last, self.best = self.path / "last.safetensors", self.path / "best.safetensors"
        self.model, self.pictures = self.path / "model.safetensors", self.path / "pictures"
        self.result = self.path / "result.json"
        self.records = self.path / "metrics.jsonl"
        self._events: Any = None

    def begin(self, recipe: Recipe, *, resume: bool) -> bool:
        """Prepare the folder; True where a checkpoint of this recipe waits to be continued.

        Raises:
            RecipeError: the folder holds a run of another recipe, or files that no run wrote.
            CheckpointError: the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be made: {error.strerror}") from error
        known = self.path / "recipe.yaml"
        own = (self.last, self.best, self.model, self.result, self.records)
        strange = [path.name for path in own if path.exists() and not known.exists()]
        if strange:
            raise RecipeError(
                f"{self.path}: holds {strange[0]} but no recipe.yaml, so no run wrote it; choose another folder"
            )
        for path in (*own, known):
            for stale in self.path.glob(f".{path.name}.*.tmp"):
                stale.unlink(missing_ok=True)
        if not resume:
            self._clear()
        if known.exists() and self.last.exists():
            before = resolve_recipe(read_yaml(known), where=str(known))
            if before.fingerprint() != recipe.fingerprint():
                raise RecipeError(
                    f"{self.path}: holds a run of another recipe (it differs in {_difference(before, recipe)}); "
                    "choose another folder (--out), or start again (--fresh)"
                )
        write_atomically(known, recipe.to_yaml().encode())
        return self.last.exists()

    def _clear(self) -> None:
        for path in (*self.path.glob("events.out.*"), self.last, self.best, self.model, self.result, self.records):
            path.unlink(missing_ok=True)

    def cut_records(self, step: int) -> None:
        """Drop the records of later steps than the checkpoint's, and a line that was torn."""
        write_atomically(
            self.records, "".join(f"{json.dumps(r)}\n" for r in self.history() if r["step"] <= step).encode()
        )

    def history(self) -> list[dict[str, Any]]:
        """All records of the run, in order."""
        if not self.records.exists():
            return []
        records = []
        for line in self.records.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # the last line of a killed run
                break
        return records

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``, and the same values to TensorBoard's events."""
        try:
            with open(self.records, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.records}: cannot be written: {error.strerror or error}") from error
        try:
            self._write_events(kind, step, values)
        except Exception:  # events are a courtesy; they never end a run
            self._events = False

    def _write_events(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path))
        if self._events:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close the events."""
        try:
            if self._events:
                self._events.close()
        except Exception:  # as above
            pass
        self._events = None

    def write_environment(self, samples: Mapping[str, SampleSet], threads: int, device: str) -> None:
        """``environment.json``: versions, machine, commit, and the data with their licence."""
        write_atomically(
            self.path / "environment.json", json.dumps(environment(samples, threads, device), indent=1).encode()
        )


def environment(samples: Mapping[str, SampleSet], threads: int, device: str) -> dict[str, Any]:
    """Versions, machine, commit, and the data with their licence and what was left out of them."""
    first = next(iter(samples.values()))
    return {
        "torchive": _version("torchive"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "data": {
            "name": first.name,
            "task": first.task,
            "classes": list(first.classes),
            "channels": first.channels,
            "licence": first.licence,
            "origin": first.origin,
            "samples": {split: len(s) for split, s in samples.items()},
            "left_out": list(dict.fromkeys(str(fault) for s in samples.values() for fault in s.left_out)),
        },
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """The commit of the source tree where there is one."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _difference(one: Recipe, other: Recipe) -> str:
    a, b = _leaves(one.to_dict()), _leaves(other.to_dict())
    return ", ".join([key for key in {**a, **b} if a.get(key) != b.get(key)][:4]) or "its fields"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result.update(_leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


@dataclass(frozen=True)
class LoadedRun:
    """A trained run: the resolved recipe, the deployable model in eval mode, the names of the classes and of what
    follows them in maps of the whole image, the channels."""

    recipe: Recipe
    model: nn.Module
    classes: tuple[str, ...]
    channels: int
    source: Path
    stuff: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all categories from 1 on."""
        return (*self.classes, *self.stuff)


def open_run(run: Path) -> LoadedRun:
    """Load a run folder, or one of its ``.safetensors`` files.

    Raises:
        CheckpointError: nothing is there, or the file does not fit its recipe.
    """
    run = Path(run)
    path = run
    if run.is_dir():
        path = run / "model.safetensors"
        if not path.exists():
            path = run / "last.safetensors"
    if not path.exists():
        raise CheckpointError(f"{run}: no trained run is here (no model.safetensors)")
    checkpoint = load_checkpoint(path)
    values = checkpoint.values
    if not isinstance(values.get("recipe"), dict) or not {"classes", "channels"} <= values.keys():
        raise CheckpointError(f"{path}: not written by a training run: it holds no recipe")
    recipe = resolve_recipe(checkpoint.values["recipe"], where=str(path))
    model = build_model(recipe)
    if checkpoint.values.get("deployable"):
        model = deployable_of(model)
        load_weights(model, checkpoint.part("model"), path)
    else:
        load_weights(model, checkpoint.part("model"), path)
        model = deployable_of(model)
    classes, stuff = (tuple(values.get(key, ())) for key in ("classes", "stuff"))
    return LoadedRun(recipe, model.eval(), classes, values["channels"], path, stuff)


def load_run(run: Path) -> tuple[Recipe, nn.Module]:
    """The resolved recipe of a run and its trained model in eval mode. Raises CheckpointError."""
    loaded = open_run(run)
    return loaded.recipe, loaded.model


def deployable_of(model: nn.Module) -> nn.Module:
    """The model to keep: a procedure's ``deployable()``, else the model itself."""
    return model.deployable() if hasattr(model, "deployable") else model  # type: ignore[operator]
