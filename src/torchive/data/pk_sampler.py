"""Batches of P classes with K samples each, for losses over pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class PKSampler(Sampler[list[int]]):
    """Lists of P * K indices; every batch is a function of (seed, epoch, its place). Also a ``batch_sampler`` of torch.

    Classes come in a new random order until all have been seen, and so do the samples of each class; a class with fewer
    than K samples gives some of them again.

    Args:
        labels: the class of each sample.
        classes: P.
        samples: K.
        seed: of the order.
        batches: batches of an epoch; None takes about as many samples as there are.

    Raises:
        ValueError: ``classes`` below two, ``samples`` or ``batches`` below one, or fewer than P classes.
    """

    def __init__(
        self,
        labels: Sequence[int] | torch.Tensor,
        *,
        classes: int = 16,
        samples: int = 4,
        seed: int = 0,
        batches: int | None = None,
    ) -> None:
        if classes < 2 or samples < 1 or (batches is not None and batches < 1):
            raise ValueError(f"classes must be >= 2, samples and batches >= 1, got {classes}, {samples} and {batches}")
        values = torch.as_tensor(labels)
        self.members = [torch.nonzero(values == k).flatten() for k in values.unique()]
        if len(self.members) < classes:
            raise ValueError(f"{classes} classes are wanted in each batch, the labels have {len(self.members)}")
        self.classes, self.samples, self.seed = classes, samples, seed
        self.batches = batches or max(len(values) // (classes * samples), 1)
        self.current = 0

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """The epoch that ``__iter__`` gives."""
        self.current = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self.epoch(self.current)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[list[int]]:
        """The batches of one epoch, from ``start_batch`` on."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        waiting: list[int] = []
        left: list[list[int]] = [[] for _ in self.members]
        for place in range(self.batches):
            chosen: list[int] = []
            while len(chosen) < self.classes:
                if not waiting:
                    waiting = torch.randperm(len(self.members), generator=draw).tolist()
                    waiting.sort(key=lambda k: k in chosen)  # a class comes once a batch
                chosen.append(waiting.pop(0))
            batch: list[int] = []
            for k in chosen:
                taken: list[int] = []
                while len(taken) < self.samples:
                    if not left[k]:
                        order = torch.randperm(len(self.members[k]), generator=draw)
                        left[k] = self.members[k][order].tolist()
                        left[k].sort(key=lambda index: index in taken)
                    taken.append(left[k].pop(0))
                batch += taken
            if place >= start_batch:
                yield batch
