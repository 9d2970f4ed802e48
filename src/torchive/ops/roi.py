"""Pooling of regions from one feature map or a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align


def pyramid_level(boxes: Tensor, strides: Sequence[int], *, canonical_size: float = 224.0) -> Tensor:
    """Index into ``strides`` for each box (R, 4): ``floor(4 + log2(sqrt(area) / 224))``, where stride 16 is level 4.

    Lin et al., "Feature Pyramid Networks", CVPR 2017, arXiv:1612.03144, eq. 1.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(4 + torch.log2(side / canonical_size) + 1e-6)
    first = strides[0].bit_length() - 1
    return level.clamp(first, first + len(strides) - 1).long() - first  # (R,)


def pool_regions(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    *,
    size: int = 7,
    sampling_ratio: int = 2,
) -> Tensor:
    """RoIAlign of boxes (R, 4) in pixels of the images ``image`` (R,), each from its pyramid level: (R, C, size, size).

    While compiling or exporting each box is pooled from each level and the right one is taken, which keeps all shapes
    fixed.
    """
    regions = torch.cat([image[:, None].to(boxes.dtype), boxes], 1).to(maps[0].dtype)  # (R, 5)
    if len(maps) == 1:
        return roi_align(maps[0], regions, size, 1 / strides[0], sampling_ratio)
    level = pyramid_level(boxes, strides)
    if torch.compiler.is_compiling():
        pooled = roi_align(maps[0], regions, size, 1 / strides[0], sampling_ratio)
        for k in range(1, len(maps)):
            other = roi_align(maps[k], regions, size, 1 / strides[k], sampling_ratio)
            pooled = torch.where((level == k)[:, None, None, None], other, pooled)
        return pooled
    pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
    for k, (feature, stride) in enumerate(zip(maps, strides, strict=True)):
        rows = torch.nonzero(level == k)[:, 0]
        pooled[rows] = roi_align(feature, regions[rows], size, 1 / stride, sampling_ratio).to(pooled.dtype)
    return pooled
