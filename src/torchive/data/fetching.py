"""Fetching a sample set: its packages into the cache, its arrays prepared, its licence said."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from torchive.data.faults import DataError
from torchive.data.packages import obtain
from torchive.data.sets.registry import SAMPLE_SETS

if TYPE_CHECKING:
    from torchive.data.samples import SampleSet, SampleSetInfo


def sample_set_info(name: str) -> SampleSetInfo:
    """What is known of a sample set. DataError, with close names, where there is none of this name."""
    if name not in SAMPLE_SETS:
        close = get_close_matches(name, SAMPLE_SETS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(SAMPLE_SETS)}"
        raise DataError(f"{name}: no sample set of this name, and no such path{hint}")
    return SAMPLE_SETS[name]


def load_sample_set(name: str, split: str) -> SampleSet:
    """One split of a sample set, fetched if it is not in the cache yet."""
    info = sample_set_info(name)
    return import_module(f"torchive.data.sets.{info.module}").load(split)


def fetch(name: str) -> Path:
    """Bring a sample set into the cache and prepare it; offline after the first call.

    Returns:
        The first of its verified packages.

    Raises:
        DataError: no such set, the package manager's client is missing or refuses, or a hash is not the pinned one.
    """
    info = sample_set_info(name)
    paths = [obtain(package) for package in info.packages]
    load_sample_set(name, "train")
    return paths[0]
