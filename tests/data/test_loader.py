"""A batch depends on (seed, epoch, sample) alone."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchive import transforms
from torchive.data import DataError, Loader, collate
from torchive.structures import Batch, Sample


class Squares:
    """Images (3, 20, 24) whose value tells their index."""

    name, task, classes, channels, licence, origin, left_out = "squares", "classification", ("a", "b"), 3, "", "", ()

    def __init__(self, count: int) -> None:
        self.ids = tuple(f"{number:03d}" for number in range(count))
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        self.reads.append(index)
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8, generator=generator)
        return Sample(image, index % 2, self.ids[index])


class Noise:
    """A transform that draws from all three generators."""

    def __call__(self, sample: Sample) -> Sample:
        draws = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])  # noqa: NPY002
        return Sample(draws, sample.target, sample.id)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.ids == b.ids and torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        for a, b in zip(one, other, strict=True)
    )


def augmenting(train: bool = True) -> transforms.Pipeline:
    return transforms.build("classification", image_size=16, train=train, channels=3)


def test_workers_change_nothing() -> None:
    def epochs(workers: int) -> list[Batch]:
        loader = Loader(Squares(21), augmenting(), batch_size=4, seed=3, shuffle=True, workers=workers)
        return [batch for epoch in (0, 1, 2) for batch in loader.epoch(epoch)]

    alone = epochs(0)
    assert len(alone) == 18
    assert same(alone, epochs(1))
    assert same(alone, epochs(2))
    assert not same(alone[:6], alone[6:12])


def test_workers_do_the_reading() -> None:
    samples = Squares(12)
    loader = Loader(samples, Noise(), batch_size=4, seed=0, shuffle=True, workers=2)
    assert len(list(loader.epoch(0))) == 3
    assert samples.reads == []
    loader.close()


def test_workers_share_what_they_prepared() -> None:
    loader = Loader(Squares(12), augmenting(), batch_size=4, seed=0, shuffle=True, workers=2)
    memory = loader._source.memory
    assert memory is not None
    assert memory.get(5) is None
    list(loader.epoch(0))
    prepared = augmenting().prepare(Squares(12)[5])
    assert torch.equal(memory.get(5).image, prepared.image)
    assert memory.get(5).target == 1


def test_memory_changes_nothing() -> None:
    def two(memory: int) -> list[Batch]:
        loader = Loader(Squares(9), augmenting(), batch_size=4, seed=3, shuffle=True, memory=memory)
        return [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]

    assert same(two(0), two(1 << 20))
    assert same(two(0), two(3000))


def test_each_image_is_read_once_and_skipped_ones_never() -> None:
    samples = Squares(12)
    loader = Loader(samples, augmenting(), batch_size=4, seed=0, shuffle=True)
    samples.reads.clear()
    tail = list(loader.epoch(0, start_batch=2))
    assert sorted(samples.reads) == sorted(loader.order(0)[8:])
    list(loader.epoch(0))
    list(loader.epoch(1))
    assert sorted(samples.reads) == list(range(12))
    assert same(tail, list(Loader(Squares(12), augmenting(), batch_size=4, seed=0, shuffle=True).epoch(0))[2:])


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_within_an_epoch_gives_its_tail(workers: int) -> None:
    loader = Loader(Squares(22), augmenting(), batch_size=4, seed=5, shuffle=True, workers=workers)
    whole = list(loader.epoch(7))
    for start in (0, 3, 6):
        assert same(whole[start:], list(loader.epoch(7, start_batch=start)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_left_early_does_not_leak_into_the_next(workers: int) -> None:
    loader = Loader(Squares(22), augmenting(), batch_size=4, seed=5, shuffle=True, workers=workers)
    expected = list(loader.epoch(1))
    next(iter(loader.epoch(0)))
    assert same(expected, list(loader.epoch(1)))


def test_draws_are_keyed_by_seed_epoch_and_sample() -> None:
    def draws(seed: int, epoch: int, batch_size: int, shuffle: bool) -> dict[str, tuple[float, ...]]:
        loader = Loader(Squares(10), Noise(), batch_size=batch_size, seed=seed, shuffle=shuffle)
        return {i: tuple(x.tolist()) for b in loader.epoch(epoch) for i, x in zip(b.ids, b.inputs, strict=True)}

    assert draws(0, 0, 2, True) == draws(0, 0, 5, False)  # neither order nor batch size matters
    assert not set(draws(0, 0, 2, True).values()) & set(draws(0, 1, 2, True).values())
    assert not set(draws(0, 0, 2, True).values()) & set(draws(1, 0, 2, True).values())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_generators_are_left_alone(workers: int) -> None:
    loader = Loader(Squares(10), Noise(), batch_size=4, seed=0, shuffle=True, workers=workers)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    list(loader.epoch(0))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), world=st.integers(1, 5), size=st.integers(1, 7), epoch=st.integers(0, 5))
def test_ranks_share_without_duplicates(count: int, world: int, size: int, epoch: int) -> None:
    def indices(shuffle: bool) -> list[list[int]]:
        shards = []
        for rank in range(world):
            try:
                loader = Loader(
                    Squares(count), Noise(), batch_size=size, seed=1, shuffle=shuffle, rank=rank, world=world
                )
            except DataError:
                assert count < world
                shards.append([])
                continue
            names = [int(name) for batch in loader.epoch(epoch) for name in batch.ids]
            assert len(loader) == -(-len(names) // size)
            assert names == loader.order(epoch)
            shards.append(names)
        return shards

    exact = indices(shuffle=False)
    assert sorted(chain.from_iterable(exact)) == list(range(count))
    train = indices(shuffle=True)
    assert len({len(shard) for shard in train}) == 1
    together = list(chain.from_iterable(train))
    assert len(set(together)) == len(together) == count - count % world


def test_ranks_together_take_the_batch_of_one_process() -> None:
    def names(rank: int, world: int, size: int) -> list[tuple[str, ...]]:
        samples = Squares(24)
        loader = Loader(samples, Noise(), batch_size=size, seed=1, shuffle=True, rank=rank, world=world)
        return [batch.ids for batch in loader.epoch(2)]

    pairs = zip(names(0, 2, 4), names(1, 2, 4), strict=True)
    assert [set(a + b) for a, b in pairs] == [set(ids) for ids in names(0, 1, 8)]


def test_drop_last_and_views() -> None:
    loader = Loader(Squares(10), augmenting(), batch_size=4, seed=0, shuffle=True, drop_last=True, views=2)
    batches = list(loader.epoch(0))
    assert len(batches) == len(loader) == 2
    assert batches[0].inputs.shape == (4, 2, 3, 16, 16)
    assert not torch.equal(batches[0].inputs[:, 0], batches[0].inputs[:, 1])
    assert loader.waited > 0


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"rank": 2, "world": 2}, {"workers": -1}, {"views": 0}, {"batch_size": 11}]
)
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    options = {"batch_size": 2, "seed": 0, "shuffle": True, "drop_last": True, **wrong}
    with pytest.raises(ValueError):
        Loader(Squares(10), Noise(), **options)


def test_collation_by_target() -> None:
    image = torch.zeros(3, 4, 4)
    boxes = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert isinstance(collate([Sample(image, boxes, "a"), Sample(torch.zeros(3, 5, 4), boxes, "b")]).inputs, list)
    mask = collate([Sample(image, torch.zeros(4, 4, dtype=torch.int64), "a")] * 2)
    assert mask.targets.shape == (2, 4, 4)
    assert collate([Sample(image, 3, "a")]).targets.dtype == torch.int64
    assert collate([Sample(image, None, "a")]).targets is None
    with pytest.raises(ValueError, match="one size"):
        collate([Sample(image, 0, "a"), Sample(torch.zeros(3, 5, 4), 0, "b")])
