"""What landmarks and pairs learn: the cells that landmarks are to be found in, which items are one, and both losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchive.methods.detection.deepfashion2_match_rcnn.heads import LandmarkHead
from torchive.nn.regions import Regions
from torchive.structures.batch import SHOP, USER


def check_landmarks(targets: Sequence[dict[str, Tensor]], total: int) -> None:
    """Refuse targets without ``keypoints`` (L, P, 3).

    Raises:
        ValueError: naming the image, the shape expected and the shape received.
    """
    for k, target in enumerate(targets):
        expected = (len(target["boxes"]), total, 3)
        if "keypoints" not in target:
            raise ValueError(f"target {k}: expected keypoints {expected}; landmarks=() trains without them")
        if tuple(target["keypoints"].shape) != expected:
            raise ValueError(f"target {k}: expected keypoints {expected}, got {tuple(target['keypoints'].shape)}")


def landmark_targets(
    regions: Regions,
    targets: Sequence[dict[str, Tensor]],
    sizes: Tensor,
    originals: Sequence[tuple[int, int]],
    head: LandmarkHead,
    size: int,
) -> tuple[Tensor, Tensor]:
    """The cell (R, M) of each landmark in a ``size`` x ``size`` grid over its region, and whether it counts (R, M).

    It counts where it belongs to the region's class, is marked, visible or occluded, and lies in the region.

    Args:
        regions: with objects, image by image, in pixels of the batch.
        targets: with ``keypoints`` (L, P, 3), x and y in pixels of ``originals`` (height, width) and 0 where a
            landmark is not marked.
        sizes: (N, 2), height and width of the images in the batch.
        originals: of the images that went in.
        head: whose classes own the landmarks.
        size: cells along each side.
    """
    parts = [regions.boxes.new_zeros(0, head.space.largest, 3)]
    for k, (target, original) in enumerate(zip(targets, originals, strict=True)):
        rows = torch.nonzero(regions.image == k)[:, 0]
        own = target["keypoints"].to(regions.boxes)[regions.matched[rows]] if len(rows) else parts[0].new_zeros(0, 1, 3)
        if len(rows):
            scale = torch.ones(3, dtype=own.dtype, device=own.device)
            scale[:2] = (sizes[k] / sizes.new_tensor(original))[[1, 0]]
            parts.append(head.of_class(own * scale, regions.labels[rows]))
    points = torch.cat(parts)  # (R, M, 3)
    corner, side = regions.boxes[:, None, :2], (regions.boxes[:, 2:] - regions.boxes[:, :2])[:, None]
    share = (points[..., :2] - corner) / side.clamp(min=1e-6)
    inside = ((share >= 0) & (share <= 1)).all(-1)
    cell = (share.nan_to_num(0) * size).floor().clamp(0, size - 1).long()  # on the far edge: the last cell
    counts = head.valid(regions.labels) & (points[..., 2] > 0) & inside
    return cell[..., 1] * size + cell[..., 0], counts


def landmark_loss(logits: Tensor, cells: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy of each landmark's cell among all cells, the mean over landmarks that count; zero without any.

    Args:
        logits: (R, M, S, S).
        cells: (R, M), numbers of cells, row by row.
        counts: (R, M) bool.
    """
    if not bool(counts.any()):
        return logits.sum() * 0
    return F.cross_entropy(logits.flatten(2)[counts], cells[counts])


def check_pairs(targets: Sequence[dict[str, Tensor]]) -> None:
    """Refuse targets without ``pair_id``, ``style`` and ``source`` (L,).

    Raises:
        ValueError: naming the image and what is missing or of another shape.
    """
    for k, target in enumerate(targets):
        for key in ("pair_id", "style", "source"):
            if key not in target:
                raise ValueError(f"target {k}: expected {key} (L,), which items it pairs; matching=None does without")
            if target[key].shape != target["labels"].shape:
                raise ValueError(
                    f"target {k}: expected {key} {tuple(target['labels'].shape)}, got {tuple(target[key].shape)}"
                )


def same_item(pair_id: Tensor, style: Tensor, other_id: Tensor, other_style: Tensor) -> Tensor:
    """Whether items are one: the same pair and the same style above zero; shapes (..., A) and (..., B) to (..., A, B).

    The source is not asked: compare a shop's items to a user's.
    """
    same = (pair_id[..., :, None] == other_id[..., None, :]) & (style[..., :, None] == other_style[..., None, :])
    return same & (style > 0)[..., :, None]


def sample_pairs(
    pair_id: Tensor, style: Tensor, source: Tensor, *, negatives: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a user's and of a shop's items of a batch, (M,) each, and whether they are the same, (M,) 0 or 1.

    All same pairs, and different ones drawn at random, ``negatives`` for each same pair (and as many for none).

    Args:
        pair_id, style, source: (I,) of the items of all images; a source is 1 for a user's and 0 for a shop's.
        negatives: different pairs for each same one.
    """
    user, shop = torch.nonzero(source == USER)[:, 0], torch.nonzero(source == SHOP)[:, 0]
    same = same_item(pair_id[user], style[user], pair_id[shop], style[shop])  # (U, S)
    positive, negative = torch.nonzero(same), torch.nonzero(~same)
    wanted = round(negatives * max(len(positive), 1))
    negative = negative[torch.randperm(len(negative), device=negative.device)[:wanted]]
    chosen = torch.cat([positive, negative])
    label = torch.zeros_like(chosen[:, 0]).index_fill(0, torch.arange(len(positive), device=chosen.device), 1)
    return user[chosen[:, 0]], shop[chosen[:, 1]], label


def pair_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (M, 2) and labels (M,), zero without pairs."""
    return F.cross_entropy(logits, labels) if len(labels) else logits.sum() * 0
