"""The detector: pyramid, proposals, the second stage at its own places, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from torchive.methods.detection.tsd.head import SeparateHead, SiblingHead, TSDHead
from torchive.methods.detection.tsd.loss import progressive_constraint
from torchive.methods.detection.tsd.pooling import Points
from torchive.nn.pyramid import Pyramid
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import image_of, region_loss, region_maps, sample_regions
from torchive.nn.two_stage import DetectsRegions
from torchive.ops.images import image_sizes, scale_targets, training_targets
from torchive.ops.roi import pool_regions
from torchive.structures import Detections


class TSD(DetectsRegions):
    """Two-stage detector over a pyramid: images (N, C, H, W), or a list of (C, H, W), to proposals, the scores of
    their classes and the offsets of their boxes, each read at a place of its own.

    Boxes go in and come out in pixels of the images given. The ordinary head beside it serves training only.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        head: "tsd"; "sibling", the ordinary head alone; or "separate", two heads that look at the same place.
        channels: of the pyramid's maps.
        hidden: of the two layers of each branch.
        inter_channels: of the layers that choose the places.
        gamma: a shift of one is this share of the box's side.
        samples: points along each side of a bin.
        points: where in a bin they lie: "centres", as RoIAlign, or "release".
        margin: of the progressive constraint; None trains without it.
        beta: error of an offset up to which its loss is a square.
        image_size: shorter side to which images are resized, the longer at most 5/3 of it; as they are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 32 to 512 if None.
        aspect_ratios: height / width of the anchors.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        rois_per_image: proposals that train the second stage.

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        head: Literal["tsd", "sibling", "separate"] = "tsd",
        channels: int = 256,
        hidden: int = 1024,
        inter_channels: int = 256,
        gamma: float = 0.1,
        samples: int = 4,
        points: Points = "centres",
        margin: float | None = 0.2,
        beta: float = 1.0,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        rois_per_image: int = 512,
    ) -> None:
        super().__init__()
        if num_classes < 1 or samples < 1:
            raise ValueError(f"num_classes and samples must be >= 1, got {num_classes} and {samples}")
        if head not in ("tsd", "sibling", "separate") or points not in ("centres", "release"):
            raise ValueError(
                f"expected head tsd, sibling or separate and points centres or release, got {head!r} and {points!r}"
            )
        if margin is not None and not 0 <= margin <= 1:
            raise ValueError(f"margin must lie in 0 to 1, got {margin}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.margin, self.beta, self.rois_per_image = margin, beta, rois_per_image
        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels)
        self.strides = tuple(level.stride for level in self.backbone.levels)
        if anchor_sizes is None:
            anchor_sizes = [[32.0 * 2**k] for k in range(len(self.strides))]
        self.rpn = RegionProposals(
            self.backbone.levels,
            anchor_sizes=anchor_sizes,
            aspect_ratios=aspect_ratios,
            before_nms=before_nms,
            after_nms=after_nms,
        )
        self.head: TSDHead | None = None
        if head == "tsd":
            self.head = TSDHead(
                channels,
                num_classes,
                hidden=hidden,
                inter_channels=inter_channels,
                gamma=gamma,
                samples=samples,
                points=points,
            )
        self.sibling: nn.Module = (SeparateHead if head == "separate" else SiblingHead)(
            channels, num_classes, hidden=hidden
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, P proposals of each image in fixed shapes.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``class_logits`` (N, P, K + 1), ``box_deltas`` (N, P, 4
        (K + 1)), ``moved`` (N, P, 4), what the deltas are relative to, and ``sizes`` (N, 2), height and width of the
        images in the network, in whose pixels the boxes are.
        """
        x, sizes = self._batch(inputs)
        maps = self.backbone(x)
        raw: dict[str, Tensor] = self.rpn(maps)
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(raw, maps, sizes)
        boxes, image = raw["proposals"].flatten(0, 1), image_of(raw["proposals"])
        used, strides = region_maps(maps, self.strides)
        pooled = pool_regions(used, strides, boxes, image)
        if self.head is not None:
            logits, deltas, moved = self.head(pooled, used, strides, boxes, image)
        else:
            (logits, deltas), moved = self.sibling(pooled), boxes
        count = raw["proposals"].shape[1]
        for name, part in (("class_logits", logits), ("box_deltas", deltas), ("moved", moved)):
            raw[name] = part.unflatten(0, (-1, count))
        raw["sizes"] = sizes
        return raw

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``, and with TSD the last two
        of its own, ``loss_tsd_classifier`` and ``loss_tsd_box_reg``, with ``constraint_classifier`` and
        ``constraint_box`` where there is a margin."""
        x, sizes = self._batch(inputs)
        targets = training_targets(targets, len(x), self.num_classes)
        targets = scale_targets(targets, sizes, image_sizes(inputs))
        maps = self.backbone(x)
        raw = self.rpn(maps)
        losses = self.rpn.losses(raw, maps, targets, sizes)
        proposals = self.rpn.training_proposals(raw, maps, sizes)
        regions = sample_regions(proposals, targets, count=self.rois_per_image)
        used, strides = region_maps(maps, self.strides)
        pooled = pool_regions(used, strides, regions.boxes, regions.image)
        plain, offsets = self.sibling(pooled)
        losses["loss_classifier"], losses["loss_box_reg"] = region_loss(plain, offsets, regions, beta=self.beta)
        if self.head is None:
            return losses
        logits, deltas, moved = self.head(pooled, used, strides, regions.boxes, regions.image)
        # the offsets of the moved box are learnt relative to it, which pulls at where it was moved to
        losses["loss_tsd_classifier"], losses["loss_tsd_box_reg"] = region_loss(
            logits, deltas, regions, boxes=moved, beta=self.beta
        )
        if self.margin is not None:
            losses["constraint_classifier"], losses["constraint_box"] = progressive_constraint(
                logits, deltas, moved, plain, offsets, regions, margin=self.margin
            )
        return losses

    def _final(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**raw, "proposals": raw["moved"]}

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        soft_sigma: float | None = None,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in; soft suppression with a sigma."""
        return self.decode(
            self(inputs),
            image_sizes(inputs),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            soft_sigma=soft_sigma,
        )
