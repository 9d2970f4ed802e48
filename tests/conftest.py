"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchive.catalogue import record_evidence

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors and modules are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(name, step, **figures)`` writes evidence under TORCHIVE_RECORD=1, and does nothing otherwise."""

    def write(name: str, step: str, **figures: object) -> None:
        if os.environ.get("TORCHIVE_RECORD") == "1":
            record_evidence(name, step, f"pytest {request.node.nodeid}", **figures)

    return write


@pytest.fixture
def parity() -> Callable[[str], dict[str, torch.Tensor]]:
    """``parity(name)`` loads the small tensors that the authors' code gave: ``tests/parity/NAME.safetensors``."""
    return lambda name: load_file(Path(__file__).parent / "parity" / f"{name}.safetensors")
