"""What a layer must hold to that takes a global mean's place."""

from __future__ import annotations

from typing import Any

from torch import nn


def flattens(old: nn.Module) -> bool:
    """Whether a layer that pools maps to one position gives (N, C) rather than (N, C, 1, 1).

    Args:
        old: an adaptive pool of PyTorch or timm, or timm's mean over given axes.

    Raises:
        ValueError: it does not pool to one position, or has its channels last.
    """
    size = getattr(old, "output_size", 1)
    if any(side != 1 for side in (size if isinstance(size, tuple | list) else (size,))):
        raise ValueError(f"it pools to one position, got an output size of {size}")
    axes: Any = getattr(old, "dim", ())
    if 1 in axes:
        raise ValueError(f"channels are expected on axis 1, got a mean over axes {tuple(axes)}")
    return bool(getattr(old, "flatten", False))
