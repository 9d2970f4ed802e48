"""RetinaNet: a dense detector over a feature pyramid, whose losses can be exchanged.

Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002. The towers and
the matcher are torchvision's; with its losses and normaliser the model is torchvision's RetinaNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import sigmoid_focal_loss

from torchive.nn.prior import init_classifier
from torchive.nn.pyramid import Pyramid
from torchive.ops.anchors import cell_anchors, grid_anchors
from torchive.ops.boxes import clip_boxes, code_iou, decode_boxes, encode_boxes
from torchive.ops.images import (
    batch_images,
    box_factors,
    check_images,
    image_sizes,
    scale_targets,
    side_factors,
    training_targets,
)
from torchive.ops.matching import IGNORED, match_anchors
from torchive.structures import Detections

Normaliser = Literal["batch", "image"]


class DenseDetector(nn.Module):
    """A detector of which every position's classes and codes come out; ``forward`` gives what ``decode_dense`` takes.

    It sets ``in_channels`` and ``image_size``.
    """

    task = "detection"
    in_channels: int
    image_size: int | None

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode_dense(raw, image_sizes, **options)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        candidates: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in."""
        return self.decode(
            self(inputs),
            image_sizes(inputs),
            score_threshold=score_threshold,
            candidates=candidates,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, A, 1, 4) in pixels of images of ``size`` (height, width), scores
        (N, A, K)."""
        return scored_dense(raw, size)

    def _batch(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images resized and padded to (N, C, H, W), and their sizes (N, 2) before padding."""
        check_images(inputs, self.in_channels)
        return batch_images(inputs, shorter=self.image_size)


class RetinaNet(DenseDetector):
    """One-stage detector: images (N, C, H, W), or a list of (C, H, W), to class scores and box codes of A anchors.

    Boxes go in and come out in pixels of the images given.

    Args:
        num_classes: K; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        channels: of the pyramid's maps and of the towers.
        image_size: shorter side to which images are resized, the longer at most 5/3 of it; as they are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 2^0, 2^(1/3), 2^(2/3) times four strides if
            None.
        aspect_ratios: height / width of the anchors.
        classification_loss: of logits (R, K) and truths (R, K), to each entry; focal loss if None.
        localisation_loss: of codes (P, 4) and their targets, to each number or row; smooth L1 of beta 0.11 if None,
            ``torch.nn.L1Loss`` is torchvision's. Losses have the reduction "none". One with ``takes_ious`` is given
            the overlap of each regressed box with its object as well, (R,) or (P,), without gradient.
        normaliser: what sums are divided by: the positives of the "batch", or of each "image", then the mean over
            images, which is torchvision's.
        prior: score of every anchor at the start.

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        channels: int = 256,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        classification_loss: nn.Module | None = None,
        localisation_loss: nn.Module | None = None,
        normaliser: Normaliser = "batch",
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        if normaliser not in ("batch", "image"):
            raise ValueError(f"normaliser must be batch or image, got {normaliser!r}")
        for loss in (classification_loss, localisation_loss):
            if getattr(loss, "reduction", "none") != "none":
                raise ValueError(f"a loss must have the reduction none, got {loss.reduction!r}")  # type: ignore[union-attr]
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.normaliser: Normaliser = normaliser
        self.classification_loss, self.localisation_loss = classification_loss, localisation_loss
        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels, finest=8, top="convolutions")
        self.strides = tuple(level.stride for level in self.backbone.levels)
        if anchor_sizes is None:
            anchor_sizes = [[int(4 * s * 2 ** (k / 3)) for k in range(3)] for s in self.strides]
        if len(anchor_sizes) != len(self.strides) or len({len(sizes) for sizes in anchor_sizes}) != 1:
            raise ValueError(
                f"anchor_sizes must have {len(self.strides)} lists of one length, one for each map, "
                f"got {list(anchor_sizes)}"
            )
        for k, sizes in enumerate(anchor_sizes):
            self.register_buffer(f"cell{k}", cell_anchors(sizes, aspect_ratios), persistent=False)
        self.head = RetinaNetHead(channels, len(anchor_sizes[0]) * len(aspect_ratios), num_classes)
        init_classifier(self.head.classification_head.cls_logits, prior=prior)
        self.matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs of A anchors, map by map, row by row, cell by cell.

        ``logits`` (N, A, K), ``deltas`` (N, A, 4), ``anchors`` (A, 4) in pixels of the batch, ``levels`` (A,), the
        number of each anchor's map, and ``sizes`` (N, 2), height and width of the images in the batch.
        """
        x, sizes = self._batch(inputs)
        maps = self.backbone(x)
        cells: list[Tensor] = [getattr(self, f"cell{k}") for k in range(len(maps))]
        return tower_rows(self.head, maps) | lay_anchors(maps, self.strides, cells) | {"sizes": sizes}

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``classification`` and ``localisation``; without boxes the second is zero."""
        raw = self(inputs)
        targets = training_targets(targets, len(raw["logits"]), self.num_classes)
        targets = scale_targets(targets, raw["sizes"], image_sizes(inputs))
        matches = torch.stack([match_anchors(raw["anchors"], target["boxes"], self.matcher) for target in targets])
        return dense_loss(
            raw,
            matches,
            targets,
            classification=self.classification_loss,
            localisation=self.localisation_loss,
            normaliser=self.normaliser,
        )


def tower_rows(head: RetinaNetHead, maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """``logits`` (N, A, K) and ``deltas`` (N, A, 4) of maps (N, C, H, W), map by map, row by row, cell by cell.

    As torchvision's ``head(maps)``, whose views make sizes that are not known an expression which an export takes
    minutes to solve.
    """
    scores, boxes = head.classification_head, head.regression_head
    return {
        "logits": _rows([scores.cls_logits(scores.conv(m)) for m in maps], scores.num_classes),
        "deltas": _rows([boxes.bbox_reg(boxes.conv(m)) for m in maps], 4),
    }


def lay_anchors(maps: Sequence[Tensor], strides: Sequence[int], cells: Sequence[Tensor]) -> dict[str, Tensor]:
    """``anchors`` (A, 4) of the maps in pixels, each map's own cell (B, 4) at every place, and ``levels`` (A,), the
    number of each anchor's map."""
    anchors = [grid_anchors(m.shape[2:], s, c) for m, s, c in zip(maps, strides, cells, strict=True)]
    levels = [torch.full_like(a[:, 0], k, dtype=torch.int64) for k, a in enumerate(anchors)]
    return {"anchors": torch.cat(anchors), "levels": torch.cat(levels)}


def dense_loss(
    raw: dict[str, Tensor],
    matches: Tensor,
    targets: Sequence[dict[str, Tensor]],
    *,
    classification: nn.Module | None = None,
    localisation: nn.Module | None = None,
    normaliser: Normaliser = "batch",
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
) -> dict[str, Tensor]:
    """``classification`` and ``localisation`` of anchors with their matches.

    Args:
        raw: ``logits`` (N, A, K), ``deltas`` (N, A, 4), ``anchors`` (A, 4), or (N, A, 4) where images have their own.
        matches: (N, A), as of ``match_anchors``.
        targets: dicts with ``boxes`` (L, 4), in the anchors' pixels, and ``labels`` (L,).
        classification, localisation, normaliser: as of ``RetinaNet``.
        weights: of the box code.
    """
    wide = torch.promote_types(raw["deltas"].dtype, torch.float32)
    logits, deltas, anchors = (raw[key].to(wide) for key in ("logits", "deltas", "anchors"))
    positive = matches >= 0
    image, place = torch.nonzero(positive, as_tuple=True)  # (P,)
    first = torch.tensor([0, *(len(target["labels"]) for target in targets)], device=matches.device).cumsum(0)
    row = matches[image, place] + first[image]
    boxes, labels = (torch.cat([target[key] for target in targets]) for key in ("boxes", "labels"))
    code = encode_boxes(boxes[row].to(wide), anchors[place] if anchors.ndim == 2 else anchors[image, place], weights)
    found = deltas[image, place]  # (P, 4)
    truth = torch.zeros_like(logits)
    truth[image, place, labels[row] - 1] = 1
    overlap = code_iou(found.detach(), code, weights)

    flat, wanted = logits.flatten(0, 1), truth.flatten(0, 1)
    if classification is None:
        each = sigmoid_focal_loss(flat, wanted)
    elif getattr(classification, "takes_ious", False):
        spread = torch.zeros_like(deltas[..., 0])
        spread[image, place] = overlap
        each = classification(flat, wanted, spread.flatten())
    else:
        each = classification(flat, wanted)
    each = each.view(*matches.shape, -1).sum(-1)  # (N, A)
    score = torch.where(matches == IGNORED, 0, each).sum(1)  # (N,)

    if localisation is None:
        number = F.smooth_l1_loss(found, code, beta=0.11, reduction="none")
    elif getattr(localisation, "takes_ious", False):
        number = localisation(found, code, overlap)
    else:
        number = localisation(found, code)
    place_cost = number.flatten(1).sum(1)  # (P,)
    box = torch.zeros_like(score).index_add(0, image, place_cost)  # (N,)
    count = positive.sum(1)  # (N,)
    if normaliser == "image":
        score, box = score / count.clamp(min=1) / len(count), box / count.clamp(min=1) / len(count)
    else:
        score, box = score / count.sum().clamp(min=1), box / count.sum().clamp(min=1)
    return {"classification": score.sum(), "localisation": box.sum()}


def scored_dense(
    raw: dict[str, Tensor], size: Sequence[int], *, weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Boxes (N, A, 1, 4) in pixels of images of one ``size`` (height, width), scores (N, A, K); as ``decode_dense``."""
    boxes = clip_boxes(decode_boxes(raw["deltas"].float(), raw["anchors"].float(), weights), raw["sizes"])
    return (boxes * side_factors(raw["sizes"].float(), size)[:, None])[:, :, None], raw["logits"].float().sigmoid()


def decode_dense(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float = 0.05,
    candidates: int = 1000,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
) -> list[Detections]:
    """One ``Detections`` per image, boxes in pixels of ``image_sizes`` (height, width).

    Of each map the ``candidates`` best pairs of box and class above the threshold; suppression within each class.

    Args:
        raw: as of ``RetinaNet.forward``; ``anchors`` may be (N, A, 4).
        image_sizes: of the images that went in.
        score_threshold, candidates, nms_threshold, max_detections: as above.
        weights: of the box code.
    """
    scores, start, parts = raw["logits"].float().sigmoid(), 0, []
    classes = scores.shape[2]
    for level in scores.split(raw["levels"].bincount().tolist(), 1):
        flat = level.flatten(1)
        parts.append(flat.topk(min(candidates, flat.shape[1]), 1).indices + start * classes)
        start += level.shape[1]
    pick = torch.cat(parts, 1)  # (N, M)
    best = scores.flatten(1).gather(1, pick)
    row = torch.div(pick, classes, rounding_mode="floor")[..., None].expand(-1, -1, 4)
    anchors = raw["anchors"].float().expand(scores.shape[0], -1, -1).gather(1, row)
    boxes = decode_boxes(raw["deltas"].float().gather(1, row), anchors, weights)
    boxes, labels = clip_boxes(boxes, raw["sizes"]), pick % classes + 1
    found = []
    for box, score, label, size, original in zip(boxes, best, labels, raw["sizes"], image_sizes, strict=True):
        sure = score > score_threshold
        box, score, label = box[sure], score[sure], label[sure]
        kept = torchvision.ops.batched_nms(box, score, label, nms_threshold)[:max_detections]
        found.append(Detections(box[kept] * box_factors(size.to(box.dtype), original), label[kept], score[kept]))
    return found


def _rows(maps: Sequence[Tensor], width: int) -> Tensor:
    """Maps (N, B * width, H, W) as rows (N, A, width), map by map, row by row, cell by cell."""
    parts = [m.permute(0, 2, 3, 1).unflatten(3, (m.shape[1] // width, width)).flatten(1, 3) for m in maps]
    return torch.cat(parts, 1)
