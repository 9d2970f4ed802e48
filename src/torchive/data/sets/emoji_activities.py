"""Emoji of people at work on something: sports, ways of moving, resting; none of them is in ``emoji``."""

from __future__ import annotations

from torchive.data.sets.emoji import ColourDrawings, load_people
from torchive.data.sets.registry import SAMPLE_SETS


def load(split: str) -> ColourDrawings:
    """One split of the people at their activities, made as those of ``emoji``."""
    return load_people(SAMPLE_SETS["emoji-activities"], split)
