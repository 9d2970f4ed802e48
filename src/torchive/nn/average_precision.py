"""Average precision of scored objects by any similarity, as COCO counts it, over all objects or a part of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Similarities from which a detection is right: 0.5, 0.55, up to 0.95.
THRESHOLDS = tuple(k / 100 for k in range(50, 100, 5))


@dataclass(frozen=True)
class Compared:
    """The detections and objects of one class in one image.

    ``similarity`` (D, L) in [0, 1], ``scores`` (D,), ``ignored`` (L,) bool: objects that count neither as found nor as
    missed, and whose detections do not count as false.
    """

    similarity: Tensor
    scores: Tensor
    ignored: Tensor


def average_precision(
    images: Sequence[Compared], *, thresholds: Sequence[float] = THRESHOLDS, max_detections: int = 100
) -> Tensor:
    """The average precision (T,) of one class at each threshold, -1 where there is no object that counts.

    In the order of its score each detection takes the free object that is most like it, from the threshold on, of
    equals the last; one that is ignored only where there is no other. Precision is made to fall with recall and
    averaged over 101 recalls.

    Args:
        images: one entry for each image with a detection or an object.
        thresholds: T similarities.
        max_detections: the best of an image that are looked at.
    """
    objects = sum(int((~image.ignored).sum()) for image in images)
    if not objects:
        return torch.full((len(thresholds),), -1.0, dtype=torch.float64)
    parts = [_taken(image, torch.tensor(list(thresholds), dtype=torch.float64), max_detections) for image in images]
    scores = torch.cat([score for score, _, _ in parts])
    order = scores.argsort(descending=True, stable=True)
    right = torch.cat([taken for _, taken, _ in parts], 1)[:, order]  # (T, all detections)
    counts = torch.cat([count for _, _, count in parts], 1)[:, order]
    found = (right & counts).double().cumsum(1)
    false = (~right & counts).double().cumsum(1)
    recall = found / objects
    precision = found / (found + false).clamp(min=1e-12)
    precision = precision.flip(1).cummax(1).values.flip(1)
    wanted = torch.arange(101, dtype=torch.float64) * 0.01  # to the last bit as COCO's, which decides ties
    wanted = wanted.expand(len(recall), -1).contiguous()
    place = torch.searchsorted(recall, wanted)  # (T, 101), past the end where this recall is not reached
    padded = torch.cat([precision, precision.new_zeros(len(precision), 1)], 1)
    return padded.gather(1, place).mean(1)


def _taken(image: Compared, thresholds: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (D,) of an image's best detections, whether each takes an object (T, D), and whether it counts (T, D)."""
    order = image.scores.argsort(descending=True, stable=True)[:most]
    similarity = image.similarity[order].double().cpu()  # (D, L)
    ignored = image.ignored.cpu()
    taken = torch.zeros(len(thresholds), len(order), dtype=torch.bool)
    counts = torch.ones_like(taken)
    free = torch.ones(len(thresholds), len(ignored), dtype=torch.bool)
    least = thresholds.clamp(max=1 - 1e-10)[:, None]
    for k in range(len(order) if len(ignored) else 0):
        able = free & (similarity[k] >= least)  # (T, L)
        real = able & ~ignored
        able = torch.where(real.any(1, keepdim=True), real, able)
        value = torch.where(able, similarity[k], -1.0)
        best = value.shape[1] - 1 - value.flip(1).argmax(1)
        hit = able.any(1)
        taken[:, k] = hit
        counts[:, k] = ~(hit & ignored[best])
        free[torch.nonzero(hit)[:, 0], best[hit]] = False
    return image.scores[order].double().cpu(), taken, counts
