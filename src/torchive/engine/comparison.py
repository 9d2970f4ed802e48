"""A comparison on disk: its plan, fixed before anything is trained, and its raw records."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchive.catalogue import get_card
from torchive.data.samples import SampleSet
from torchive.engine.arms import Arm, ComparisonError, budget_text
from torchive.engine.checkpoint import write_atomically
from torchive.engine.recipe import Recipe
from torchive.report.statistics import Rule
from torchive.report.summary import SCHEMA, Summary, summarise
from torchive.report.units import duration, unit_of

PLAN, RECORDS, REPORT = "plan.json", "comparison.json", "report.html"


@dataclass(frozen=True)
class Comparison:
    """A finished comparison. Printing it shows the table and the report's path.

    Attributes:
        folder: plan, records, runs and report.
        record: the content of ``comparison.json``.
    """

    folder: Path
    record: dict[str, Any]

    @property
    def summary(self) -> Summary:
        """Estimates, verdict, costs, and the answer in one sentence."""
        return summarise(self.record)

    @property
    def verdict(self) -> str:
        """ "better", "worse", "cannot tell" or "identical"."""
        return self.summary.verdict

    @property
    def report(self) -> Path:
        """The HTML file."""
        return self.folder / REPORT

    def write_report(self) -> Path:
        """Make the report again from the records."""
        from torchive.report import render_report

        return render_report(self.folder)

    def __str__(self) -> str:
        from torchive.report.terminal import comparison_text

        return comparison_text(self.record, self.report)


def plan_of(
    method: str,
    arms: Sequence[Arm],
    recipes: Mapping[str, Recipe],
    rule: Rule,
    seeds: Sequence[int],
    samples: Mapping[str, SampleSet],
    *,
    command: str,
    setting: str = "",
) -> dict[str, Any]:
    """Everything that is fixed before the first run, the rule among it."""
    from torchive import __version__

    cards = [get_card(name) for name in method.split("+")]
    first = recipes["baseline"]
    return {
        "schema": SCHEMA,
        "method": "+".join(card.name for card in cards),
        "title": arms[1].title,
        "baseline_title": arms[0].title,
        "citation": "; ".join(card.paper.citation for card in cards),
        "claim": " / ".join(card.claim for card in cards),
        "task": first.task,
        "recipe": first.name,
        "setting": setting,
        "seeds": list(seeds),
        "budget": budget_text(first),
        "rule": {
            "metric": rule.metric,
            "higher_is_better": rule.higher_is_better,
            "margin": rule.margin,
            "level": rule.level,
            "pairs": rule.pairs,
            "text": rule.text,
        },
        "arms": {name: {"recipe": recipe.to_dict()} for name, recipe in recipes.items()},
        "samples": {split: {"count": len(s), "sha256": _ids_hash(s)} for split, s in samples.items()},
        "version": __version__,
        "command": command,
    }


def _ids_hash(samples: SampleSet) -> str:
    return hashlib.sha256("\n".join(samples.ids).encode()).hexdigest()


def settings_of(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan must not change under one folder: all but the wording, and what the results do not depend on."""
    kept = {k: plan[k] for k in ("schema", "method", "task", "setting", "seeds", "rule", "samples")}
    kept["arms"] = json.loads(json.dumps(plan["arms"]))
    for arm in kept["arms"].values():
        arm["recipe"]["data"].pop("workers")
        arm["recipe"].pop("name")
    return kept


class Store:
    """The folder of a comparison. ``open`` refuses a folder of other settings."""

    def __init__(self, folder: Path, plan: dict[str, Any], record: dict[str, Any]) -> None:
        self.folder, self.plan, self.record = folder, plan, record

    @classmethod
    def open(cls, folder: Path | None, plan: dict[str, Any], *, resume: bool) -> Store:
        """Begin or continue; ``resume=False`` begins again.

        Raises:
            ComparisonError: the folder holds a comparison with other settings, or records that cannot be read.
        """
        if folder is None:
            text = json.dumps(settings_of(plan), sort_keys=True)
            folder = Path("runs") / f"compare-{plan['method']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        known = folder / PLAN
        if not resume and known.exists():
            shutil.rmtree(folder / "runs", ignore_errors=True)
            for name in (PLAN, RECORDS, REPORT):
                (folder / name).unlink(missing_ok=True)
        if known.exists():
            before = _read(known)
            differing = _differences(settings_of(before), settings_of(plan))
            if differing:
                raise ComparisonError(
                    f"{folder}: holds a comparison with other settings ({', '.join(differing[:4])}); "
                    "choose another folder, or start afresh"
                )
            record = _read(folder / RECORDS) if (folder / RECORDS).exists() else _empty(before)
            return cls(folder, before, record)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(known, json.dumps(plan, indent=1, ensure_ascii=False).encode())
        return cls(folder, plan, _empty(plan))

    def start(self, data: dict[str, Any], environment: dict[str, Any]) -> None:
        """Note the data and the machine."""
        self.record.setdefault("started", timestamp())
        self.record["data"] = data
        self.record.setdefault("environment", environment)
        self._write()

    def run_folder(self, seed: int, arm: str) -> Path:
        """Where a run trains."""
        return self.folder / "runs" / f"seed{seed}-{arm}"

    def relative(self, path: Path) -> str:
        """A path inside the folder."""
        return path.relative_to(self.folder).as_posix()

    def has_run(self, seed: int, arm: str) -> bool:
        """Whether a run is finished, tested and recorded."""
        return any(run["seed"] == seed and run["arm"] == arm for run in self.record["runs"])

    def add_pair(self, seed: int, values: dict[str, Any]) -> None:
        """Note how a pair starts.

        Raises:
            ComparisonError: it was begun from other values, so that the rest of it would not be a pair.
        """
        for pair in self.record["pairs"]:
            if pair["seed"] == seed:
                if pair["shared"]["sha256"] != values["shared"]["sha256"]:
                    raise ComparisonError(f"{self.folder}: seed {seed} was begun from other starting values")
                return
        self.record["pairs"].append({"seed": seed, **values})
        self._write()

    def add_run(self, run: dict[str, Any]) -> None:
        """Keep a run's record."""
        self.record["runs"].append(run)
        self._write()

    def take_baseline(self, known: Comparison, seed: int) -> bool:
        """Take over another comparison's baseline run of this seed if it is the same run: same recipe, same start."""
        mine, theirs = self.plan, known.record["plan"]
        same = all(settings_of(mine)[key] == settings_of(theirs)[key] for key in ("schema", "task", "rule", "samples"))
        recipes = [settings_of(plan)["arms"]["baseline"] for plan in (mine, theirs)]
        starts = [
            pair.get("start", {}).get("baseline")
            for record in (self.record, known.record)
            for pair in record["pairs"]
            if pair["seed"] == seed
        ]
        run = next((r for r in known.record["runs"] if (r["seed"], r["arm"]) == (seed, "baseline")), None)
        if (
            run is None
            or not same
            or recipes[0] != recipes[1]
            or len(starts) != 2
            or starts[0] is None
            or starts[0] != starts[1]
        ):
            return False
        shutil.copytree(known.folder / run["folder"], self.run_folder(seed, "baseline"), dirs_exist_ok=True)
        self.add_run({**run, "folder": self.relative(self.run_folder(seed, "baseline"))})
        return True

    def tidy(self, run: Path) -> None:
        """Of a recorded run keep the deployable model; what it would need to train on takes five times the room."""
        for name in ("last.safetensors", "best.safetensors"):
            (run / name).unlink(missing_ok=True)

    def put(self, key: str, value: Any) -> None:
        """Keep another part of the record."""
        self.record[key] = value
        self._write()

    def finish(self) -> None:
        """Note when the last part was there."""
        self.record.setdefault("finished", timestamp())
        self._write()

    def _write(self) -> None:
        write_atomically(self.folder / RECORDS, json.dumps(self.record, ensure_ascii=False).encode())


def _empty(plan: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": "comparison", "plan": plan, "pairs": [], "runs": []}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ComparisonError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise ComparisonError(f"{path}: not a record of this version")
    return values


def _differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [
            d for key in keys for d in _differences(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if one == other else [prefix]


def data_record(recipe: Recipe, samples: Mapping[str, SampleSet]) -> dict[str, Any]:
    """Source, classes, licence, sizes, and what was left out."""
    from torchive.data import SAMPLE_SETS

    first = samples["train"]
    info = SAMPLE_SETS.get(first.name)
    return {
        "source": recipe.data.source,
        "name": first.name if info else _place_of(first.name),
        "task": first.task,
        "classes": list(first.classes),
        "licence": first.licence,
        "commercial": info.commercial if info else None,
        "origin": first.origin,
        "sizes": {split: len(s) for split, s in samples.items()},
        "left_out": [
            {"split": split, "id": fault.sample or fault.file, "reason": str(fault)}
            for split, s in samples.items()
            for fault in s.left_out
        ],
    }


def _place_of(source: str) -> str:
    """What people call a source of files: its folder; of annotations beside images, the folder of the annotations."""
    path, images, _ = source.rpartition(":")[2].partition(",")
    if not images:
        return Path(path).name or source
    above = [part for part in Path(path).parts[:-1] if part not in ("annotations", "..", "/")]
    return above[-1] if above else Path(path).stem


def environment_record(samples: Mapping[str, SampleSet], recipe: Recipe) -> dict[str, Any]:
    """Machine and versions, with labels for people."""
    import torch

    from torchive.engine.run import environment

    cuda = torch.cuda.is_available() and not recipe.train.cpu
    device = torch.cuda.get_device_name() if cuda else "CPU"
    values = environment(samples, torch.get_num_threads(), device)
    versions = ", ".join(f"{name} {version}" for name, version in values["packages"].items() if version)
    return {
        "Processor": f"{values['cpu']}, {values['cores']} cores, threads used: {values['threads']}",
        "Device": device,
        "System": values["platform"],
        "Torchive": f"{values['torchive']}" + (f", commit {values['commit'][:12]}" if values["commit"] else ""),
        "Python": f"{values['python']}, {versions}",
    }


class Narrator:
    """A line for each finished run, with the time left."""

    def __init__(self, folder: Path, plan: Mapping[str, Any], *, total: int, shown: bool) -> None:
        self.total, self.shown, self.done = total, shown, 0
        self.unit = unit_of(plan["rule"]["metric"])
        self.start = time.monotonic()
        done = _runs_in(folder)
        self.left = total - done
        if shown:
            again = f", {done} done before" if done else ""
            self.say(f"{plan['title']} against {plan['baseline_title']}: {total} runs of {plan['budget']}{again}")
            self.say(plan["rule"]["text"])

    @property
    def on_terminal(self) -> bool:
        """Whether bars make sense."""
        return self.shown and sys.stderr.isatty()

    def say(self, text: str) -> None:
        """One line on stderr."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)

    def taken(self) -> None:
        """A run was taken from another comparison."""
        self.left -= 1

    def finished(self, seed: int, arm: str, value: float, seconds: float) -> None:
        """A run is done."""
        self.done += 1
        rest = self.left - self.done
        spent = time.monotonic() - self.start
        left = f"about {duration(spent / self.done * rest)} left" if rest > 0 else "all runs done"
        score = f"{self.unit.label} {self.unit.value(value, 2)}"
        place = f"[{self.total - rest}/{self.total}]"
        self.say(f"{place:>8} seed {seed:<3} {arm:<8}  {score:<24} {duration(seconds):>10}   {left}")


def _runs_in(folder: Path) -> int:
    return len(_read(folder / RECORDS)["runs"]) if (folder / RECORDS).exists() else 0


def timestamp() -> str:
    """Now, in UTC, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
