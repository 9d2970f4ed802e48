"""The nuclei with a box and a mask each."""

from __future__ import annotations

from torchive.data.sets.nuclei import NucleusTiles, load_as
from torchive.data.sets.registry import SAMPLE_SETS


def load(split: str) -> NucleusTiles:
    """One split of the tiles of ``nuclei``, for detection."""
    return load_as(SAMPLE_SETS["nuclei-instances"], split)
