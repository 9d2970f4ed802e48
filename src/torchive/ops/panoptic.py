"""Panoptic maps: merging instances and classes into one, the true map of a target, and panoptic quality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchive.ops.masks import IGNORED, class_map
from torchive.structures import Detections, Panoptic, Segment

#: Categories that counts hold: 0 background, 1 to 254 things and stuff; 255 is what does not count.
CATEGORIES = 255


def merge(
    found: Detections,
    classes: Tensor,
    *,
    score_threshold: float = 0.5,
    overlap: float = 0.5,
    stuff_area: int = 4096,
) -> Panoptic:
    """Instances and a class for each pixel to one map, by three rules.

    Instances are taken by falling score: one whose mask is taken already by more than the share ``overlap`` is
    dropped, of the others only the free pixels count. Instances win over stuff. Stuff of less than ``stuff_area``
    pixels is left out. Each decision rests on the ones before it, so the instances are gone through in order.

    Args:
        found: with masks (D, H, W).
        classes: (H, W), the category of the stuff at each pixel, 255 where there is none.
        score_threshold: instances below it are skipped.
        overlap: share of a mask that may be taken already.
        stuff_area: smallest segment of stuff, in pixels.

    Raises:
        ValueError: detections without masks.
    """
    if found.masks is None:
        raise ValueError("expected detections with masks, got none")
    order = found.scores.argsort(descending=True, stable=True)
    order = order[found.scores[order] >= score_threshold]
    ids = torch.zeros_like(classes, dtype=torch.int32)
    kept = []
    for rank, mask in enumerate(found.masks[order], 1):
        area, shared = mask.sum(), (mask & (ids > 0)).sum()
        keep = (area > 0) & (shared <= overlap * area)
        ids = torch.where(mask & (ids == 0) & keep, rank, ids)
        kept.append(keep)
    if kept:  # ranks to numbers without gaps
        there = torch.stack(kept)
        order = order[there]
        ids = torch.cat([there.new_zeros(1), there]).cumsum(0).to(torch.int32)[ids.long()]
    rows = zip(found.labels[order].tolist(), found.scores[order].tolist(), strict=True)
    segments = [Segment(number, label, True, score=score) for number, (label, score) in enumerate(rows, 1)]
    free = torch.where(ids == 0, classes, IGNORED)
    areas = free.flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
    for category in torch.nonzero(areas >= max(stuff_area, 1))[:, 0].tolist():
        segments.append(Segment(len(segments) + 1, category, False, area=int(areas[category])))
        ids = torch.where(free == category, len(segments), ids)
    return Panoptic(ids, tuple(segments))


def true_panoptic(target: dict[str, Tensor], num_classes: int, size: Sequence[int]) -> Panoptic:
    """The map of a target: its masks, the later on top, and what ``semantic`` says of the pixels between them.

    Without ``semantic`` the rest is background, category 0. With it, pixels that it calls things but no mask covers are
    void, and so are those of 255. Objects marked ``iscrowd`` are crowds.

    Args:
        target: as ``structures/batch.py`` says, with masks.
        num_classes: K; categories 1 to K are things.
        size: (H, W).
    """
    labels = target["labels"]
    rank = torch.arange(1, len(labels) + 1, device=labels.device)
    objects = class_map({"masks": target["masks"], "labels": rank}, size)
    classes = target.get("semantic", torch.zeros_like(objects)).to(objects.device).long()
    stuff = torch.where((classes >= 1) & (classes <= num_classes), IGNORED, classes)
    ids = objects.to(torch.int32)
    crowd = target.get("iscrowd", torch.zeros_like(labels)).bool().tolist()
    area = objects.flatten().bincount(minlength=len(labels) + 1).tolist()
    segments = [
        Segment(k, label, True, area=area[k], crowd=crowd[k - 1])
        for k, label in enumerate(labels.tolist(), 1)
        if area[k]
    ]
    last = len(labels)
    for category in torch.where(objects == 0, stuff, IGNORED).unique().tolist():
        if category != IGNORED:
            last += 1
            where = (objects == 0) & (stuff == category)
            ids = torch.where(where, last, ids)
            segments.append(Segment(last, category, False, area=int(where.sum())))
    return Panoptic(ids, tuple(segments))


def quality_counts(found: Panoptic, truth: Panoptic) -> Tensor:
    """Sums (255, 4) of one image for each category: overlap of the matched segments, hits, false ones, missed ones.

    Segments of one category match where their overlap is above one half, which no segment can do twice (Kirillov et
    al., "Panoptic Segmentation", CVPR 2019, arXiv:1801.00868, section 4.1). Void pixels of the truth are taken out of
    what was found; a segment that lies mostly in void or in a crowd of its category is not counted as false; a crowd
    is not counted as missed.

    Raises:
        ValueError: maps of two sizes.
    """
    if found.ids.shape != truth.ids.shape:
        raise ValueError(f"expected maps of one size, got {tuple(found.ids.shape)} and {tuple(truth.ids.shape)}")
    mine, mine_category, _ = _numbered(found)
    theirs, their_category, crowd = _numbered(truth)
    rows, columns = len(mine_category) + 1, len(their_category) + 1
    both = (mine * columns + theirs).flatten().bincount(minlength=rows * columns).view(rows, columns).double()
    area, true_area = both.sum(1)[1:, None], both.sum(0)[None, 1:]
    shared, in_void = both[1:, 1:], both[1:, :1]
    overlap = shared / (area + true_area - shared - in_void).clamp(min=1)
    same = mine_category[:, None] == their_category[None]
    hit = (overlap > 0.5) & same & ~crowd
    excused = in_void[:, 0] + (shared * (same & crowd)).sum(1)
    false = ~hit.any(1) & (excused <= 0.5 * area[:, 0]) & (area[:, 0] > 0)
    missed = ~hit.any(0) & ~crowd & (true_area[0] > 0)
    counts = both.new_zeros(CATEGORIES, 4)
    counts[:, 0].index_add_(0, mine_category, (overlap * hit).sum(1))
    counts[:, 1].index_add_(0, mine_category, hit.any(1).double())
    counts[:, 2].index_add_(0, mine_category, false.double())
    counts[:, 3].index_add_(0, their_category, missed.double())
    return counts


def panoptic_quality(counts: Tensor) -> Tensor:
    """PQ, SQ and RQ (C, 3) of sums (C, 4); NaN for a category that neither side has.

    ``PQ = sum of overlaps / (hits + false / 2 + missed / 2)``, which is SQ, the mean overlap of the hits, times RQ, the
    F1 score of the segments.
    """
    overlap, hits, false, missed = counts.unbind(1)
    size = hits + false / 2 + missed / 2
    segmentation = torch.where(hits > 0, overlap / hits.clamp(min=1), 0)
    result = torch.stack([overlap / size, segmentation, hits / size], 1)
    return torch.where((size > 0)[:, None], result, torch.nan)


def _numbered(panoptic: Panoptic) -> tuple[Tensor, Tensor, Tensor]:
    """The map with its segments numbered 1 to n in their order (0 elsewhere), and category and crowd (n,) of each."""
    device = panoptic.ids.device
    highest = max((segment.id for segment in panoptic.segments), default=0)
    number = torch.zeros(max(highest, int(panoptic.ids.max()) if panoptic.ids.numel() else 0) + 1, dtype=torch.int64)
    for k, segment in enumerate(panoptic.segments, 1):
        number[segment.id] = k
    category = torch.tensor([s.category for s in panoptic.segments], dtype=torch.int64, device=device)
    crowd = torch.tensor([s.crowd for s in panoptic.segments], dtype=torch.bool, device=device)
    return number.to(device)[panoptic.ids.long()], category, crowd
