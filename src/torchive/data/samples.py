"""What a set of samples is, and which sample belongs to which split."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torchive.data.faults import Fault
from torchive.data.packages import Package

if TYPE_CHECKING:
    from torchive.structures import Sample

SPLITS = ("train", "val", "test")
_SHARES = (0.70, 0.15, 0.15)
_LARGE = 100


@runtime_checkable
class SampleSet(Protocol):
    """Samples of one task, by index. Images are uint8 (C, H, W); the targets are those of ``structures/batch.py``.

    ``classes`` are names; for detection their labels count from 1, else from 0. ``channels`` is that of every image,
    ``ids`` are stable across runs, and ``left_out`` holds the faults whose samples were left out.
    """

    @property
    def name(self) -> str: ...

    @property
    def task(self) -> str: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def channels(self) -> int: ...

    @property
    def licence(self) -> str: ...

    @property
    def origin(self) -> str: ...

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def left_out(self) -> tuple[Fault, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class SampleSetInfo:
    """One sample set as ``torchive data list`` shows it. ``commercial`` is None where it is not settled."""

    name: str
    task: str
    classes: tuple[str, ...]
    size: str
    licence: str
    commercial: bool | None
    origin: str
    description: str
    packages: tuple[Package, ...]
    module: str

    @property
    def use(self) -> str:
        """Whether the data may be used commercially, in words."""
        if self.commercial is None:
            return "commercial use: see the terms of the origin"
        return "commercial use allowed" if self.commercial else "NOT for commercial use"

    @property
    def notice(self) -> str:
        """Licence and origin in one line, shown whenever the set is fetched."""
        return f"{self.name}: {self.licence} ({self.use}); origin: {self.origin}"


def unit(identity: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the id and the seed alone, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{identity}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign_splits(
    ids: Sequence[str],
    strata: Sequence[Hashable],
    *,
    seed: int = 0,
    splits: tuple[str, ...] = SPLITS,
    shares: tuple[float, ...] = _SHARES,
) -> list[str]:
    """A split for each id: 70 % train, 15 % val, 15 % test within each stratum (usually the class).

    In a stratum of 100 samples or more a sample's split is a function of its id alone, so that data may grow without
    moving a sample from one split to another. In a smaller one the ids are ordered by their hash and cut, so that
    each split gets its share, and at least one sample where there are as many samples as splits.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        groups.setdefault(stratum, []).append(index)
    result = [splits[0]] * len(ids)
    for members in groups.values():
        place = [unit(ids[index], seed) for index in members]
        if len(members) >= _LARGE:
            cuts = [sum(shares[: part + 1]) for part in range(len(shares) - 1)]
            for index, value in zip(members, place, strict=True):
                result[index] = splits[sum(value >= cut for cut in cuts)]
            continue
        counts = [max(round(share * len(members)), int(len(members) >= len(splits))) for share in shares[1:]]
        order = [index for _, index in sorted(zip(place, members, strict=True))]
        end = len(order)
        for split, count in zip(reversed(splits[1:]), reversed(counts), strict=True):
            for index in order[max(end - count, 0) : end]:
                result[index] = split
            end -= count
    return result
