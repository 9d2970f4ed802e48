"""Samples drawn by class: in proportion to a power of the classes' sizes, or one class after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchive.data.drawing import epoch_order, key_seed

#: From a share of the run to the probability of each class, None where the samples are taken as they are.
Rule = Callable[[float], Tensor | None]


def class_probabilities(counts: Sequence[int] | Tensor, power: float) -> Tensor:
    """(K,) probabilities in proportion to n_k ** power; an empty class has none.

    1 is instance-balanced, 0 class-balanced, 1/2 square-root sampling.

    Raises:
        ValueError: no sample at all, or a negative power.
    """
    sizes = torch.as_tensor(counts, dtype=torch.float64)
    if power < 0 or not bool((sizes > 0).any()):
        raise ValueError(f"power must be >= 0 and a class must have samples, got {power} and {sizes.tolist()}")
    weights = torch.where(sizes > 0, sizes**power, 0.0)
    return weights / weights.sum()


def progressive_probabilities(counts: Sequence[int] | Tensor, progress: float) -> Tensor:
    """(K,): instance-balanced at the start, class-balanced at the end, in between (1 - t) p_IB + t p_CB."""
    return (1 - progress) * class_probabilities(counts, 1) + progress * class_probabilities(counts, 0)


class ClassSampler:
    """The order of an epoch, a function of (seed, epoch): a class by the rule, then one of its samples, with
    replacement.

    Where the rule is silent the samples are those of the plain shuffled order, at the same places.

    Args:
        labels: the class of each sample.
        rule: probabilities of the classes at a share of the run; see ``Rule``.
        seed: of the draws.
        batch_size: samples of one step, over all processes.
        steps: of the whole run.

    Raises:
        ValueError: no samples, or ``batch_size`` or ``steps`` below one.
    """

    def __init__(self, labels: Sequence[int], rule: Rule, *, seed: int, batch_size: int, steps: int) -> None:
        if not len(labels) or batch_size < 1 or steps < 1:
            raise ValueError(f"expected samples, batch_size and steps >= 1, got {len(labels)}, {batch_size}, {steps}")
        values = torch.as_tensor(labels)
        self.counts = values.bincount()
        self.members = values.argsort(stable=True)
        self.starts = self.counts.cumsum(0) - self.counts
        self.rule, self.seed, self.batch_size, self.steps = rule, seed, batch_size, steps

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch, as many as there are samples."""
        count, size = len(self.members), self.batch_size
        plain = torch.tensor(epoch_order(count, self.seed, epoch))
        draws = torch.Generator().manual_seed(key_seed("class", self.seed, epoch))
        which, place = torch.rand(2, count, generator=draws, dtype=torch.float64)
        first = epoch * max(count // size, 1)
        for batch, start in enumerate(range(0, count, size)):
            chances = self.rule(min((first + batch) / self.steps, 1.0))
            if chances is None:
                continue
            rows = slice(start, start + size)
            bounds = (chances.cumsum(0) / chances.sum())[:-1].contiguous()
            classes = torch.searchsorted(bounds, which[rows], right=True)
            inside = (place[rows] * self.counts[classes]).long()
            plain[rows] = self.members[self.starts[classes] + inside]
        return plain.tolist()


class ClassAwareSampler:
    """Visits of all classes in shuffled cycles, some samples of the class at each visit; samples cycle, too.

    An epoch has K max_k n_k samples, so that the largest class is seen once and the others again and again.

    Args:
        labels: the class of each sample.
        samples: taken at each visit.
        seed: of the order.

    Raises:
        ValueError: no samples, or ``samples`` below one.
    """

    def __init__(self, labels: Sequence[int], *, samples: int = 4, seed: int = 0) -> None:
        if not len(labels) or samples < 1:
            raise ValueError(f"expected samples of the classes and samples >= 1, got {len(labels)} and {samples}")
        values = torch.as_tensor(labels)
        self.members = [torch.nonzero(values == k).flatten() for k in values.unique()]
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return len(self.members) * max(len(members) for members in self.members)

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch."""
        draws = torch.Generator().manual_seed(key_seed("class aware", self.seed, epoch))
        visits = -(-len(self) // self.samples)
        cycles = -(-visits // len(self.members))
        classes = torch.cat([torch.randperm(len(self.members), generator=draws) for _ in range(cycles)])[:visits]
        parts = torch.empty(visits, self.samples, dtype=torch.long)
        for k, members in enumerate(self.members):
            rows = classes == k
            wanted = int(rows.sum()) * self.samples
            rounds = -(-wanted // len(members))
            turns = [members[torch.randperm(len(members), generator=draws)] for _ in range(rounds)]
            if turns:
                parts[rows] = torch.cat(turns)[:wanted].view(-1, self.samples)
        return parts.flatten()[: len(self)].tolist()
