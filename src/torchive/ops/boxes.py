"""Boxes (..., 4), xyxy: codes relative to anchors, clipping, suppression. IoU is ``torchvision.ops.box_iou``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

#: Largest log ratio of sides that is decoded: 1000 / 16, as in Faster R-CNN's code.
LOG_CLAMP = math.log(1000.0 / 16)
ONES = (1.0, 1.0, 1.0, 1.0)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float] = ONES) -> Tensor:
    """R-CNN's code (..., 4) of boxes relative to anchors, which may broadcast.

    ``t_x = w_x (x - x_a) / w_a``, ``t_w = w_w log(w / w_a)``, and so for y and h; x, y are centres (Girshick et al.,
    CVPR 2014; Ren et al., arXiv:1506.01497, eq. 2). Weights (10, 10, 5, 5) are SSD's variances 0.1 and 0.2.
    """
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = boxes[..., :2] + size / 2, anchors[..., :2] + anchor_size / 2
    shift, stretch = (centre - anchor_centre) / anchor_size, (size / anchor_size).log()
    return torch.cat([shift, stretch], -1) * shift.new_tensor(weights)


def decode_boxes(
    deltas: Tensor,
    anchors: Tensor,
    weights: tuple[float, float, float, float] = ONES,
    *,
    log_clamp: float = LOG_CLAMP,
) -> Tensor:
    """Boxes (..., 4) of codes, the inverse of ``encode_boxes``; log ratios above ``log_clamp`` are cut to it."""
    deltas = deltas / deltas.new_tensor(weights)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = deltas[..., :2] * anchor_size + (anchors[..., :2] + anchor_size / 2)
    half = deltas[..., 2:].clamp(max=log_clamp).exp() * anchor_size / 2
    return torch.cat([centre - half, centre + half], -1)


def code_iou(
    codes: Tensor, others: Tensor, weights: tuple[float, float, float, float] = ONES, *, log_clamp: float = LOG_CLAMP
) -> Tensor:
    """IoU (...) of the boxes that two codes (..., 4) relative to one anchor stand for.

    It is the same for every anchor: moving and stretching both boxes alike leaves their overlap as it is.
    """
    unit = codes.new_tensor([0.0, 0.0, 1.0, 1.0])
    first = decode_boxes(codes, unit, weights, log_clamp=log_clamp)
    second = decode_boxes(others.to(codes.dtype), unit, weights, log_clamp=log_clamp)
    return paired_iou(first, second)


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU (...) of each box (..., 4) with the other in its place, with gradients; 0 where neither has area.

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.shape[-1:] != (4,):
        raise ValueError(f"expected two tensors (..., 4), got {tuple(first.shape)} and {tuple(second.shape)}")
    shared = torch.minimum(first, second)[..., 2:] - torch.maximum(first, second)[..., :2]
    inter = shared.clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (first, second)]
    either = areas[0] + areas[1] - inter
    return inter / torch.where(either > 0, either, 1)


def encode_cells(boxes: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
    """YOLO's targets (..., 4) of boxes: place of the centre in its cell, log ratios of the sides to the anchor's.

    Args:
        boxes: (..., 4).
        anchors: (..., 4), centred in their cells.
        strides: (...), side of the cell in the boxes' units.
    """
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    corner = (anchors[..., :2] + anchors[..., 2:] - strides[..., None]) / 2
    place = ((boxes[..., :2] + boxes[..., 2:]) / 2 - corner) / strides[..., None]
    return torch.cat([place, (size / anchor_size).log()], -1)


def decode_cells(
    places: Tensor, stretches: Tensor, anchors: Tensor, strides: Tensor, *, log_clamp: float = LOG_CLAMP
) -> Tensor:
    """Boxes (..., 4) of places in the cell (..., 2) and log ratios (..., 2), the inverse of ``encode_cells``."""
    size = stretches.clamp(max=log_clamp).exp() * (anchors[..., 2:] - anchors[..., :2])
    corner = (anchors[..., :2] + anchors[..., 2:] - strides[..., None]) / 2
    centre = corner + places * strides[..., None]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, ..., 4) cut to the images; ``sizes`` (N, 2) are height and width."""
    limits = sizes.to(boxes.dtype)[:, [1, 0, 1, 0]].view(-1, *[1] * (boxes.ndim - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def clip_to(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes (N, ..., 4) cut to images of one ``size`` (height, width), whose numbers may be a graph's."""
    return clip_boxes(boxes, size_tensor(size, boxes)[None])


def size_tensor(size: Sequence[int], like: Tensor) -> Tensor:
    """Height and width (2,) beside ``like``; numbers of a graph are no constants."""
    return torch.stack([like.new_ones(()) * side for side in size])


def keep_after_nms(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Mask (L,) of the boxes that greedy suppression keeps, each group of equal ``groups`` (L,) on its own.

    Its shape does not depend on the data, so that the result can be exported. While exporting, groups are set apart
    by an offset; otherwise torchvision chooses the way.
    """
    if torch.compiler.is_compiling():
        offset = groups.to(boxes.dtype) * (boxes.detach().max() + 1)
        kept = torch.ops.torchvision.nms(boxes + offset[:, None], scores, threshold)
    else:
        kept = torchvision.ops.batched_nms(boxes, scores, groups, threshold)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(0, kept, True)
