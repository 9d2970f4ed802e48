"""The paper's learning rates."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    batch_size: int, *, scaling: Literal["linear", "sqrt"] = "linear", base: float | None = None
) -> float:
    """Base rate for a batch: 0.3 B / 256, or 0.075 sqrt(B), which is the same at 4096 and larger for small batches.

    Raises:
        ValueError: an unknown scaling, or a batch below one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if scaling == "linear":
        return (0.3 if base is None else base) * batch_size / 256
    if scaling == "sqrt":
        return (0.075 if base is None else base) * math.sqrt(batch_size)
    raise ValueError(f"scaling must be linear or sqrt, got {scaling!r}")


def warmup_cosine(step: int, *, steps: int, warmup: int) -> float:
    """Factor of the base rate at a step: linear from 0 over ``warmup``, then half a cosine to 0 at ``steps``.

    Raises:
        ValueError: unless 0 <= warmup < steps.
    """
    if not 0 <= warmup < steps:
        raise ValueError(f"expected 0 <= warmup < steps, got {warmup} and {steps}")
    if step < warmup:
        return step / warmup
    done = min((step - warmup) / (steps - warmup), 1.0)
    return 0.5 * (1 + math.cos(math.pi * done))
