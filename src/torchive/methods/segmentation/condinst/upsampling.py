"""Upsampling that keeps pixel k of the small map on pixel k * factor + factor // 2 of the large one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def aligned_bilinear(x: Tensor, factor: int) -> Tensor:
    """(N, C, H, W) to (N, C, factor * H, factor * W), bilinear; the border is repeated.

    Points laid at ``stride * index + stride // 2`` stay where they are.

    Raises:
        ValueError: a factor below one.
    """
    if factor < 1:
        raise ValueError(f"factor must be >= 1, got {factor}")
    if factor == 1:
        return x
    height, width = x.shape[2:]
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = F.interpolate(
        x, size=(factor * (height + 1) + 1, factor * (width + 1) + 1), mode="bilinear", align_corners=True
    )
    first = factor - factor // 2
    return x[:, :, first : first + factor * height, first : first + factor * width]
