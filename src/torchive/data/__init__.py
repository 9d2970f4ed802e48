"""Sample sets, readers of the users' formats, checks of what was read, and batches.

The names below are resolved when first asked for, so that listing sample sets imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchive.data.check import check_data
    from torchive.data.faults import CheckReport, DataError, Fault
    from torchive.data.fetching import fetch
    from torchive.data.images import read_image
    from torchive.data.listing import data_list_rows, render_data_list
    from torchive.data.loader import Loader, collate
    from torchive.data.opening import open_data
    from torchive.data.samples import SampleSet, SampleSetInfo
    from torchive.data.sets.registry import SAMPLE_SETS

_HOMES = {
    "CheckReport": "faults",
    "DataError": "faults",
    "Fault": "faults",
    "Loader": "loader",
    "SAMPLE_SETS": "sets.registry",
    "SampleSet": "samples",
    "SampleSetInfo": "samples",
    "check_data": "check",
    "collate": "loader",
    "data_list_rows": "listing",
    "fetch": "fetching",
    "open_data": "opening",
    "read_image": "images",
    "render_data_list": "listing",
}

__all__ = [
    "SAMPLE_SETS",
    "CheckReport",
    "DataError",
    "Fault",
    "Loader",
    "SampleSet",
    "SampleSetInfo",
    "check_data",
    "collate",
    "data_list_rows",
    "fetch",
    "open_data",
    "read_image",
    "render_data_list",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchive.data' has no attribute {name!r}")
    value = getattr(import_module(f"torchive.data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
