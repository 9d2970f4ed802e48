"""FCOS: a dense detector without anchors. Head, sizes of interest, loss and decoding.

Tian, Shen, Chen, He, "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, arXiv:1904.01355, and its
journal form, arXiv:2006.09214. Assignment is ``torchive.ops.points.assign_points``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from torchive.nn.prior import init_classifier
from torchive.ops.boxes import clip_boxes, clip_to
from torchive.ops.points import (
    assign_points,
    boxes_of,
    centerness_of,
    distance_giou,
    distances_of,
    grid_points,
)
from torchive.ops.suppression import best_detections
from torchive.structures import Detections


def conv_tower(channels: int, depth: int) -> nn.Sequential:
    """Convolutions 3x3 with group norm and a ReLU; weights of deviation 0.01.

    There are 32 groups, fewer where a group would have less than eight channels: the coarsest map may be one cell.
    """
    layers: list[nn.Module] = []
    for _ in range(depth):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        layers += [conv, nn.GroupNorm(math.gcd(32, max(channels // 8, 1)), channels), nn.ReLU(inplace=True)]
        init_conv(conv)
    return nn.Sequential(*layers)


def init_conv(conv: nn.Conv2d) -> None:
    """Start a convolution with normal weights of deviation 0.01 and zero bias."""
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def flat_rows(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, C, H, W) to rows (N, A, C), map by map, row by row, cell by cell."""
    return torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], 1)


class FCOSHead(nn.Module):
    """Towers shared by all maps (N, C, H, W), with class scores, distances to the box's sides and centerness.

    Args:
        channels: C.
        num_classes: K.
        levels: number of maps, each with its own scale of the distances.
        depth: convolutions of each tower.
        prior: score of every class at the start.
    """

    def __init__(self, channels: int, num_classes: int, *, levels: int, depth: int = 4, prior: float = 0.01) -> None:
        super().__init__()
        self.class_tower, self.box_tower = conv_tower(channels, depth), conv_tower(channels, depth)
        self.logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels))
        init_classifier(self.logits, prior=prior)
        init_conv(self.distances)
        init_conv(self.centerness)

    def forward(self, maps: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """``logits`` (N, A, K), ``distances`` (N, A, 4) in strides, ``centerness`` (N, A); maps of the box tower."""
        classes = [self.logits(self.class_tower(m)) for m in maps]
        towers = [self.box_tower(m) for m in maps]
        sides = [F.relu(self.distances(t) * scale) for t, scale in zip(towers, self.scales.unbind(), strict=True)]
        raw = {
            "logits": flat_rows(classes),
            "distances": flat_rows(sides),
            "centerness": flat_rows([self.centerness(t) for t in towers]).squeeze(-1),
        }
        return raw, towers


def lay_points(maps: Sequence[Tensor], strides: Sequence[int]) -> dict[str, Tensor]:
    """``points`` (A, 2) of the maps in pixels, ``strides`` (A,) and ``levels`` (A,), the number of each point's map."""
    points = [grid_points((m.shape[2], m.shape[3]), s, m) for m, s in zip(maps, strides, strict=True)]
    return {
        "points": torch.cat(points),
        "strides": torch.cat([torch.full_like(p[:, 0], s) for p, s in zip(points, strides, strict=True)]),
        "levels": torch.cat([torch.full_like(p[:, 0], k, dtype=torch.int64) for k, p in enumerate(points)]),
    }


def interest_of(strides: Sequence[int], sizes: Sequence[float] | None = None) -> Tensor:
    """Smallest and largest distance (levels, 2) that each map answers for, in pixels; the last has no upper end.

    Args:
        strides: of the maps.
        sizes: borders between the maps, one fewer than maps; eight strides of the finer one if None: the paper's
            64, 128, 256, 512.

    Raises:
        ValueError: another number of borders, or borders or strides that do not grow.
    """
    if sorted(set(strides)) != list(strides):
        raise ValueError(f"expected maps whose strides grow from one to the next, got strides {list(strides)}")
    borders = [8.0 * s for s in strides[:-1]] if sizes is None else [float(s) for s in sizes]
    if len(borders) != len(strides) - 1 or sorted(set(borders)) != borders:
        raise ValueError(f"expected {len(strides) - 1} growing sizes of interest, one fewer than maps, got {borders}")
    return torch.tensor([[0.0, *borders], [*borders, math.inf]]).T


def match_points(
    raw: dict[str, Tensor],
    interest: Tensor,
    boxes: Sequence[Tensor],
    *,
    radius: float | None = 1.5,
    centres: Sequence[Tensor] | None = None,
) -> Tensor:
    """The row (N, A) of the batch's boxes, one after the other, that each point learns, or -1.

    Args:
        raw: with ``points``, ``strides`` and ``levels``.
        interest: as of ``interest_of``.
        boxes: (L, 4) of each image.
        radius: of centre sampling in strides; None takes the whole box.
        centres: (L, 2) of each image, instead of those of the boxes.
    """
    sizes = interest.to(raw["points"])[raw["levels"]]
    found, start = [], 0
    for k, box in enumerate(boxes):
        own = None if centres is None else centres[k]
        match = assign_points(raw["points"], raw["strides"], sizes, box, radius=radius, centres=own)
        found.append(torch.where(match >= 0, match + start, -1))
        start += len(box)
    return torch.stack(found)


def fcos_loss(
    raw: dict[str, Tensor],
    match: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    weighted: bool = True,
    smooth: float = 0.0,
) -> dict[str, Tensor]:
    """``classification``, ``localisation`` and ``centerness``; without a positive point the last two are zero.

    Focal loss over all points and 1 - GIoU and cross-entropy of the centerness over the positive ones. All are divided
    by the number of positives, the localisation by the sum of its weights; of several processes the mean.

    Args:
        raw: ``logits``, ``distances``, ``centerness``, ``points`` and ``strides``.
        match: (N, A), as of ``match_points``.
        boxes: (L, 4) of the whole batch.
        labels: (L,) from 1 to K.
        weighted: whether the true centerness weighs the localisation, as in the authors' code.
        smooth: as in ``distance_giou``; 1 in the authors' code.
    """
    wide = torch.promote_types(raw["logits"].dtype, torch.float32)
    logits = raw["logits"].to(wide)
    image, place = torch.nonzero(match >= 0, as_tuple=True)  # (P,)
    row = match[image, place]
    positives = _over_processes(logits.new_tensor(float(len(row)))).clamp(min=1)
    truth = torch.zeros_like(logits)
    truth[image, place, labels[row] - 1] = 1.0
    goal = distances_of(boxes[row].to(wide), raw["points"][place].to(wide)) / raw["strides"][place, None].to(wide)
    central = centerness_of(goal)  # (P,)
    weight = central if weighted else torch.ones_like(central)
    _, giou = distance_giou(raw["distances"][image, place].to(wide), goal, smooth=smooth)
    mass = _over_processes(weight.sum()).clamp(min=1e-6)
    guess = raw["centerness"][image, place].to(wide)
    return {
        "classification": sigmoid_focal_loss(logits, truth, reduction="sum") / positives,
        "localisation": ((1 - giou) * weight).sum() / mass,
        "centerness": F.binary_cross_entropy_with_logits(guess, central, reduction="sum") / positives,
    }


def fcos_detections(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float = 0.05,
    candidates: int = 1000,
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> list[tuple[Detections, Tensor]]:
    """Of each image its detections, boxes in pixels of ``image_sizes`` (height, width), and their points (D,).

    The score is the root of class times centerness; from each map the ``candidates`` best pairs of point and class;
    suppression within each class.

    Args:
        raw: as of ``FCOSHead`` and ``lay_points``.
        image_sizes: of the images before they were padded.
        score_threshold: of class times centerness, before the root.
        candidates: of each map.
        nms_threshold: overlap above which the lower score of a class goes.
        max_detections: of an image.
    """
    boxes = fcos_boxes(raw)
    scores = raw["logits"].float().sigmoid() * raw["centerness"].float().sigmoid()[..., None]  # (N, A, K)
    found = level_detections(
        boxes,
        scores,
        raw["levels"],
        image_sizes,
        score_threshold=score_threshold,
        candidates=candidates,
        nms_threshold=nms_threshold,
        max_detections=max_detections,
    )
    return [(Detections(one.boxes, one.labels, one.scores.sqrt()), rows) for one, rows in found]


def fcos_boxes(raw: dict[str, Tensor]) -> Tensor:
    """Boxes (N, A, 4) in pixels, float32, not cut to the image; ``raw`` as of ``fcos_detections``."""
    return boxes_of(raw["distances"].float() * raw["strides"].float()[:, None], raw["points"].float())


def scored_points(raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Boxes (N, A, 1, 4) cut to images of one ``size`` (height, width), and scores (N, A, K): the root of class times
    centerness."""
    boxes = fcos_boxes(raw)
    scores = raw["logits"].float().sigmoid() * raw["centerness"].float().sigmoid()[..., None]
    return clip_to(boxes, size)[:, :, None], scores.sqrt()


def level_detections(
    boxes: Tensor,
    scores: Tensor,
    levels: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float = 0.05,
    candidates: int = 1000,
    nms_threshold: float = 0.6,
    max_detections: int = 100,
) -> list[tuple[Detections, Tensor]]:
    """Of each image its detections, boxes cut to ``image_sizes`` (height, width), and their rows (D,).

    Args:
        boxes: (N, A, 4).
        scores: (N, A, K).
        levels: (A,), the number of each row's map, in order.
        image_sizes: of the images before they were padded.
        score_threshold: what does not score more is dropped.
        candidates: pairs of row and class of each map that go on.
        nms_threshold: overlap above which the lower score of a class goes.
        max_detections: of an image.
    """
    boxes = clip_boxes(boxes, torch.tensor(image_sizes, device=boxes.device))
    counts = levels.bincount().tolist()
    found = []
    for box, score in zip(boxes, scores, strict=True):
        parts = [_leading(part, score_threshold, candidates) for part in score.split(counts)]
        kept, label, value, row = best_detections(
            box[:, None],
            torch.cat(parts),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )
        found.append((Detections(kept, label, value), row))
    return found


def _leading(scores: Tensor, threshold: float, count: int) -> Tensor:
    """Scores (A, K) with -1 in the place of all but the ``count`` highest, where more are above the threshold."""
    if int((scores > threshold).sum()) <= count:
        return scores
    last = scores.flatten().topk(count).values[-1]
    return torch.where(scores >= last, scores, -1)


def _over_processes(value: Tensor) -> Tensor:
    """A number without gradient, the mean of all processes."""
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value
