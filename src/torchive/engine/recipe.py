"""A recipe builds one training run: YAML over real classes, every field typed, every unknown key an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

TASKS = ("classification", "detection", "segmentation", "selfsupervised", "embedding")
#: Tasks whose model gives a representation that is scored by itself: there is nothing to predict.
REPRESENTING = ("selfsupervised", "embedding")


class RecipeError(ValueError):
    """A recipe that cannot be used: one clear line with place and reason."""


@dataclass(frozen=True)
class ClassSpec:
    """A class and its keyword arguments; an argument may be such a spec again, as a mapping."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConvertSpec:
    """One call of ``torchive.convert`` after the model is built."""

    method: str
    where: str | list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSpec:
    """What is trained on.

    ``batch_size`` counts the samples of one optimiser step over all processes. ``channels`` 1 or 3 turns colour into
    grey or grey into colour; None leaves the images as they are. ``fraction`` keeps that share of the training samples.
    ``boxed`` keeps the boxes of that share of the training images, and of the others only which classes they show.
    ``views`` are options of the procedure's own views, where it makes such.

    ``imbalance`` thins the training classes out to an exponential long tail whose first class is that many times as
    large as its last; 1 makes them equal, None leaves them; composed scenes draw their objects so. ``held_out``
    classes, a number or names, are never trained on, and validation and test hold them alone. The order of the classes
    along the tail, which are held out, and which images keep their boxes are functions of ``draw`` and the names.
    ``sampling`` is the power q of classes drawn in proportion to n_k^q: 1 takes the samples as they are, 0 all classes
    alike; "progressive" goes from 1 to 0 over the run. A procedure's own rule comes first. ``repeat_threshold`` takes
    images more often whose classes fewer than this share of the images show (data/repeat_factor.py); 0 is off.
    """

    source: str = "solar"
    image_size: int | None = None
    batch_size: int = 32
    workers: int = 0
    augment: str | list[str] = "default"
    channels: int | None = None
    skip_faulty: bool = False
    fraction: float = 1.0
    boxed: float = 1.0
    imbalance: float | None = None
    held_out: int | list[str] = 0
    draw: int = 0
    sampling: float | Literal["progressive"] = 1.0
    repeat_threshold: float = 0.0
    views: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleSpec:
    """The learning rate over a run: linear warm-up over the share ``warmup``, then cosine, constant or steps.

    ``milestones`` are shares of the run at which "step" multiplies by ``gamma``; "cosine" ends at the share ``final``.
    At the shares ``restarts`` the whole begins again, for procedures that train in stages.
    """

    name: Literal["cosine", "constant", "step"] = "cosine"
    warmup: float = 0.05
    final: float = 0.0
    milestones: list[float] = field(default_factory=lambda: [0.6, 0.85])
    gamma: float = 0.1
    restarts: list[float] = field(default_factory=list)

    def factor(self, progress: float) -> float:
        """The multiple of the base rate at a share of the run, 0 to 1."""
        from math import cos, pi

        begin = max([0.0, *(share for share in self.restarts if share <= progress)])
        end = min([1.0, *(share for share in self.restarts if share > progress)])
        progress = (progress - begin) / (end - begin)
        if self.warmup > 0 and progress < self.warmup:
            return max(progress / self.warmup, 0.01)
        if self.name == "cosine":
            rest = min((progress - self.warmup) / max(1 - self.warmup, 1e-9), 1.0)
            return self.final + (1 - self.final) * 0.5 * (1 + cos(pi * rest))
        if self.name == "step":
            return self.gamma ** sum(progress >= m for m in self.milestones)
        return 1.0


@dataclass(frozen=True)
class TrainSpec:
    """How long and how. The budget is ``steps``, or ``seconds`` of training where that is given.

    ``micro_batch`` splits each batch into consecutive parts of that many samples that pass the network one after the
    other before one optimiser step. ``clip_norm`` None clips nothing. ``evaluate_every`` 0 evaluates at the end only.
    """

    steps: int = 400
    seconds: float | None = None
    seed: int = 0
    micro_batch: int | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    clip_norm: float | None = 1.0
    evaluate_every: int = 100
    checkpoint_every: int = 100
    log_every: int = 10
    channels_last: bool = True
    cpu: bool = False


@dataclass(frozen=True)
class Recipe:
    """All that a run is a function of."""

    task: str
    model: ClassSpec
    data: DataSpec
    optimizer: ClassSpec = field(default_factory=lambda: ClassSpec("torch.optim.AdamW", {"lr": 1e-3}))
    convert: list[ConvertSpec] = field(default_factory=list)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    metric: str | None = None
    name: str = "run"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``resolve_recipe`` reads back."""
        return json.loads(json.dumps(asdict(self)))

    def to_yaml(self) -> str:
        """The recipe as a file."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def fingerprint(self) -> str:
        """A hash of everything that the trained weights depend on: not of the name, nor of when to report."""
        values = self.to_dict()
        del values["name"], values["metric"], values["data"]["workers"]
        for key in ("evaluate_every", "checkpoint_every", "log_every"):
            del values["train"][key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def override(self, overrides: Sequence[str]) -> Recipe:
        """The recipe with ``key=value`` words applied and checked."""
        from torchive.engine.resolve import apply_overrides, resolve_recipe

        return resolve_recipe(apply_overrides(self.to_dict(), overrides))

    def with_seed(self, seed: int) -> Recipe:
        """The same run with another seed."""
        return replace(self, train=replace(self.train, seed=seed))

    @property
    def decides(self) -> str:
        """The metric that decides a comparison: ``metric``, or the task's first."""
        from torchive.engine.metrics import DECIDES

        return self.metric or DECIDES[self.task]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name ("classification/solar", "solar"), by the name of a method that has one ("ssd"), or from a file.

    Args:
        overrides: words such as ``train.steps=50``, ``model.init_args.network=timm/resnet34`` or, for short,
            ``model.network=timm/resnet34``; values are YAML.

    Raises:
        RecipeError: no such recipe or key (with the close names), or a value of the wrong type.
    """
    from torchive.engine.resolve import apply_overrides, find_recipe, read_yaml, resolve_recipe

    path = find_recipe(str(name_or_path))
    values = {"name": path.stem, **read_yaml(path)}
    return resolve_recipe(apply_overrides(values, overrides), where=path.name)


def resolve_recipe(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values, checked. Raises RecipeError."""
    from torchive.engine.resolve import resolve_recipe as resolve

    return resolve(values, where=where)
