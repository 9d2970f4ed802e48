"""Small faces in large photographs: the detector on overlapping windows, what they find averaged as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchive.methods.faces.blazeface.decode import Blending, blend
from torchive.structures import Detections


def detect_in_windows(
    detect: Callable[[Tensor], Sequence[Detections]],
    image: Tensor,
    side: int,
    *,
    step: int | None = None,
    overlap: float = 0.3,
    blending: Blending = "top",
) -> Detections:
    """Faces of a whole photograph in its pixels, from square windows of it; best first.

    A face is found best where it fills a fifth to a half of its window. An image smaller than a window is one window.

    Args:
        detect: windows (M, C, side, side) to detections, such as ``partial(model.predict, score_threshold=0.75)``.
        image: (C, H, W).
        side: of a window, in pixels. step: from window to window; a quarter of the side if None.
        overlap, blending: as of ``blend``.

    Raises:
        ValueError: a side or step below one.
    """
    step = max(side // 4, 1) if step is None else step
    if side < 1 or step < 1:
        raise ValueError(f"expected side and step >= 1, got {side} and {step}")
    height, width = image.shape[1:]
    places = [(x, y) for y in _starts(height, side, step) for x in _starts(width, side, step)]
    windows = torch.stack([image[:, y : y + side, x : x + side] for x, y in places])
    found = detect(windows)
    moved = [place for place, one in zip(places, found, strict=True) for _ in range(len(one))]
    shift = torch.tensor(moved, dtype=image.dtype, device=image.device).view(-1, 2)
    boxes, points = torch.cat([one.boxes for one in found]), [one.keypoints for one in found]
    flat = torch.cat([p.flatten(1) for p in points if p is not None]) if points[0] is not None else boxes[:, :0]
    shapes = torch.cat([boxes, flat], 1)
    shapes = shapes + shift.repeat(1, shapes.shape[1] // 2)
    scores, labels = torch.cat([one.scores for one in found]), torch.cat([one.labels for one in found])
    order = scores.argsort(descending=True, stable=True)
    shapes, scores, rows = blend(shapes[order], scores[order], labels[order], threshold=overlap, blending=blending)
    labels = labels[order][rows]
    order = scores.argsort(descending=True, stable=True)  # a mean need not fall as its best score does
    shapes, scores, labels = shapes[order], scores[order], labels[order]
    keypoints = None if points[0] is None else shapes[:, 4:].unflatten(1, (-1, 2))
    return Detections(shapes[:, :4], labels, scores, keypoints=keypoints)


def _starts(length: int, side: int, step: int) -> list[int]:
    """Where windows begin along an axis; the last one ends with it."""
    last = max(length - side, 0)
    return sorted({*range(0, last, step), last})
