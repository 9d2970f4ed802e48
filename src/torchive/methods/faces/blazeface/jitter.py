"""How much detections tremble when the image moves by a pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from torchive.structures import Detections


def jitter(
    detect: Callable[[list[Tensor]], Sequence[Detections]],
    images: Sequence[Tensor],
    *,
    reach: int = 1,
    iou_threshold: float = 0.5,
) -> float:
    """Root mean square distance of boxes and points from their mean over moved images, in shares of the face's side.

    Each image is moved by every whole number of pixels up to ``reach`` in both directions, its border repeated; what
    is detected is moved back. A detection of the image itself counts where it is found in all moved ones.

    Args:
        detect: images to detections, such as ``partial(model.predict, score_threshold=0.5)``.
        images: each (C, H, W); of the network's own size, so that a pixel is one of its input.
        reach: pixels.
        iou_threshold: overlap from which a detection of a moved image is the same face.

    Raises:
        ValueError: no face is found in all forms of an image, so there is nothing to measure.
    """
    total, count = 0.0, 0
    steps = [(dx, dy) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    for image in images:
        height, width = image.shape[1:]
        framed = F.pad(image[None], (reach,) * 4, mode="replicate")[0]
        moved = [framed[:, reach - dy : reach - dy + height, reach - dx : reach - dx + width] for dx, dy in steps]
        found = [_numbers(one, dx, dy) for one, (dx, dy) in zip(detect(moved), steps, strict=True)]
        base = found[steps.index((0, 0))]
        if not len(base) or not all(len(one) for one in found):
            continue
        best = [box_iou(base[:, :4], one[:, :4]).max(1) for one in found]
        seen = torch.stack([value > iou_threshold for value, _ in best]).all(0)  # (L,)
        faces = torch.stack([one[index] for one, (_, index) in zip(found, best, strict=True)])[:, seen]  # (S, L, D)
        area = (base[seen, 2:4] - base[seen, :2]).prod(1)  # (L,)
        spread = (faces - faces.mean(0)).square().unflatten(2, (-1, 2)).sum(3)  # (S, L, pairs of x and y)
        total += float((spread.mean((0, 2)) / area).sum())
        count += int(seen.sum())
    if not count:
        raise ValueError("no face was found in all moved forms of an image")
    return (total / count) ** 0.5


def _numbers(found: Detections, dx: int, dy: int) -> Tensor:
    """Boxes and points (L, 4 + 2 P), moved back."""
    parts = [found.boxes] + ([] if found.keypoints is None else [found.keypoints.flatten(1)])
    values = torch.cat(parts, 1)
    return values - values.new_tensor([dx, dy]).repeat(values.shape[1] // 2)
