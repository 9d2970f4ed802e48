"""Parts of a map: the positions that are kept, what is computed there alone, and how that is put back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Logit of a position that was left out: its score is zero.
LEFT_OUT = -1000.0


def kept_positions(location: Tensor, threshold: float) -> Tensor:
    """Mask (N, H, W) of the logits (N, 1, H, W) whose sigmoid is ``threshold`` or more; all of them at 0."""
    if threshold <= 0:
        return torch.ones_like(location[:, 0], dtype=torch.bool)
    return location[:, 0].detach() >= math.log(threshold / (1 - threshold))


def widened(kept: Tensor) -> Tensor:
    """Mask (N, H, W) of the positions that a 3x3 window around a kept one reaches."""
    return F.max_pool2d(kept.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0


def rows_through(layer: nn.Conv2d, rows: Tensor) -> Tensor:
    """A 1x1 convolution of positions (R, C): (R, O)."""
    return F.linear(rows, layer.weight[:, :, 0, 0], layer.bias)


def windows_through(layer: nn.Conv2d, x: Tensor, place: Tensor) -> Tensor:
    """A padded 3x3 convolution of (N, C, H, W) at the positions ``place`` (R, 3) alone: (R, O)."""
    image, row, column = place[:, :, None, None].unbind(1)
    rows = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    window = torch.arange(3, device=x.device)
    seen = rows[image, row + window[:, None], column + window]  # (R, 3, 3, C)
    return F.linear(seen.flatten(1), layer.weight.permute(0, 2, 3, 1).flatten(1), layer.bias)


def put_back(values: Tensor, place: Tensor, shape: Sequence[int], fill: float = 0.0) -> Tensor:
    """Rows (R, K) at their positions (R, 3) in a map (N, K, H, W) of ``fill``; ``shape`` is (N, H, W)."""
    images, height, width = shape
    image, row, column = place.unbind(1)
    flat = values.new_full((images * height * width, values.shape[1]), fill)
    flat = flat.index_copy(0, (image * height + row) * width + column, values)
    return flat.view(images, height, width, -1).permute(0, 3, 1, 2)
