"""Batches whose content depends on (seed, epoch, sample) and on nothing else: not on workers, ranks or where a run
resumed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchive.data.drawing import epoch_order, kept_generators, key_seed, seed_generators
from torchive.data.faults import DataError
from torchive.data.memory import SampleMemory, worker_context
from torchive.data.samples import SampleSet
from torchive.structures import Batch, Sample

Transform = Callable[[Sample], Sample]


class Loader:
    """Batches of one rank's shard of a sample set.

    The order of epoch ``e`` is a function of ``(seed, e)``; what the transform draws from the global generators of
    torch, Python and NumPy is a function of ``(seed, e, sample id)``, and the callers' generators are left as they
    were. Rank r takes every ``world``-th sample of the order. When shuffling, all shards have one length (up to
    ``world - 1`` samples of an epoch are left for another); otherwise they are an exact partition. Together the
    ranks' k-th batches hold the samples that one process with ``world`` times the batch size would take.

    Args:
        samples: the sample set.
        transform: from a sample as read to a sample as trained on. If it has ``prepare(sample)``, a part that draws
            nothing, and ``finish(sample)``, the rest, prepared samples are kept in memory from then on.
        batch_size: samples of a batch of this rank.
        seed: of the order and the draws.
        shuffle: a new order in each epoch; otherwise the set's own.
        workers: processes that load; 0 loads in the caller. The batches are the same for any number.
        rank, world: this process and how many there are.
        drop_last: leave out a last batch that is not full.
        views: how often the transform is applied to each sample; from 2 on, a batch's inputs are (N, V, C, H, W). A
            transform may as well return an image (V, C, H, W) itself; then leave this at 1.
        memory: bytes of prepared samples to keep.
        order: the indices of an epoch over all ranks, as many as there are samples, instead of the shuffled ones.

    Raises:
        ValueError: a number out of range, or a set without a batch.

    ``waited`` is the time in seconds that the caller has waited for batches so far.
    """

    def __init__(
        self,
        samples: SampleSet,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        views: int = 1,
        memory: int = 1 << 30,
        order: Callable[[int], list[int]] | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0 or views < 1:
            raise ValueError(
                f"batch_size {batch_size} and views {views} must be at least 1, workers {workers} at least 0"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..{world - 1}, got {rank}")
        self.samples, self.batch_size, self.seed, self.shuffle = samples, batch_size, seed, shuffle
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.ordered = order
        self.waited = 0.0
        if len(self) == 0:
            raise DataError(
                f"{samples.name}: {len(samples)} samples give no batch of {batch_size} to rank {rank} of {world}"
                f"{' with drop_last' if drop_last else ''}"
            )
        self._source = _Source(samples, transform, seed, views, memory, workers)
        self._plan = _Plan()
        self._loader: DataLoader[Any] | None = None
        if workers:
            self._loader = DataLoader(
                self._source,
                batch_sampler=self._plan,
                num_workers=workers,
                persistent_workers=True,
                multiprocessing_context=worker_context(),
                collate_fn=_same,
                worker_init_fn=_leave_to_caller,
                generator=torch.Generator().manual_seed(0),  # else the loader would draw from the global one
            )

    def __len__(self) -> int:
        shard, size = self._shard_length(), self.batch_size
        return shard // size if self.drop_last else -(-shard // size)

    def _shard_length(self) -> int:
        whole, rest = divmod(len(self.samples), self.world)
        return whole if self.shuffle else whole + (self.rank < rest)

    def order(self, epoch: int) -> list[int]:
        """The indices that this rank takes in an epoch, in order."""
        count = len(self.samples)
        if self.ordered is not None:
            order = self.ordered(epoch)
        else:
            order = epoch_order(count, self.seed, epoch) if self.shuffle else list(range(count))
        return order[self.rank :: self.world][: self._shard_length()]

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from ``start_batch`` on; the skipped samples are not read."""
        order = self.order(epoch)
        size = self.batch_size
        plan = [
            [(epoch, index) for index in order[batch * size : (batch + 1) * size]]
            for batch in range(start_batch, len(self))
        ]
        if self._loader is not None:
            self._plan.batches = plan
        batches = iter(self._loader) if self._loader is not None else map(self._source.__getitems__, plan)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            if isinstance(batch, _Failed):
                raise DataError(batch.reason)
            yield batch

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


def _leave_to_caller(_worker: int) -> None:
    """A kill of the whole process group stops the caller after its step, which needs its workers until then: a worker
    overhears the first one. Torch's own handler would end it, and the caller with an error.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


@dataclass(frozen=True)
class _Failed:
    """What a batch's place holds where the data are at fault."""

    reason: str


class _Plan:
    """The batch sampler of the worker processes: the keys that the loader has planned for this epoch."""

    batches: Sequence[list[tuple[int, int]]] = ()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Source(Dataset[Any]):
    """From a list of (epoch, index) to a batch, in the caller or in a worker."""

    def __init__(
        self, samples: SampleSet, transform: Transform, seed: int, views: int, memory: int, workers: int
    ) -> None:
        self.samples, self.transform, self.seed, self.views = samples, transform, seed, views
        self.prepare = getattr(transform, "prepare", None)
        self.finish = getattr(transform, "finish", transform) if self.prepare else transform
        self.memory: SampleMemory | None = None
        if self.prepare and memory > 0:
            self.memory = SampleMemory(samples.ids, _prepared(samples, self.prepare, 0), memory, workers)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch | _Failed:
        try:
            with kept_generators():
                return collate([self._one(epoch, index) for epoch, index in keys])
        except DataError as error:  # a worker would wrap it in its traceback
            return _Failed(str(error))

    def _one(self, epoch: int, index: int) -> Sample:
        sample = self._prepared(index)
        seed_generators(key_seed("draw", self.seed, epoch, sample.id))
        if self.views == 1:
            return self.finish(sample)
        parts = [self.finish(sample) for _ in range(self.views)]
        return Sample(torch.stack([part.image for part in parts]), parts[0].target, sample.id)

    def _prepared(self, index: int) -> Sample:
        if self.prepare is None:
            return self.samples[index]
        sample = self.memory.get(index) if self.memory else None
        if sample is None:
            sample = _prepared(self.samples, self.prepare, index)
            if self.memory:
                self.memory.put(index, sample)
        return sample


def _prepared(samples: SampleSet, prepare: Transform, index: int) -> Sample:
    """A sample, prepared; DataError names it where that is refused."""
    sample = samples[index]
    try:
        return prepare(sample)
    except ValueError as error:
        raise DataError(f"{samples.name}: {sample.id}: {error}") from error


def _same(batch: Any) -> Any:
    return batch


def collate(samples: Sequence[Sample]) -> Batch:
    """One batch: images of one size are stacked unless the targets are boxes; the targets decide their own form.

    Raises:
        ValueError: images of one batch differ in size and the task needs one size.
    """
    images = [sample.image for sample in samples]
    targets = [sample.target for sample in samples]
    ids = tuple(sample.id for sample in samples)
    first = targets[0]
    if isinstance(first, dict):
        return Batch(images, targets, ids)
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise ValueError(f"a batch needs images of one size, got {sorted(sizes)}; give the transform an image_size")
    inputs = torch.stack(images)
    if first is None:
        return Batch(inputs, None, ids)
    return Batch(inputs, torch.stack(targets) if isinstance(first, Tensor) else torch.tensor(targets), ids)
