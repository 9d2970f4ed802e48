"""Which samples a recipe trains on and how often: a long tail of classes, classes held out, sampling by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torchive.data.class_sampler import ClassSampler, class_probabilities, progressive_probabilities
from torchive.data.pair_order import pair_order
from torchive.data.repeat_factor import RepeatFactorSampler, repeat_factors
from torchive.data.samples import SampleSet, unit
from torchive.engine.recipe import Recipe, RecipeError
from torchive.engine.views import SomeClasses, Subset, labels_of, object_labels_of, pair_ids_of


def class_counts(samples: SampleSet) -> list[int]:
    """How many samples, or objects of a detection set, each class has. Raises RecipeError where there is no class."""
    labels = [label for shown in _shown(samples, "class counts") for label in shown]
    return torch.tensor(labels, dtype=torch.long).bincount(minlength=len(samples.classes)).tolist()


def counts_in_words(samples: SampleSet, *, most: int = 12) -> list[str]:
    """What is trained on, for people: classes and their sizes, the largest first, and warnings.

    They tell classes without any, and what the data's reader noticed. No sample is read for it: of a set that cannot
    tell its labels otherwise only the names are given.
    """
    what = "objects" if samples.task == "detection" else "samples"
    head = f"{samples.name}: {len(samples)} training samples, {len(samples.classes)} classes"
    known = samples.task == "classification" and hasattr(samples, "labels")
    if not known and (samples.task != "detection" or object_labels_of(samples, read=False) is None):
        return [f"{head}: {_listed(list(samples.classes), most)}"]
    counts = class_counts(samples)
    order = sorted(range(len(counts)), key=lambda k: -counts[k])
    sizes = [f"{samples.classes[k]} {counts[k]:,}" for k in order]
    lines = [f"{head}, {sum(counts):,} {what}: {_listed(sizes, most)}"]
    none = [name for name, count in zip(samples.classes, counts, strict=True) if not count]
    if none:
        lines.append(f"warning: {_listed(none, most)}: no {what[:-1]} to train on")
    return lines + [f"warning: {note}" for note in getattr(samples, "notes", ())]


def _listed(words: list[str], most: int) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def tail_order(classes: Sequence[str], seed: int) -> list[int]:
    """The classes from the head of a long tail to its end, by the hash of their names."""
    return sorted(range(len(classes)), key=lambda k: unit(f"tail/{classes[k]}", seed))


def tail_counts(sizes: Sequence[int], ratio: float) -> list[int]:
    """How many samples each class keeps, head first, of the sizes that it has.

    n_r = n_0 ratio ** (-r / (K - 1)), with the largest n_0 that every class can serve, at least one sample each. So
    the profile is exact for any data, and ratio 1 makes all classes as small as the smallest.
    """
    share = [ratio ** (-rank / max(len(sizes) - 1, 1)) for rank in range(len(sizes))]
    head = min(size / part for size, part in zip(sizes, share, strict=True))
    return [min(max(round(head * part), 1), size) for size, part in zip(sizes, share, strict=True)]


def long_tail(samples: SampleSet, ratio: float, *, seed: int = 0) -> SampleSet:
    """A set whose classes are thinned out exponentially; see ``tail_counts`` and ``tail_order``.

    In each class the samples whose ids come first by their hash stay, so that a longer tail is a part of a shorter one
    wherever its head is not larger. A detection set that composes its images draws the objects' classes with these
    shares instead; photographs cannot be thinned out so, since most show more than one class.

    Raises:
        RecipeError: the samples have no classes, or a class has no sample.
    """
    if samples.task == "detection":
        return _composed_tail(samples, ratio, seed)
    _require_classes(samples, "data.imbalance")
    members: list[list[int]] = [[] for _ in samples.classes]
    for index, label in enumerate(labels_of(samples)):
        members[label].append(index)
    empty = [name for name, found in zip(samples.classes, members, strict=True) if not found]
    if empty:
        raise RecipeError(f"{samples.name}: data.imbalance needs samples of each class; {empty[0]!r} has none")
    order = tail_order(samples.classes, seed)
    kept: list[int] = []
    for k, count in zip(order, tail_counts([len(members[k]) for k in order], ratio), strict=True):
        kept += sorted(members[k], key=lambda i: unit(samples.ids[i], seed=1))[:count]
    return Subset(samples, sorted(kept))


def _composed_tail(samples: SampleSet, ratio: float, seed: int) -> SampleSet:
    if isinstance(samples, Subset):
        return Subset(_composed_tail(samples.samples, ratio, seed), samples.indices)
    if not hasattr(samples, "with_shares"):
        raise RecipeError(
            f"{samples.name}: data.imbalance needs a class for each sample, or images that are composed; "
            f"this set is for {samples.task}"
        )
    shares = [0.0] * len(samples.classes)
    for rank, k in enumerate(tail_order(samples.classes, seed)):
        shares[k] = ratio ** (-rank / max(len(shares) - 1, 1))
    tail: SampleSet = samples.with_shares(shares)
    return tail


def held_out_classes(classes: Sequence[str], held_out: int | Sequence[str], seed: int) -> set[str]:
    """The names of the classes that are held out: those given, or that many by the hash of their names.

    Raises:
        RecipeError: an unknown name, or fewer than two classes would be left to train on or to hold out.
    """
    if isinstance(held_out, int):
        chosen = set(sorted(classes, key=lambda name: unit(f"held out/{name}", seed))[:held_out])
    else:
        chosen = set(held_out)
        unknown = sorted(chosen - set(classes))
        if unknown:
            raise RecipeError(f"data.held_out: no class {unknown[0]!r}; there are {', '.join(classes)}")
    if not 2 <= len(chosen) <= len(classes) - 2:
        raise RecipeError(
            f"data.held_out: {len(chosen)} would be held out of {len(classes)} classes; either side needs two at least"
        )
    return chosen


def without_held_out(samples: SampleSet, held_out: int | Sequence[str], *, seed: int = 0, train: bool) -> SampleSet:
    """The training split without the held-out classes, or another split with nothing else. Raises RecipeError."""
    _require_classes(samples, "data.held_out")
    chosen = held_out_classes(samples.classes, held_out, seed)
    return SomeClasses(samples, [name for name in samples.classes if (name in chosen) is not train])


def class_order(
    recipe: Recipe, samples: SampleSet, own: Callable[[float], float] | None = None
) -> Callable[[int], list[int]] | None:
    """The order of each epoch under ``data.sampling``, ``data.repeat_threshold`` or a procedure's rule; None for the
    plain one.

    Where the data tell which images show the same items, these follow each other, so that they come in one batch.

    Raises:
        RecipeError: the samples have no classes, two rules are given, or the rule changes over a run whose length in
            steps is not known.
    """
    sampling, train, repeat = recipe.data.sampling, recipe.train, recipe.data.repeat_threshold
    pairs = pair_ids_of(samples) if own is None and sampling == 1 else None
    if repeat:
        if own is not None or sampling != 1 or pairs:
            raise RecipeError("data.repeat_threshold: the order is given already, by pairs, sampling or the procedure")
        return RepeatFactorSampler(
            repeat_factors(_shown(samples, "data.repeat_threshold"), repeat), seed=train.seed
        ).order
    if own is None and sampling == 1:
        return pair_order(pairs, train.seed) if pairs else None
    if train.seconds is not None and (own is not None or isinstance(sampling, str)):
        raise RecipeError("sampling that changes over the run needs a budget in steps, got one in seconds")
    _require_classes(samples, "data.sampling")
    counts = torch.tensor(class_counts(samples))
    known = {} if own is not None or isinstance(sampling, str) else {sampling: class_probabilities(counts, sampling)}

    def rule(progress: float) -> torch.Tensor | None:
        if own is None and isinstance(sampling, str):
            return progressive_probabilities(counts, progress)
        power = own(progress) if own is not None else float(sampling)
        if power == 1:
            return None
        if power not in known:
            known[power] = class_probabilities(counts, power)
        return known[power]

    return ClassSampler(
        labels_of(samples), rule, seed=train.seed, batch_size=recipe.data.batch_size, steps=train.steps
    ).order


def _shown(samples: SampleSet, what: str) -> list[list[int]]:
    """The classes, from 0, of each sample, or of its objects; ``what`` needs them."""
    if samples.task == "detection":
        return [[label - 1 for label in labels] for labels in object_labels_of(samples) or []]
    _require_classes(samples, what)
    return [[label] for label in labels_of(samples)]


def _require_classes(samples: SampleSet, what: str) -> None:
    if samples.task != "classification":
        raise RecipeError(f"{samples.name}: {what} need one class for each sample; this set is for {samples.task}")
