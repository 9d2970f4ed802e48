"""Opening data by one string."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchive.data.faults import DataError
from torchive.data.fetching import load_sample_set
from torchive.data.samples import SPLITS

if TYPE_CHECKING:
    from torchive.data.samples import SampleSet


def open_data(source: str, split: str = "train", *, skip_faulty: bool = False, seed: int = 0) -> SampleSet:
    if split not in SPLITS:
        raise DataError(f"{source}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return load_sample_set(source, split)
