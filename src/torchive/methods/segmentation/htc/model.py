"""The system: features, proposals, the two cascades in turn, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.segmentation.htc.mask_cascade import MaskCascade
from torchive.methods.segmentation.htc.semantic import FusedSemanticBranch
from torchive.nn.box_cascade import BoxCascade, kept_proposals
from torchive.nn.mask_head import detection_masks, mask_loss, mask_targets, positive_regions
from torchive.nn.pixel_cross_entropy import PixelCrossEntropy
from torchive.nn.pyramid import Pyramid
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import region_maps
from torchive.nn.two_stage import DetectsInForward
from torchive.ops.images import box_factors, image_sizes, scale_targets, training_targets
from torchive.ops.masks import IGNORED, check_masks, paste_masks, semantic_targets
from torchive.ops.roi import pool_regions
from torchive.ops.suppression import fixed_detections
from torchive.structures import Detections


class HTC(DetectsInForward):
    """Instance segmentation by a cascade: images (N, C, H, W), or a list of (C, H, W), to boxes, scores and masks.

    Targets hold ``boxes``, ``labels`` and ``masks``, and may hold ``semantic`` (H, W), the class of every pixel: 0
    background, 1 to K the things, above K what else there is, 255 where nothing is known. Without it the semantic
    branch learns the things' masks. With ``stages=1`` and the switches off it is Mask R-CNN with boxes that the
    classes share; ``interleaved``, ``mask_flow`` and ``semantic`` off is Cascade Mask R-CNN.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        channels: of the pyramid's maps and of the mask and semantic branches.
        hidden: of each box stage's two layers.
        image_size: shorter side to which images are resized (the paper's 800), the longer at most 5/3 of it; as they
            are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 32 on the finest, doubled on the next, if
            None.
        aspect_ratios: height / width of the anchors.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        rois_per_image: boxes that train a stage.
        stages: T, at most three.
        interleaved: the mask stage learns the boxes that the box stage has just refined; otherwise both learn the
            same.
        mask_flow: each mask stage reads the features of the one before.
        semantic: the semantic branch.
        semantic_classes: its number of classes; K + 1 if None. 183 in the release.
        semantic_into: which regions the branch's embedding is added to.
        semantic_weight: beta.
        resize_first: order in the semantic branch, as in ``FusedSemanticBranch``; True in the release.
        mask_from: "mean" of the stages' masks, or the "last" one's, as the release does.

    Raises:
        ValueError: an argument outside the above.
    """

    detected: ClassVar[dict[str, Any]] = {"score_threshold": 0.001, "nms_threshold": 0.5, "max_detections": 100}

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        channels: int = 256,
        hidden: int = 1024,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        rois_per_image: int = 512,
        stages: int = 3,
        interleaved: bool = True,
        mask_flow: bool = True,
        semantic: bool = True,
        semantic_classes: int | None = None,
        semantic_into: Sequence[str] = ("box", "mask"),
        semantic_weight: float = 0.2,
        resize_first: bool = False,
        mask_from: Literal["mean", "last"] = "mean",
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        if mask_from not in ("mean", "last"):
            raise ValueError(f"mask_from must be mean or last, got {mask_from!r}")
        if set(semantic_into) - {"box", "mask"}:
            raise ValueError(f"semantic_into may name box and mask, got {list(semantic_into)}")
        if semantic_classes is not None and semantic_classes <= num_classes:
            raise ValueError(f"semantic_classes must be above num_classes={num_classes}, got {semantic_classes}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.interleaved, self.semantic_weight, self.mask_from = interleaved, semantic_weight, mask_from
        self.semantic_into = tuple(semantic_into) if semantic else ()

        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels)
        levels = self.backbone.levels
        self.strides = tuple(level.stride for level in levels)
        self.rpn = RegionProposals(
            levels,
            anchor_sizes=anchor_sizes or [[32.0 * 2**k] for k in range(len(levels))],
            aspect_ratios=aspect_ratios,
            before_nms=before_nms,
            after_nms=after_nms,
        )
        self.boxes = BoxCascade(channels, num_classes, stages=stages, hidden=hidden, rois_per_image=rois_per_image)
        self.masks = MaskCascade(channels, num_classes, stages=stages, mask_flow=mask_flow)
        self.semantic: FusedSemanticBranch | None = None
        if semantic:
            self.semantic = FusedSemanticBranch(
                channels,
                semantic_classes or num_classes + 1,
                levels=len(levels),
                level=min(range(len(levels)), key=lambda k: abs(self.strides[k] - 8)),
                resize_first=resize_first,
                embedding=bool(semantic_into),
            )
        self.semantic_loss = PixelCrossEntropy()

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, D detections of each image in fixed shapes, boxes in pixels of the batch.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``stage_logits`` (N, T, P, K + 1), ``stage_boxes``
        (N, T, P, 4), ``boxes`` (N, D, 4), ``labels`` (N, D), ``scores`` (N, D), -1 where a row is empty, ``masks``
        (N, D, S, S) in [0, 1], ``sizes`` (N, 2), and ``semantic_logits`` (N, S, h, w) where there is the branch.
        """
        return self._raw(inputs, **self.detected)

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box_reg``, ``loss_semantic``, and of each stage ``loss_classifier``,
        ``loss_box_reg`` and ``loss_mask``, all as they are weighted in the sum (equation 6).

        Raises:
            ValueError: targets that do not fit, or a ``semantic`` map with a class beyond ``semantic_classes``.
        """
        x, sizes = self._batch(inputs)
        originals = image_sizes(inputs)
        targets = training_targets(targets, len(originals), self.num_classes)
        check_masks(targets, originals)
        targets = scale_targets(targets, sizes, originals)
        features, raw = self._features(x)
        losses = self.rpn.losses(raw, features.maps, targets, sizes)
        if self.semantic is not None:
            logits = raw["semantic_logits"]
            truth = semantic_targets(targets, sizes, originals, logits.shape[2:], self.strides[self.semantic.level])
            _check_classes(truth, logits.shape[1])
            losses["loss_semantic"] = self.semantic_weight * self.semantic_loss(logits, truth)
        proposals = self.rpn.training_proposals(raw, features.maps, sizes)
        for t, weight in enumerate(self.boxes.stage_weights):
            regions = self.boxes.sample(t, proposals, targets)
            found, refined = self.boxes.learn(t, features.for_boxes, regions, sizes)
            losses |= found
            proposals = kept_proposals(regions, refined, len(targets))
            if self.interleaved:
                regions = self.boxes.sample(t, proposals, targets)
            regions = positive_regions(regions)
            logits = self.masks(features.for_masks(regions.boxes, regions.image), t)
            truth = mask_targets(regions, targets, sizes, originals, logits.shape[-1])
            losses[f"stage{t}.loss_mask"] = weight * mask_loss(logits, regions.labels, truth)
        return losses

    def decode(
        self,
        raw: dict[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        *,
        mask_threshold: float = 0.5,
    ) -> list[Detections]:
        """Raw outputs to detections, boxes and masks in pixels of ``image_sizes`` (height, width)."""
        found = []
        rows = zip(*(raw[key] for key in ("boxes", "labels", "scores", "masks", "sizes")), image_sizes, strict=True)
        for box, label, score, mask, size, original in rows:
            there = score >= 0
            box = box[there] * box_factors(size, original)
            pasted = paste_masks(mask[there], box, original, threshold=mask_threshold)
            found.append(Detections(box, label[there], score[there], pasted))
        return found

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.001,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        mask_threshold: float = 0.5,
    ) -> list[Detections]:
        """One ``Detections`` with masks per image, in pixels of the image that went in."""
        raw = self.detect(
            inputs, score_threshold=score_threshold, nms_threshold=nms_threshold, max_detections=max_detections
        )
        return self.decode(raw, image_sizes(inputs), mask_threshold=mask_threshold)

    def _raw(self, inputs: Tensor | Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
        x, sizes = self._batch(inputs)
        features, raw = self._features(x)
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(raw, features.maps, sizes)
        found = self.boxes(features.for_boxes, raw["proposals"], sizes)
        raw |= {key: found[key] for key in ("stage_logits", "stage_boxes")}
        scores = found["class_logits"].to(found["boxes"].dtype).softmax(-1)[..., 1:]  # (N, P, K)
        raw["boxes"], raw["labels"], raw["scores"], _ = fixed_detections(
            found["boxes"][:, :, None],
            torch.where(raw["proposal_scores"][..., None] >= 0, scores, -1),
            **options,
        )
        raw["masks"] = detection_masks(
            lambda boxes, image, labels: self.masks.probabilities(
                features.for_masks(boxes, image), labels, last=self.mask_from == "last"
            ),
            raw["boxes"],
            raw["labels"],
            raw["scores"],
        )
        raw["sizes"] = sizes
        return raw

    def _features(self, x: Tensor) -> tuple[Features, dict[str, Tensor]]:
        """What regions are pooled from, and the raw outputs of the branches that read whole maps."""
        maps = self.backbone(x)
        raw = self.rpn(maps)
        embedding, stride = None, 1
        if self.semantic is not None:
            raw["semantic_logits"], embedding = self.semantic(maps)
            stride = self.strides[self.semantic.level]
        return Features(maps, self.strides, embedding, stride, self.semantic_into), raw


def _check_classes(semantic: Tensor, count: int) -> None:
    """Refuse maps (N, h, w) with a class that the branch does not have.

    Raises:
        ValueError: naming the image and the class.
    """
    wrong = (semantic != IGNORED) & ((semantic < 0) | (semantic >= count))
    if bool(wrong.any()):
        image = int(torch.nonzero(wrong)[0, 0])
        raise ValueError(
            f"target {image}: semantic maps must hold 0 to {count - 1} and {IGNORED}, got {int(semantic[wrong][0])}"
        )


@dataclass(frozen=True)
class Features:
    """Maps (N, C, h, w) of ``strides`` and the semantic embedding, from which regions are pooled."""

    maps: list[Tensor]
    strides: tuple[int, ...]
    embedding: Tensor | None
    embedding_stride: int
    into: tuple[str, ...]

    def for_boxes(self, boxes: Tensor, image: Tensor) -> Tensor:
        """Features (R, C, 7, 7) of boxes (R, 4) on the images ``image`` (R,)."""
        pooled = self._pool(boxes, image, 7)
        return pooled + F.avg_pool2d(self._context(boxes, image), 2) if "box" in self.into else pooled

    def for_masks(self, boxes: Tensor, image: Tensor) -> Tensor:
        """Features (R, C, 14, 14)."""
        pooled = self._pool(boxes, image, 14)
        return pooled + self._context(boxes, image) if "mask" in self.into else pooled

    def _pool(self, boxes: Tensor, image: Tensor, size: int) -> Tensor:
        return pool_regions(*region_maps(self.maps, self.strides), boxes, image, size=size)

    def _context(self, boxes: Tensor, image: Tensor) -> Tensor:
        assert self.embedding is not None
        return pool_regions([self.embedding], [self.embedding_stride], boxes, image, size=14)
