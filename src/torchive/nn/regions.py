"""The second stage of a detector: which proposals learn what, their pooled features, scores, offsets and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import box_iou

from torchive.ops.boxes import clip_boxes, decode_boxes, encode_boxes
from torchive.ops.images import box_factors, side_factors
from torchive.ops.roi import pool_regions
from torchive.ops.soft_suppression import soft_detections
from torchive.ops.suppression import best_detections
from torchive.structures import Detections

#: Weights of a second stage's box code, the inverse of its standard deviations 0.1 and 0.2.
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@dataclass(frozen=True)
class Regions:
    """R sampled regions of a batch, image by image.

    ``boxes`` (R, 4), ``image`` (R,) the number of their image, ``labels`` (R,) 0 for background, ``matched`` (R,) the
    row of the image's target and ``truth`` (R, 4) its box, of an image without boxes row 0 and zeros.
    """

    boxes: Tensor
    image: Tensor
    labels: Tensor
    matched: Tensor
    truth: Tensor


def sample_regions(
    proposals: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    *,
    threshold: float = 0.5,
    count: int = 512,
    positives: float = 0.25,
) -> Regions:
    """Proposals of each image drawn for training, its own boxes among them; torchvision's matcher and sampler.

    Args:
        proposals: (P, 4) of each image.
        targets: dicts with ``boxes`` (L, 4) and ``labels`` (L,).
        threshold: overlap from which a proposal has its best box's label; below it is background.
        count: regions of an image at most.
        positives: share of ``count`` that may be positive.
    """
    matcher = Matcher(threshold, threshold, allow_low_quality_matches=False)
    sampler = BalancedPositiveNegativeSampler(count, positives)
    parts = []
    for k, (proposal, target) in enumerate(zip(proposals, targets, strict=True)):
        own = target["boxes"].to(proposal)
        box = torch.cat([proposal.detach(), own])
        matched = torch.zeros_like(box[:, 0], dtype=torch.int64)
        label, truth = torch.zeros_like(matched), torch.zeros_like(box)
        if len(own) and len(box):
            found = matcher(box_iou(own, box))
            matched = found.clamp(min=0)
            label, truth = target["labels"][matched].masked_fill(found < 0, 0), own[matched]
        positive, negative = sampler([label])
        drawn = torch.nonzero(positive[0] | negative[0])[:, 0]
        parts.append((box[drawn], torch.full_like(drawn, k), label[drawn], matched[drawn], truth[drawn]))
    return join_regions([Regions(*part) for part in parts])


def join_regions(parts: Sequence[Regions]) -> Regions:
    """Regions one after the other."""
    return Regions(*(torch.cat([getattr(part, name) for part in parts]) for name in Regions.__dataclass_fields__))


def take_regions(regions: Regions, rows: Tensor) -> Regions:
    """Some of the regions, by their numbers or by a mask (R,)."""
    return Regions(*(getattr(regions, name)[rows] for name in Regions.__dataclass_fields__))


def region_maps(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Sequence[Tensor], Sequence[int]]:
    """The maps that regions are pooled from, with their strides: the pooled one on top serves the proposals only."""
    return (maps, strides) if len(maps) == 1 else (maps[:-1], strides[:-1])


def region_loss(
    logits: Tensor,
    deltas: Tensor,
    regions: Regions,
    *,
    boxes: Tensor | None = None,
    weights: tuple[float, float, float, float] = WEIGHTS,
    beta: float = 1 / 9,
    classification: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> tuple[Tensor, Tensor]:
    """Loss of the class scores, and smooth L1 of the positive regions' offsets over all R regions.

    Args:
        logits: (R, K + 1), background first.
        deltas, regions, boxes, weights, beta: as of ``offset_errors``.
        classification: of logits and labels, to a scalar.
    """
    labels = regions.labels
    offsets = offset_errors(deltas, regions, boxes=boxes, weights=weights, beta=beta).sum() / max(len(labels), 1)
    score = classification(logits, labels) if len(labels) else logits.sum() * 0
    return score, offsets


def region_codes(regions: Regions, *, weights: tuple[float, float, float, float] = WEIGHTS) -> Tensor:
    """The code (R, 4) of each positive region's box relative to the region, zeros for background."""
    positive = torch.nonzero(regions.labels > 0)[:, 0]
    code = encode_boxes(regions.truth[positive], regions.boxes[positive], weights)
    return torch.zeros_like(regions.boxes).index_copy(0, positive, code)


def offset_errors(
    deltas: Tensor,
    regions: Regions,
    *,
    boxes: Tensor | None = None,
    weights: tuple[float, float, float, float] = WEIGHTS,
    beta: float = 1 / 9,
) -> Tensor:
    """Smooth L1 (R,) of each positive region's offsets, zero for background.

    Args:
        deltas: (R, 4 (K + 1)), or (R, 4) where the classes share them.
        regions: as of ``sample_regions``.
        boxes: (R, 4), what the offsets are relative to, if not the regions' own; gradients flow into them.
        weights: of the box code.
        beta: error up to which the loss is a square.
    """
    positive = torch.nonzero(regions.labels > 0)[:, 0]
    reference = regions.boxes if boxes is None else boxes
    code = encode_boxes(regions.truth[positive].to(reference), reference[positive], weights)
    found = of_class(deltas, regions.labels)[positive]
    error = F.smooth_l1_loss(found, code.to(found), beta=beta, reduction="none").sum(1)
    return error.new_zeros(len(regions.labels)).index_add(0, positive, error)


def of_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """The offsets (R, 4) of each region's class among (R, 4 (K + 1)), or (R, 4) where the classes share them."""
    rows = deltas.unflatten(1, (-1, 4))
    column = labels if rows.shape[1] > 1 else torch.zeros_like(labels)
    return rows[torch.arange(len(labels), device=labels.device), column]


class RegionStage(nn.Module):
    """Pooled features of regions to class scores and offsets: RoIAlign, two layers, two outputs.

    Args:
        channels: C of the maps.
        num_classes: K.
        hidden: of the two layers.
        size: side of the pooled features.
        box_head: pooled features (R, C, size, size) to (R, hidden); two layers if None.
        box_predictor: of these to logits (R, K + 1) and deltas (R, 4 (K + 1)); two linear layers if None.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 1024,
        size: int = 7,
        box_head: nn.Module | None = None,
        box_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.box_head = box_head if box_head is not None else TwoMLPHead(channels * size**2, hidden)
        self.box_predictor = box_predictor if box_predictor is not None else FastRCNNPredictor(hidden, num_classes + 1)

    def forward(
        self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits and deltas of boxes (R, 4), in pixels of the batch, on the images ``image`` (R,)."""
        logits, deltas = self.box_predictor(self.box_head(pool_regions(maps, strides, boxes, image, size=self.size)))
        return logits, deltas


def image_of(proposals: Tensor) -> Tensor:
    """Number of the image (N P,) of each row of proposals (N, P, 4)."""
    images, count = proposals.shape[:2]
    return torch.arange(images, device=proposals.device)[:, None].expand(images, count).flatten()


def class_boxes(
    raw: dict[str, Tensor],
    *,
    proposals_only: bool = False,
    sigmoid: bool = False,
    weights: tuple[float, float, float, float] = WEIGHTS,
) -> tuple[Tensor, Tensor]:
    """Boxes (N, P, K, 4), or (N, P, 1, 4) where the classes share them, and scores (N, P, K), -1 where a row is empty;
    of proposals alone (N, P, 1, 4) and (N, P, 1).

    ``raw`` and the options are those of ``decode_regions``.
    """
    kind = torch.promote_types(raw["proposals"].dtype, torch.float32)
    proposals, scores = raw["proposals"].to(kind)[:, :, None], raw["proposal_scores"].to(kind)[..., None]
    if proposals_only:
        return proposals, torch.where(scores >= 0, scores, -1)
    logits, deltas = raw["class_logits"].to(kind), raw["box_deltas"].to(kind).unflatten(2, (-1, 4))
    boxes = decode_boxes(deltas[:, :, 1:] if deltas.shape[2] > 1 else deltas, proposals, weights)
    sure = (logits.sigmoid() if sigmoid else logits.softmax(-1))[..., 1:]
    return clip_boxes(boxes, raw["sizes"]), torch.where(scores >= 0, sure, -1)


def scored_regions(raw: dict[str, Tensor], size: Sequence[int], **coding: Any) -> tuple[Tensor, Tensor]:
    """``class_boxes``, in pixels of images of one ``size`` (height, width) that went in."""
    boxes, scores = class_boxes(raw, **coding)
    return boxes * side_factors(raw["sizes"].to(boxes.dtype), size)[:, None, None], scores


def decode_regions(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    soft_sigma: float | None = None,
    proposals_only: bool = False,
    sigmoid: bool = False,
    weights: tuple[float, float, float, float] = WEIGHTS,
) -> list[Detections]:
    """One ``Detections`` per image, boxes in pixels of ``image_sizes`` (height, width); suppression within each class.

    Args:
        raw: ``proposals`` (N, P, 4), ``proposal_scores`` (N, P), negative where a row is empty, ``sizes`` (N, 2), and
            of a second stage ``class_logits`` (N, P, K + 1) and ``box_deltas`` (N, P, 4 (K + 1)) or (N, P, 4).
        image_sizes: of the images that went in.
        score_threshold, nms_threshold, max_detections: as of ``best_detections``.
        soft_sigma: lower the scores of what overlaps, as ``soft_detections`` does, instead of dropping it.
        proposals_only: there is no second stage: the proposals are the detections, of class 1, scored by their
            objectness.
        sigmoid: whether each class's logit is a score of its own; the background's is left out then.
        weights: of the box code.
    """
    boxes, scores = class_boxes(raw, proposals_only=proposals_only, sigmoid=sigmoid, weights=weights)
    suppress: Callable[..., tuple[Tensor, ...]] = partial(best_detections, nms_threshold=nms_threshold)
    if soft_sigma is not None:
        suppress = partial(soft_detections, sigma=soft_sigma)
    found = []
    for box, score, size, original in zip(boxes, scores, raw["sizes"], image_sizes, strict=True):
        kept, label, sure, _ = suppress(box, score, score_threshold=score_threshold, max_detections=max_detections)
        found.append(Detections(kept * box_factors(size, original), label, sure))
    return found
