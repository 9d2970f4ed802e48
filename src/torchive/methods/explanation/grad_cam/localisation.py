"""From maps to boxes, and how well they lie on the truth."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from torchive.ops.boxes import paired_iou


def boxes_from_maps(maps: Tensor, *, threshold: float = 0.15) -> Tensor:
    """Box around the largest component of each map: (N, 1, H, W) to (N, 4) xyxy in pixels, edges included.

    A pixel counts where it reaches ``threshold`` times the map's maximum (the paper: 15 %); pixels that touch, also at
    a corner, belong together. A map without a positive value gives the whole image.

    Raises:
        ValueError: another shape, or a threshold outside (0, 1].
    """
    if maps.ndim != 4 or maps.shape[1] != 1:
        raise ValueError(f"expected maps (N, 1, H, W), got {tuple(maps.shape)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    n, _, height, width = maps.shape
    boxes = np.tile(np.array([0, 0, width, height], dtype=np.float32), (n, 1))
    if n:
        values = maps[:, 0].detach().float().cpu()
        peak = values.amax((1, 2), keepdim=True)
        mask = ((values >= threshold * peak) & (peak > 0)).numpy()
        within = np.zeros((3, 3, 3), dtype=bool)
        within[1] = True  # neighbours in the image, none across samples: one labelling for the batch
        labels, count = ndimage.label(mask, structure=within)
        if count:
            sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
            places = ndimage.find_objects(labels)
            edges = np.array([(p[0].start, p[2].start, p[1].start, p[2].stop, p[1].stop) for p in places])
            order = np.argsort(sizes, kind="stable")  # the largest of a sample is written last
            boxes[edges[order, 0]] = edges[order, 1:]
    return torch.from_numpy(boxes).to(maps.device)


def localised(boxes: Tensor, truth: Tensor, *, iou_threshold: float = 0.5) -> Tensor:
    """Whether each box meets the true box of its sample, both (N, 4) xyxy, with at least this overlap: (N,) bool.

    Raises:
        ValueError: the shapes differ.
    """
    return paired_iou(boxes, truth) >= iou_threshold


def pointing_game(maps: Tensor, truth: Tensor, *, tolerance: float = 15.0) -> Tensor:
    """Whether the highest pixel of each map hits the object (Zhang et al., ECCV 2016, arXiv:1608.00507): (N,) bool.

    Args:
        maps: (N, 1, H, W).
        truth: boxes (N, 4) xyxy, or masks (N, H, W).
        tolerance: pixels by which it may miss; the source's 15 is meant for photographs.

    Raises:
        ValueError: shapes that do not fit.
    """
    n, _, height, width = maps.shape
    peak = maps.flatten(1).argmax(1)
    x, y = (peak % width).float() + 0.5, (peak // width).float() + 0.5
    if truth.shape == (n, 4):
        dx = torch.maximum(truth[:, 0] - x, x - truth[:, 2]).clamp(min=0)
        dy = torch.maximum(truth[:, 1] - y, y - truth[:, 3]).clamp(min=0)
        return dx**2 + dy**2 <= tolerance**2
    if truth.shape != (n, height, width):
        raise ValueError(f"expected boxes ({n}, 4) or masks ({n}, {height}, {width}), got {tuple(truth.shape)}")
    rows = torch.arange(height, device=maps.device) + 0.5
    columns = torch.arange(width, device=maps.device) + 0.5
    squares = (rows - y[:, None])[:, :, None] ** 2 + (columns - x[:, None])[:, None, :] ** 2  # (N, H, W)
    return ((truth > 0) & (squares <= tolerance**2)).flatten(1).any(1)
