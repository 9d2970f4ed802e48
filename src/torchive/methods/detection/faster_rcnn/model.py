"""The detector: features, proposals, second stage, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from torchive.nn.pyramid import Pyramid, SingleMap, VGGFeatures
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import (
    RegionStage,
    image_of,
    region_codes,
    region_loss,
    region_maps,
    sample_regions,
)
from torchive.nn.sigmoid_classes import SigmoidPredictor, SigmoidRegionLoss
from torchive.nn.two_stage import DetectsRegions
from torchive.ops.images import image_sizes, scale_targets, training_targets
from torchive.structures import Detections


class FasterRCNN(DetectsRegions):
    """Two-stage detector: images (N, C, H, W), or a list of (C, H, W), to proposals, their class scores and box
    offsets.

    Boxes go in and come out in pixels of the images given. Options that are None follow the paper with one feature
    map, and torchvision with a pyramid.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: "vgg16" (the paper's), ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        pyramid: feature pyramid over the backbone's maps instead of one map of stride 16; None is True except for
            "vgg16".
        channels: of the pyramid's maps.
        hidden: of the second stage's two layers; 4096 or 1024 if None.
        image_size: shorter side to which images are resized (the paper's 600), the longer at most 5/3 of it; as they
            are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 128, 256, 512, or 32 to 512 over the
            pyramid if None.
        aspect_ratios: height / width of the anchors.
        ignore_crossing: leave anchors that cross the image's border out of the RPN's training; True or False if None.
        rpn_normalisation: "paper" is equation 1, "sampled" averages over the sampled anchors, as the authors' later
            code.
        before_nms, after_nms: proposals in training and in test; (12000, 6000) and (2000, 300), or (2000, 1000) twice
            if None.
        min_proposal: smallest side of a proposal in pixels; 16 or 0 if None.
        rois_per_image: proposals that train the second stage; 128 or 512 if None.
        stages: 2, or 1 for the baseline that takes the proposals as detections (K must be 1).
        condition_channels: width of a vector that modulates the RPN's 3x3 convolution; 0, the default, is the
            standard RPN.
        classification: one "softmax" over K + 1, the published loss, or K "sigmoid"s without a background.
        prior: with sigmoids, the score of every class at the start.
        region_loss: module of class logits (R, K + 1), deltas (R, 4 (K + 1)), labels (R,), 0 for background, and codes
            (R, 4), to the two losses of the second stage; the published ones, or binary cross-entropy and smooth L1,
            if None.
        region_beta: error up to which the second stage's smooth L1 is a square, where ``region_loss`` is None; 1 or
            1/9 if None.

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        *,
        num_classes: int = 20,
        in_channels: int = 3,
        backbone: str | nn.Module = "vgg16",
        pyramid: bool | None = None,
        channels: int = 256,
        hidden: int | None = None,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        ignore_crossing: bool | None = None,
        rpn_normalisation: Literal["paper", "sampled"] | None = None,
        before_nms: tuple[int, int] | None = None,
        after_nms: tuple[int, int] | None = None,
        min_proposal: float | None = None,
        rois_per_image: int | None = None,
        stages: Literal[1, 2] = 2,
        condition_channels: int = 0,
        classification: Literal["softmax", "sigmoid"] = "softmax",
        prior: float = 0.001,
        region_loss: nn.Module | None = None,
        region_beta: float | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or (stages == 1 and num_classes != 1):
            raise ValueError(f"num_classes must be >= 1, and 1 with one stage; got {num_classes} with stages={stages}")
        if stages not in (1, 2) or rpn_normalisation not in (None, "paper", "sampled"):
            raise ValueError(
                f"expected stages 1 or 2 and rpn_normalisation paper or sampled, got {stages} and {rpn_normalisation!r}"
            )
        if classification not in ("softmax", "sigmoid"):
            raise ValueError(f"classification must be softmax or sigmoid, got {classification!r}")
        if min(1 if value is None else value for value in (hidden, rois_per_image)) < 1:
            raise ValueError(f"hidden and rois_per_image must be >= 1 or None, got {hidden} and {rois_per_image}")
        if region_beta is not None and region_beta < 0:
            raise ValueError(f"region_beta must be >= 0 or None, got {region_beta}")
        pyramid = backbone != "vgg16" if pyramid is None else pyramid
        self.num_classes, self.in_channels, self.image_size, self.stages = num_classes, in_channels, image_size, stages
        self.condition_channels = condition_channels
        self.rois_per_image = rois_per_image or (512 if pyramid else 128)

        self.backbone: nn.Module
        if pyramid:
            self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels)
        else:
            self.backbone = VGGFeatures(in_channels) if backbone == "vgg16" else SingleMap(backbone, in_channels)
        levels: Any = self.backbone.levels
        self.strides = tuple(level.stride for level in levels)
        if anchor_sizes is None:
            anchor_sizes = [[32.0 * 2**k] for k in range(len(levels))] if pyramid else [[128.0, 256.0, 512.0]]
        self.rpn = RegionProposals(
            levels,
            anchor_sizes=anchor_sizes,
            aspect_ratios=aspect_ratios,
            ignore_crossing=not pyramid if ignore_crossing is None else ignore_crossing,
            normalisation=rpn_normalisation or ("sampled" if pyramid else "paper"),
            before_nms=before_nms or ((2000, 1000) if pyramid else (12000, 6000)),
            after_nms=after_nms or ((2000, 1000) if pyramid else (2000, 300)),
            min_proposal=(0.0 if pyramid else 16.0) if min_proposal is None else min_proposal,
            condition_channels=condition_channels,
        )
        self.roi_heads: RegionStage | None = None
        if stages == 2:
            hidden = hidden or (1024 if pyramid else 4096)
            box = SigmoidPredictor(hidden, num_classes, prior=prior) if classification == "sigmoid" else None
            self.roi_heads = RegionStage(levels[0].channels, num_classes, hidden=hidden, box_predictor=box)
        self.sigmoid = classification == "sigmoid"
        self.region_beta = (1 / 9 if pyramid else 1.0) if region_beta is None else region_beta
        if self.sigmoid and region_loss is None:
            region_loss = SigmoidRegionLoss(beta=self.region_beta)
        self.region_loss = region_loss

    def forward(self, inputs: Tensor | Sequence[Tensor], *, condition: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs, P proposals of each image in fixed shapes.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``class_logits`` (N, P, K + 1), ``box_deltas`` (N, P, 4
        (K + 1)), and ``sizes`` (N, 2), height and width of the images in the network, in whose pixels the boxes are.
        ``condition`` is (N, condition_channels).
        """
        x, sizes = self._batch(inputs)
        maps, raw = self._propose(x, condition)
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(raw, maps, sizes)
        raw["sizes"] = sizes
        if self.roi_heads is not None:
            count = raw["proposals"].shape[1]
            logits, deltas = self._second(maps, raw["proposals"].flatten(0, 1), image_of(raw["proposals"]))
            raw["class_logits"], raw["box_deltas"] = logits.unflatten(0, (-1, count)), deltas.unflatten(0, (-1, count))
        return raw

    def losses(
        self,
        inputs: Tensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        *,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Of joint training: ``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``."""
        x, sizes = self._batch(inputs)
        targets = training_targets(targets, len(x), self.num_classes)
        targets = scale_targets(targets, sizes, image_sizes(inputs))
        maps, raw = self._propose(x, condition)
        losses = self.rpn.losses(raw, maps, targets, sizes)
        if self.roi_heads is not None:
            proposals = self.rpn.training_proposals(raw, maps, sizes)
            regions = sample_regions(proposals, targets, count=self.rois_per_image)
            logits, deltas = self._second(maps, regions.boxes, regions.image)
            if self.region_loss is None:
                losses["loss_classifier"], losses["loss_box_reg"] = region_loss(
                    logits, deltas, regions, beta=self.region_beta
                )
            else:
                losses["loss_classifier"], losses["loss_box_reg"] = self.region_loss(
                    logits, deltas, regions.labels, region_codes(regions)
                )
        return losses

    @property
    def thresholds(self) -> dict[str, float]:
        """What ``predict`` takes where it is given None: with sigmoids those of Tan et al., 2020."""
        score, most = (1e-4, 300) if self.sigmoid else (0.05, 100)
        return {"score_threshold": score, "nms_threshold": 0.5, "max_detections": most}

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        condition: Tensor | None = None,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in.

        At most 100 that score above 0.05 are kept if None; with sigmoids, whose scores of rare classes stay small, 300
        above 1e-4. Overlaps above 0.5 are suppressed.
        """
        return self.decode(
            self(inputs, condition=condition),
            image_sizes(inputs),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )

    def _coding(self) -> dict[str, Any]:
        return {"proposals_only": True} if self.roi_heads is None else {"sigmoid": self.sigmoid}

    def _propose(self, x: Tensor, condition: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor]]:
        if condition is not None and condition.shape != (len(x), self.condition_channels):
            raise ValueError(
                f"expected a condition ({len(x)}, {self.condition_channels}), got {tuple(condition.shape)}"
            )
        maps = self.backbone(x)
        return maps, self.rpn(maps, condition)

    def _second(self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, K + 1) and box deltas (R, 4 (K + 1)) of boxes (R, 4) on the images ``image`` (R,)."""
        assert self.roi_heads is not None
        logits, deltas = self.roi_heads(*region_maps(maps, self.strides), boxes, image)
        return logits, deltas
