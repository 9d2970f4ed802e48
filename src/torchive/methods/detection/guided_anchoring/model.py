"""The two-stage detector: pyramid, guided proposals, second stage, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.detection.guided_anchoring.adaption import Source
from torchive.methods.detection.guided_anchoring.anchors import Centre
from torchive.methods.detection.guided_anchoring.guide import Matching
from torchive.methods.detection.guided_anchoring.proposals import GuidedProposals
from torchive.nn.pyramid import Pyramid
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import RegionStage, image_of, region_loss, region_maps, sample_regions
from torchive.nn.two_stage import DetectsRegions
from torchive.ops.images import image_sizes, scale_targets, training_targets
from torchive.structures import Detections

#: Weights of the second stage's box code, the inverse of its standard deviations 0.05 and 0.1.
REGION_CODE = (20.0, 20.0, 10.0, 10.0)


class GuidedAnchoring(DetectsRegions):
    """Faster R-CNN over a pyramid whose proposals come from guided anchors: images (N, C, H, W), or a list of
    (C, H, W), to proposals, their class scores and box offsets.

    Boxes go in and come out in pixels of the images given.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        proposals: "guided", or "fixed", the ordinary network of ``anchor_sizes`` and ``aspect_ratios``.
        stages: 2, or 1, where the proposals are the detections (K must be 1).
        channels: of the pyramid's maps.
        hidden: of the second stage's two layers.
        anchor_scale: side of the square whose sides are stretched, in strides.
        adaption: what moves the taps of the features: the anchor's "shape", the "features", or "none".
        offset_groups: groups of channels whose taps move together.
        shape_matching: vIoU by nine "samples", or "continuous", its exact maximum on the object's own map.
        location_threshold: probability of a centre below which a position is left out, except in training.
        centre: whether anchors stand in the "middle" of their cells or, as in the release, at the "corner".
        oriented: whether anchors have an angle; targets must have ``rotated`` (L, 5) then: centre, sides, radians.
        shape_weight: of the loss of the shapes.
        image_size: shorter side to which images are resized, the longer at most 5/3 of it; as they are if None.
        anchor_sizes: of "fixed" ones: sides in pixels, a list for each map; eight strides if None.
        aspect_ratios: of "fixed" ones: height / width.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        rois_per_image: proposals that train the second stage.
        iou_threshold: overlap from which a proposal has its box's class in training.

    Raises:
        ValueError: an argument outside the above; in ``losses``, targets without ``rotated`` for oriented anchors.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        proposals: Literal["guided", "fixed"] = "guided",
        stages: Literal[1, 2] = 2,
        channels: int = 256,
        hidden: int = 1024,
        anchor_scale: float = 8.0,
        adaption: Source = "shape",
        offset_groups: int = 4,
        shape_matching: Matching = "samples",
        location_threshold: float = 0.01,
        centre: Centre = "middle",
        oriented: bool = False,
        shape_weight: float = 1.0,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (300, 300),
        rois_per_image: int = 256,
        iou_threshold: float = 0.6,
    ) -> None:
        super().__init__()
        if stages not in (1, 2) or num_classes < 1 or (stages == 1 and num_classes != 1):
            raise ValueError(f"num_classes must be >= 1, and 1 with one stage; got {num_classes} with stages={stages}")
        if proposals not in ("guided", "fixed"):
            raise ValueError(f"proposals must be guided or fixed, got {proposals!r}")
        if not 0 < iou_threshold < 1:
            raise ValueError(f"iou_threshold must lie in (0, 1), got {iou_threshold}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.rois_per_image, self.iou_threshold = rois_per_image, iou_threshold
        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels)
        self.strides = tuple(level.stride for level in self.backbone.levels)
        self.rpn: GuidedProposals | RegionProposals
        if proposals == "guided":
            self.rpn = GuidedProposals(
                self.backbone.levels,
                anchor_scale=anchor_scale,
                offset_groups=offset_groups,
                adaption=adaption,
                shape_matching=shape_matching,
                location_threshold=location_threshold,
                centre=centre,
                oriented=oriented,
                shape_weight=shape_weight,
                before_nms=before_nms,
                after_nms=after_nms,
            )
        else:
            if anchor_sizes is None:
                anchor_sizes = [[anchor_scale * stride] for stride in self.strides]
            self.rpn = RegionProposals(
                self.backbone.levels,
                anchor_sizes=anchor_sizes,
                aspect_ratios=aspect_ratios,
                before_nms=before_nms,
                after_nms=after_nms,
            )
        self.roi_heads = RegionStage(channels, num_classes, hidden=hidden) if stages == 2 else None

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, P proposals of each image in fixed shapes.

        What the proposal network gives, ``proposals`` (N, P, 4) with ``proposal_scores`` (N, P), -1 where a row is
        empty, with two stages ``class_logits`` (N, P, K + 1) and ``box_deltas`` (N, P, 4 (K + 1)), and ``sizes``
        (N, 2), height and width of the images in the network, in whose pixels the boxes are.
        """
        x, sizes = self._batch(inputs)
        maps = self.backbone(x)
        raw = self._propose(maps, everywhere=False)
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(raw, maps, sizes)
        raw["sizes"] = sizes
        if self.roi_heads is not None:
            boxes, image = raw["proposals"].flatten(0, 1), image_of(raw["proposals"])
            logits, deltas = self.roi_heads(*region_maps(maps, self.strides), boxes, image)
            count = raw["proposals"].shape[1]
            raw["class_logits"], raw["box_deltas"] = logits.unflatten(0, (-1, count)), deltas.unflatten(0, (-1, count))
        return raw

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``loss_location`` and ``loss_shape`` of guided anchors, and ``loss_angle`` of oriented ones,
        ``loss_objectness``, ``loss_rpn_box_reg``, and with two stages ``loss_classifier`` and ``loss_box_reg``."""
        x, sizes = self._batch(inputs)
        targets = training_targets(targets, len(x), self.num_classes)
        targets = _scaled(targets, sizes, image_sizes(inputs))
        maps = self.backbone(x)
        raw = self._propose(maps, everywhere=True)
        losses = self.rpn.losses(raw, maps, targets, sizes)
        if self.roi_heads is not None:
            proposals = self.rpn.training_proposals(raw, maps, sizes)
            regions = sample_regions(proposals, targets, threshold=self.iou_threshold, count=self.rois_per_image)
            logits, deltas = self.roi_heads(*region_maps(maps, self.strides), regions.boxes, regions.image)
            losses["loss_classifier"], losses["loss_box_reg"] = region_loss(
                logits, deltas, regions, weights=REGION_CODE
            )
        return losses

    @property
    def thresholds(self) -> dict[str, float]:
        """What ``predict`` takes where it is given None."""
        if self.roi_heads is None:
            return {"score_threshold": 0.0, "nms_threshold": 0.7}
        return {"score_threshold": 0.05, "nms_threshold": 0.5}

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int = 100,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in.

        What scores 0.05 or less is dropped, and overlaps above 0.5 are suppressed, if None; with one stage, whose
        proposals are the result, nothing is dropped and the suppression is that of the proposals, at 0.7.
        """
        return self.decode(
            self(inputs),
            image_sizes(inputs),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )

    def _coding(self) -> dict[str, Any]:
        return {"proposals_only": True} if self.roi_heads is None else {"weights": REGION_CODE}

    def _propose(self, maps: Sequence[Tensor], *, everywhere: bool) -> dict[str, Tensor]:
        raw: dict[str, Tensor] = (
            self.rpn(maps, everywhere=everywhere) if isinstance(self.rpn, GuidedProposals) else self.rpn(maps)
        )
        return raw


def _scaled(
    targets: Sequence[dict[str, Tensor]], sizes: Tensor, originals: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Targets in pixels of the batch; rotated boxes by the mean of both scales, which differ by rounding alone."""
    scaled = scale_targets(targets, sizes, originals)
    for target, size, original in zip(scaled, sizes, originals, strict=True):
        if "rotated" in target:
            factor = (size / size.new_tensor(original)).mean()
            rotated = target["rotated"].to(sizes.dtype)
            target["rotated"] = torch.cat([rotated[:, :4] * factor, rotated[:, 4:]], 1)
    return scaled
