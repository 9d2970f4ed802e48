"""Masks of objects: crops for regions, pasting to the image, and the class of each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

#: Class of a pixel that counts nowhere.
IGNORED = 255
_CHUNK = 2**25  # values that are pasted at a time


def check_masks(targets: Sequence[dict[str, Tensor]], originals: Sequence[tuple[int, int]]) -> None:
    """Refuse targets without a mask (H, W) for each box, or with a ``semantic`` map of another size.

    Raises:
        ValueError: naming the image, the shape expected and the shape received.
    """
    for k, (target, (height, width)) in enumerate(zip(targets, originals, strict=True)):
        if "masks" not in target:
            raise ValueError(f"target {k}: expected masks beside the boxes, got {', '.join(target)}")
        expected = (len(target["boxes"]), height, width)
        if tuple(target["masks"].shape) != expected:
            raise ValueError(f"target {k}: expected masks {expected}, got {tuple(target['masks'].shape)}")
        semantic = target.get("semantic")
        if semantic is not None and tuple(semantic.shape) != expected[1:]:
            raise ValueError(f"target {k}: expected a semantic map {expected[1:]}, got {tuple(semantic.shape)}")


def crop_masks(
    masks: Tensor, index: Tensor, boxes: Tensor, size: int, *, aligned: bool = True, binary: bool = True
) -> Tensor:
    """The part (R, size, size) of the masks ``masks[index]`` that boxes (R, 4) cover, 0 or 1.

    Args:
        masks: (L, H, W), 0 or 1.
        index: (R,), the mask of each box.
        boxes: in pixels of the masks.
        size: side of the crops.
        aligned: a pixel's value stands at its centre; torchvision has it at the corner, half a pixel off.
        binary: 1 where at least half of a cell is covered; otherwise the share that is, as torchvision.
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    used, row = index.unique(return_inverse=True)  # of a thousand objects few have a region
    regions = torch.cat([row[:, None].to(boxes.dtype), boxes], 1)
    share = roi_align(masks[used, None].to(boxes.dtype), regions, size, 1.0, aligned=aligned)[:, 0]
    return (share >= 0.5).to(share.dtype) if binary else share


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU (L, M) of masks (L, H, W) with masks (M, H, W); 0 where neither has a pixel."""
    a, b = first.flatten(1).bool().float(), second.flatten(1).bool().float()
    both = a @ b.T  # whole numbers, exact up to 2^24 pixels
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], *, threshold: float = 0.5) -> Tensor:
    """Masks (D, S, S) of boxes (D, 4) as they lie in an image of ``size``: (D, H, W) bool, values above ``threshold``.

    Bilinear, zero outside the box's cells, at the centres of the pixels. Both axes are interpolated on their own, by a
    matrix product each; on the CPU, where objects are small in their image, only for the window that each has there.
    """
    height, width = size
    windows: list[list[int]] = []
    if masks.is_cpu and threshold >= 0 and not torch.compiler.is_compiling():
        windows = _windows(boxes, size, masks.shape[1:])
    make = torch.zeros if windows else torch.empty
    pasted = make(len(boxes), height, width, dtype=torch.bool, device=masks.device)
    wide = masks.to(torch.promote_types(masks.dtype, torch.float32))
    boxes = boxes.to(wide.dtype)
    step = max(_CHUNK // max(height * width, 1), 1)
    for start in range(0, len(boxes), step):
        part, box = wide[start : start + step], boxes[start : start + step]
        rows = _hat(box[:, 1], box[:, 3], height, part.shape[1])  # (D, H, S)
        columns = _hat(box[:, 0], box[:, 2], width, part.shape[2])  # (D, W, S)
        if not windows:
            torch.gt(rows @ part @ columns.mT, threshold, out=pasted[start : start + step])
            continue
        for k, (left, top, right, bottom) in enumerate(windows[start : start + step]):
            window = rows[k, top:bottom] @ part[k] @ columns[k, left:right].T
            torch.gt(window, threshold, out=pasted[start + k, top:bottom, left:right])
    return pasted


def _windows(boxes: Tensor, size: tuple[int, int], cells: Sequence[int]) -> list[list[int]]:
    """Columns and rows, x, y, x, y, that the cells of each box (D, 4) reach in an image of ``size``; none where they
    are no small part of all images together."""
    half = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6) / (2 * boxes.new_tensor([cells[1], cells[0]])) + 0.5
    ends = torch.cat([(boxes[:, :2] - half).floor(), (boxes[:, 2:] + half).ceil()], 1)
    limit = ends.new_tensor([size[1], size[0]] * 2)
    ends = torch.minimum(ends.clamp(min=0), limit).nan_to_num()
    area = (ends[:, 2:] - ends[:, :2]).clamp(min=0).prod(1).sum()
    return ends.long().tolist() if 8 * area < len(boxes) * size[0] * size[1] else []


def class_map(target: dict[str, Tensor], size: Sequence[int]) -> Tensor:
    """Masks (L, H, W) with labels (L,) from 1 as one map (H, W) of classes, the later on top; elsewhere 0, or 255 where
    ``ignored`` (H, W), if the target has it, is true."""
    masks, labels = target["masks"], target["labels"]
    rest = torch.zeros(*size, dtype=torch.int64, device=masks.device)
    if "ignored" in target:
        rest = rest.masked_fill(target["ignored"], IGNORED)
    if not len(masks):
        return rest
    last = masks.bool().flip(0)
    return torch.where(last.any(0), labels.flip(0)[last.to(torch.uint8).argmax(0)], rest)


def semantic_targets(
    targets: Sequence[dict[str, Tensor]],
    sizes: Tensor,
    originals: Sequence[tuple[int, int]],
    grid: Sequence[int],
    stride: int,
) -> Tensor:
    """The class (N, *grid) at the centre of each cell of a batch, 255 outside the image.

    Read from ``target["semantic"]`` (H, W); where that is missing, the things' masks with background 0.

    Args:
        targets: as they come, in pixels of ``originals`` (height, width).
        sizes: (N, 2), height and width of the images in the batch.
        originals: height and width of each image.
        grid: rows and columns of cells.
        stride: side of a cell in pixels of the batch.
    """
    found = torch.full((len(targets), *grid), IGNORED, dtype=torch.int64, device=sizes.device)
    for k, (target, size, original) in enumerate(zip(targets, sizes, originals, strict=True)):
        classes = target["semantic"] if "semantic" in target else class_map(target, original)
        places = []
        for axis in range(2):
            centre = (torch.arange(grid[axis], device=sizes.device, dtype=sizes.dtype) + 0.5) * stride
            inside = centre[centre < size[axis]] * (original[axis] / size[axis])
            places.append(inside.long().clamp(max=original[axis] - 1))
        y, x = places
        found[k, : len(y), : len(x)] = classes.to(sizes.device)[y[:, None], x]
    return found


def _hat(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
    """Bilinear weights (D, length, cells) of the cells between ``low`` and ``high`` (D,) at each pixel's centre."""
    pixel = torch.arange(length, device=low.device, dtype=low.dtype) + 0.5
    extent = (high - low).clamp(min=1e-6)[:, None]
    place = (pixel - low[:, None]) / extent * cells - 0.5  # (D, length), in cells
    cell = torch.arange(cells, device=low.device, dtype=low.dtype)
    return (1 - (place[..., None] - cell).abs()).clamp(min=0)
