"""Sample sets seen as another task, or in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from torchive.data.samples import SampleSet, unit
from torchive.engine.recipe import RecipeError
from torchive.ops.masks import class_map
from torchive.structures import Sample
from torchive.structures.landmarks import LandmarkSpace


class Subset:
    """Some samples of a set, by index, in the order given."""

    def __init__(self, samples: SampleSet, indices: Sequence[int]) -> None:
        self.samples, self.indices = samples, list(indices)
        self.name, self.task, self.classes = samples.name, samples.task, samples.classes
        self.channels, self.licence, self.origin = samples.channels, samples.licence, samples.origin
        self.left_out = samples.left_out
        self.ids: Sequence[str] = tuple(samples.ids[i] for i in self.indices)

    @classmethod
    def by_fraction(cls, samples: SampleSet, fraction: float, *, draw: int = 0) -> SampleSet:
        """The share of a set whose ids come first by their hash: a smaller share is a part of a larger one. ``draw``
        chooses among hashes."""
        if fraction >= 1:
            return samples
        order = sorted(range(len(samples)), key=lambda i: unit(samples.ids[i], seed=1 + draw))
        return cls(samples, sorted(order[: max(round(fraction * len(samples)), 1)]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[self.indices[index]]


class SomeClasses:
    """Some classes of a classification set, by name; their labels count from 0 in the order given."""

    task = "classification"

    def __init__(self, samples: SampleSet, classes: Sequence[str]) -> None:
        new = {samples.classes.index(name): place for place, name in enumerate(classes)}
        known = labels_of(samples)
        self.samples, self.indices = samples, [i for i, label in enumerate(known) if label in new]
        self.labels = [new[known[i]] for i in self.indices]
        self.name, self.classes, self.channels = samples.name, tuple(classes), samples.channels
        self.licence, self.origin, self.left_out = samples.licence, samples.origin, samples.left_out
        self.ids: Sequence[str] = tuple(samples.ids[i] for i in self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.samples[self.indices[index]], target=self.labels[index])


class PartlyBoxed:
    """A detection set of which a share of the images keeps its boxes; the others keep only which classes they show.

    Each target gains ``has_boxes`` () bool and ``image_labels`` (K,) float. Those that keep their boxes are the images
    that ``Subset.by_fraction`` would take with this ``draw``.
    """

    task = "detection"

    def __init__(self, samples: SampleSet, share: float, *, draw: int = 0) -> None:
        self.samples, self.name, self.ids = samples, samples.name, samples.ids
        self.classes, self.channels, self.licence = samples.classes, samples.channels, samples.licence
        self.origin, self.left_out = samples.origin, samples.left_out
        self.boxed = set(Subset.by_fraction(samples, share, draw=draw).ids)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        target, kept = sample.target, sample.id in self.boxed
        shown = torch.zeros(len(self.classes)).index_fill(0, target["labels"] - 1, 1.0)
        if not kept:
            target = {key: value[:0] for key, value in target.items() if key != "semantic"}
        return replace(sample, target={**target, "has_boxes": torch.tensor(kept), "image_labels": shown})


class MasksAsClasses:
    """A set with a mask for each object, seen as segmentation: class 0 is the background.

    Where a set says what there is between the objects, too, these classes come after the objects'.
    """

    task = "segmentation"

    def __init__(self, samples: SampleSet) -> None:
        self.samples, self.name, self.ids = samples, samples.name, samples.ids
        self.classes = ("background", *samples.classes, *stuff_of(samples))
        self.channels, self.licence, self.origin = samples.channels, samples.licence, samples.origin
        self.left_out = samples.left_out

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        if "masks" not in sample.target:
            raise RecipeError(
                f"{self.name}: {sample.id}: segmentation needs a mask for each object, and there are only boxes"
            )
        known = sample.target.get("semantic")
        return Sample(
            sample.image, class_map(sample.target, sample.image.shape[-2:]) if known is None else known, sample.id
        )


def stuff_of(samples: SampleSet) -> tuple[str, ...]:
    """The names of the categories that follow the classes of a detection set in its ``semantic`` maps."""
    if samples.task != "detection":
        return ()
    inner = getattr(samples, "samples", None)
    return tuple(getattr(samples, "stuff", ())) if inner is None else stuff_of(inner)


def space_of(samples: SampleSet) -> LandmarkSpace | None:
    """The ``landmark_space`` of a set whose objects have landmarks, where it has one."""
    inner = getattr(samples, "samples", None)
    return getattr(samples, "landmark_space", None) if inner is None else space_of(inner)


def names_of(samples: SampleSet) -> tuple[str, ...]:
    """The names of the classes, and of what follows them in ``semantic`` maps."""
    return (*samples.classes, *stuff_of(samples))


def as_task(samples: SampleSet, task: str) -> SampleSet:
    """The samples in the form of a task.

    Raises:
        RecipeError: they are of a task that cannot serve this one.
    """
    if samples.task == task or task == "selfsupervised" or (samples.task, task) == ("classification", "embedding"):
        return samples
    if (samples.task, task) == ("detection", "segmentation"):
        return MasksAsClasses(samples)
    from torchive.engine.resolve import recipe_names

    fitting = ", ".join(name.partition("/")[2] for name in recipe_names() if name.startswith(f"{samples.task}/"))
    hint = f"; recipes for {samples.task}: {fitting}" if fitting else ""
    raise RecipeError(f"{samples.name} is a set for {samples.task}; the recipe's task is {task}{hint}")


def labels_of(samples: SampleSet) -> list[Any]:
    """The class of each sample of a classification set; images are read only where the set cannot tell otherwise."""
    if isinstance(samples, Subset):
        inside = labels_of(samples.samples)
        return [inside[i] for i in samples.indices]
    known = getattr(samples, "labels", None)
    if known is None:
        return [samples[i].target for i in range(len(samples))]
    return [int(label) for label in known]


def object_labels_of(samples: SampleSet, *, read: bool = True) -> list[list[int]] | None:
    """The labels, from 1, of the objects of each sample of a detection set; None where they would have to be read from
    the samples themselves, and ``read`` forbids it.
    """
    if isinstance(samples, PartlyBoxed):  # what is hidden is not counted
        inside = object_labels_of(samples.samples, read=read)
        return inside and [x if i in samples.boxed else [] for i, x in zip(samples.ids, inside, strict=True)]
    if isinstance(samples, Subset):
        inside = object_labels_of(samples.samples, read=read)
        return None if inside is None else [inside[i] for i in samples.indices]
    known = getattr(samples, "object_labels", None)
    if known is None and read:
        known = [samples[i].target["labels"].tolist() for i in range(len(samples))]
    return known


def pair_ids_of(samples: SampleSet) -> list[int] | None:
    """The pair of each sample of a set whose images show the same items in twos or more; None of any other set."""
    if isinstance(samples, Subset):
        inside = pair_ids_of(samples.samples)
        return inside and [inside[i] for i in samples.indices]
    return getattr(samples, "pair_ids", None)
