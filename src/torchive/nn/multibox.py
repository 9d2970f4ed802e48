"""Default boxes over several maps: shapes, matching, loss, decoding and verbs of SSD, for all that stand on it.

Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, arXiv:1512.02325. N images, A default boxes, K classes
without background; boxes are in fractions of the image until they are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import box_iou

from torchive.nn.multibox_sources import PyramidSources, VGGSources
from torchive.ops.anchors import default_boxes, default_scales, default_shapes
from torchive.ops.boxes import code_iou, decode_boxes, encode_boxes
from torchive.ops.images import check_images, image_sizes, side_factors, stack_resized, training_targets
from torchive.ops.matching import hard_negatives, match_default_boxes
from torchive.ops.suppression import has_area
from torchive.structures import Detections

Mode = Literal["softmax", "sigmoid"]
BoxSet = Literal["paper", "torchvision"]

TORCHVISION_SCALES = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
TORCHVISION_STEPS = (8, 16, 32, 64, 100, 300)

#: Variances 0.1 and 0.2 as weights of the code.
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def source_shapes(sources: int, box_set: BoxSet = "paper") -> list[list[tuple[float, float]]]:
    """Width and height of the default boxes of a cell, for each source: ratio 3 only between the first source and the
    last two. From seven sources on the scales are those of SSD512 (section 3.1): 0.07, then 0.15 to 0.9.

    Args:
        sources: how many maps there are.
        box_set: "paper", or "torchvision", the authors' COCO setting of six sources, cut to the image.
    """
    wide = range(1, max(sources - 2, 2)) if sources > 1 else range(1)
    ratios = [(2.0, 3.0) if k in wide else (2.0,) for k in range(sources)]
    lowest = {"low": 0.15, "first": 0.07} if sources >= 7 else {}
    scales = default_scales(sources, **lowest) if box_set == "paper" else list(TORCHVISION_SCALES)
    shapes = [default_shapes(scales[k], scales[k + 1], ratios[k]) for k in range(sources)]
    if box_set == "torchvision":
        shapes = [[(min(w, 1.0), min(h, 1.0)) for w, h in shape] for shape in shapes]
    return shapes


def source_steps(image_size: int, box_set: BoxSet = "paper") -> tuple[float, ...] | None:
    """Distances of the centres in fractions of the image, for each source; None for one cell, the paper's choice."""
    return None if box_set == "paper" else tuple(step / image_size for step in TORCHVISION_STEPS)


def match_targets(
    anchors: Tensor,
    sizes: Sequence[tuple[int, int]],
    targets: Sequence[dict[str, Tensor]],
    iou_threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """SSD's matching of a batch.

    Args:
        anchors: (A, 4) in fractions of the image.
        sizes: height and width of each image.
        targets: ``boxes`` in pixels of these images.
        iou_threshold: a default box overlapping an object by more is positive.

    Returns:
        Row (N, A) of each default box's object among those of the whole batch, -1 for background; and the boxes (L, 4)
        of the batch in fractions.
    """
    matches, boxes, start = [], [], 0
    for target, (height, width) in zip(targets, sizes, strict=True):
        box = target["boxes"].float() / target["boxes"].new_tensor([width, height] * 2, dtype=torch.float32)
        match = match_default_boxes(box_iou(box, anchors), iou_threshold)
        matches.append(torch.where(match >= 0, match + start, match))
        boxes.append(box)
        start += len(box)
    return torch.stack(matches), torch.cat(boxes)


def confidence_loss(
    logits: Tensor, labels: Tensor, mode: Mode, loss: nn.Module | None = None, ious: Tensor | None = None
) -> Tensor:
    """What each default box costs, (N, A), for labels 0 (background) to K.

    ``softmax``: cross-entropy of (N, A, K + 1) logits. ``sigmoid``: the sum of K binary cross-entropies of (N, A, K)
    logits, or of what ``loss`` gives for these logits and their truths. A loss with ``takes_ious`` is given rows, and
    the overlaps ``ious`` (N, A) of the regressed boxes of positives; with a softmax it has labels for truths.
    """
    if loss is not None and ious is not None and getattr(loss, "takes_ious", False):
        truth = labels.flatten()
        if mode == "sigmoid":
            truth = F.one_hot(truth, logits.shape[-1] + 1)[:, 1:].to(logits.dtype)
        rows: Tensor = loss(logits.flatten(0, 1), truth, ious.flatten())
        return rows.view(*labels.shape, -1).sum(-1)
    if mode == "softmax":
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    truth = F.one_hot(labels, logits.shape[-1] + 1)[..., 1:].to(logits.dtype)
    if loss is not None:
        each: Tensor = loss(logits, truth)
        return each.sum(-1)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(-1)


def classification_loss(
    logits: Tensor,
    matches: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "softmax",
    mining_ratio: float | None = 3.0,
    loss: nn.Module | None = None,
    ious: Tensor | None = None,
) -> Tensor:
    """The sum of the confidence losses of the positives and the mined negatives over the number of positives.

    Zero, with a gradient, where nothing is matched. Arguments as of ``multibox_loss`` and ``confidence_loss``.
    """
    positive = matches >= 0  # (N, A)
    target = matches.new_zeros(matches.shape)
    target[positive] = labels[matches[positive]]
    confidence = confidence_loss(logits, target, mode, loss, ious)  # (N, A)
    negative = ~positive if mining_ratio is None else hard_negatives(confidence, positive, mining_ratio)
    return (confidence * (positive | negative)).sum() * per_positive(positive, confidence.dtype)


def per_positive(positive: Tensor, dtype: torch.dtype) -> Tensor:
    """One over the number of positives, and zero where there is none."""
    count = positive.sum()
    return (count > 0).to(dtype) / count.clamp(min=1)


def multibox_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    matches: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    mode: Mode = "softmax",
    mining_ratio: float | None = 3.0,
    alpha: float = 1.0,
    loss: nn.Module | None = None,
    localisation_loss: nn.Module | None = None,
) -> dict[str, Tensor]:
    """``classification`` and ``localisation``, both over the number of matched default boxes of the batch.

    Boxes are coded and held against ``deltas`` in float32 at least: half precision does not hold a corner.

    Args:
        logits: (N, A, K + 1), or (N, A, K) with sigmoids.
        deltas: (N, A, 4).
        anchors: (A, 4) in the units of ``boxes``.
        matches: (N, A), row of ``boxes`` of each default box, -1 for background.
        boxes, labels: (L, 4) and (L,) of the whole batch.
        mode: one softmax or K sigmoids.
        mining_ratio: hardest negatives for each positive; None counts all negatives.
        alpha: weight of the localisation.
        loss: of sigmoid logits and truths, instead of binary cross-entropy; or one with ``takes_ious``.
        localisation_loss: of codes (P, 4) and their targets, and of their overlaps where it ``takes_ious``, to each
            number, instead of smooth L1.
    """
    positive = matches >= 0  # (N, A)
    rows = torch.nonzero(positive)  # (P, 2)
    wide = torch.promote_types(deltas.dtype, torch.float32)
    code = encode_boxes(boxes[matches[positive]].to(wide), anchors[rows[:, 1]].to(wide), WEIGHTS)
    found = deltas[positive].to(wide)
    overlap = ious = None
    if any(getattr(part, "takes_ious", False) for part in (loss, localisation_loss)):
        overlap = code_iou(found.detach(), code, WEIGHTS)
        ious = torch.zeros_like(deltas[..., 0], dtype=wide).masked_scatter(positive, overlap)  # (N, A)
    if localisation_loss is None:
        localisation = F.smooth_l1_loss(found, code, reduction="sum")
    else:
        given = (overlap,) if getattr(localisation_loss, "takes_ious", False) else ()
        localisation = localisation_loss(found, code, *given).sum()
    options = {"mode": mode, "mining_ratio": mining_ratio, "loss": loss, "ious": ious}
    return {
        "classification": classification_loss(logits, matches, labels, **options),  # type: ignore[arg-type]
        "localisation": alpha * localisation * per_positive(positive, localisation.dtype),
    }


def scored_multibox(raw: dict[str, Tensor], size: Sequence[int], *, mode: Mode = "softmax") -> tuple[Tensor, Tensor]:
    """As ``decode_multibox``: boxes (N, A, 1, 4) in pixels of images of ``size`` (height, width), scores (N, A, K)."""
    boxes, scores = _boxes_and_scores(raw, mode)
    return (boxes * side_factors(boxes.new_ones(1, 2), size)[:, None])[:, :, None], scores


def _boxes_and_scores(raw: dict[str, Tensor], mode: Mode) -> tuple[Tensor, Tensor]:
    """Boxes (N, A, 4) in fractions of the image, and scores (N, A, K)."""
    boxes = decode_boxes(raw["deltas"].float(), raw["anchors"].float(), WEIGHTS).clamp(0, 1)
    logits = raw["logits"].float()
    return boxes, logits.softmax(-1)[..., 1:] if mode == "softmax" else logits.sigmoid()


def decode_multibox(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    mode: Mode = "softmax",
    score_threshold: float = 0.01,
    candidates: int = 400,
    nms_threshold: float = 0.45,
    max_detections: int = 200,
) -> list[Detections]:
    """One ``Detections`` per image, boxes in pixels of ``image_sizes`` (height, width).

    For each class the ``candidates`` best scores above the threshold; sides below a hundredth of a pixel are dropped;
    suppression within each class; the best of all classes.

    Args:
        raw: ``logits`` and ``deltas`` as of ``multibox_loss``, ``anchors`` (A, 4) in fractions of the image.
        image_sizes: of the images that went in.
        mode: one softmax or K sigmoids.
        score_threshold, candidates, nms_threshold, max_detections: as above.
    """
    boxes, scores = _boxes_and_scores(raw, mode)
    best, where = scores.transpose(1, 2).topk(min(candidates, scores.shape[1]), dim=2)  # (N, K, candidates)
    labels = torch.arange(1, scores.shape[2] + 1, device=scores.device)[:, None].expand(best.shape[1:])
    found = []
    for box, score, index, (height, width) in zip(boxes, best, where, image_sizes, strict=True):
        box = box[index] * box.new_tensor([width, height, width, height])  # (K, candidates, 4)
        sure = (score > score_threshold) & has_area(box)
        box, score, label = box[sure], score[sure], labels[sure]
        kept = torchvision.ops.batched_nms(box, score, label, nms_threshold)[:max_detections]
        found.append(Detections(box[kept], label[kept], score[kept]))
    return found


class MultiBoxDetector(nn.Module):
    """A detector of default boxes over the maps of its backbone: all but the constructor.

    A subclass sets what is declared here, and ``shapesK`` (B, 2) for each K of ``sources``: width and height of a
    cell's default boxes on that map.
    """

    task = "detection"
    classification: Mode = "softmax"
    num_classes: int
    in_channels: int
    image_size: int
    mining_ratio: float | None
    iou_threshold: float
    sources: tuple[int, ...]
    steps: tuple[float, ...] | None
    backbone: VGGSources | PyramidSources
    head: nn.Module

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """``logits`` (N, A, K + 1), or (N, A, K) with sigmoids, ``deltas`` (N, A, 4), ``anchors`` (A, 4) in fractions
        of the image."""
        check_images(inputs, self.in_channels)
        x = inputs if isinstance(inputs, Tensor) else self._resize(inputs)
        if min(x.shape[2:]) < self.backbone.smallest:
            raise ValueError(f"each side must be at least {self.backbone.smallest}, got {tuple(x.shape[2:])}")
        maps = self._maps(x)
        out: dict[str, Tensor] = self.head(maps)
        shapes = [getattr(self, f"shapes{k}") for k in self.sources]
        anchors = default_boxes([m.shape[2:] for m in maps], shapes, self.steps)
        return {"logits": out["cls_logits"], "deltas": out["bbox_regression"], "anchors": anchors}

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``classification`` and ``localisation``, both zero where no default box is matched."""
        check_images(inputs, self.in_channels)
        sizes = image_sizes(inputs)
        targets = training_targets(targets, len(sizes), self.num_classes)
        raw = self(self._resize(inputs))
        matches, boxes = match_targets(raw["anchors"], sizes, targets, self.iou_threshold)
        labels = torch.cat([target["labels"] for target in targets])
        options = {"mode": self.classification, "mining_ratio": self.mining_ratio, **self._loss_options()}
        return multibox_loss(raw["logits"], raw["deltas"], raw["anchors"], matches, boxes, labels, **options)

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode_multibox(raw, image_sizes, mode=self.classification, **options)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.01,
        candidates: int = 400,
        nms_threshold: float = 0.45,
        max_detections: int = 200,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in."""
        check_images(inputs, self.in_channels)
        return self.decode(
            self(self._resize(inputs)),
            image_sizes(inputs),
            score_threshold=score_threshold,
            candidates=candidates,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, P, 1, 4) in pixels of images of ``size`` (height, width), scores
        (N, P, K)."""
        return scored_multibox(raw, size, mode=self.classification)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """The maps that the heads read, one for each of ``sources``."""
        maps = self.backbone(x)
        return [maps[k] for k in self.sources]

    def _loss_options(self) -> dict[str, Any]:
        """Further options of ``multibox_loss``."""
        return {}

    def _resize(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        return stack_resized(inputs, (self.image_size, self.image_size))
