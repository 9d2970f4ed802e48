"""From raw outputs to boxes with masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchive.methods.segmentation.condinst.mask_head import DynamicMaskHead
from torchive.methods.segmentation.condinst.upsampling import aligned_bilinear
from torchive.nn.fcos import fcos_detections
from torchive.structures import Detections

_PIXELS = 2**24  # of masks that are drawn at a time


def decode(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    head: DynamicMaskHead,
    *,
    stride: int,
    mask_stride: int,
    mask_threshold: float = 0.5,
    **options: Any,
) -> list[Detections]:
    """One ``Detections`` per image: boxes after suppression, and the masks of those that are left.

    Args:
        raw: as of ``CondInst.forward``.
        image_sizes: height and width of each image.
        head: of the masks.
        stride: pixels of a cell of the mask features.
        mask_stride: of the masks' logits.
        mask_threshold: a pixel that scores more is the object's.
        options: of ``torchive.nn.fcos.fcos_detections``.
    """
    found = []
    for k, (detections, rows) in enumerate(fcos_detections(raw, image_sizes, **options)):
        scores = mask_scores(raw, k, rows, head, stride=stride, mask_stride=mask_stride, size=image_sizes[k])
        masks = [part > mask_threshold for part in scores]
        empty = rows.new_zeros((0, *image_sizes[k]), dtype=torch.bool)
        found.append(replace(detections, masks=torch.cat([empty, *masks])))
    return found


def mask_scores(
    raw: dict[str, Tensor],
    image: int,
    rows: Tensor,
    head: DynamicMaskHead,
    *,
    stride: int,
    mask_stride: int,
    size: tuple[int, int],
) -> Iterator[Tensor]:
    """Scores (., H, W) of the masks of the locations ``rows`` (D,) of one image, some masks at a time."""
    features = raw["features"][image].float()
    for row in rows.split(max(_PIXELS // (size[0] * size[1]), 1)) if len(rows) else ():
        filters, points, reach = (value[row].float() for value in (raw["filters"][image], raw["points"], raw["reach"]))
        logits = head(features, filters, points, reach, stride).transpose(0, 1)
        logits = logits.contiguous(memory_format=torch.channels_last)  # all objects at a time
        scores = aligned_bilinear(logits, stride // mask_stride).sigmoid()
        yield aligned_bilinear(scores, mask_stride)[0, :, : size[0], : size[1]]
