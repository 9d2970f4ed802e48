"""The detector: features of stride 16, proposals, the thin map, its second stage, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from torchive.methods.detection.light_head_rcnn.thin_map import LargeSeparableConv
from torchive.nn.network import build_features
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import RegionStage, decode_regions, image_of, sample_regions, scored_regions
from torchive.nn.thin_regions import ProposalHead, ThinRegionStage, VotedRegionStage, hard_region_loss
from torchive.ops.images import batch_images, check_images, image_sizes, scale_targets, training_targets
from torchive.structures import Detections

#: More regions than any image has: all of them are candidates for mining.
ALL = 2**31


class LightHeadRCNN(nn.Module):
    """Two-stage detector: images (N, C, H, W), or a list of (C, H, W), to proposals, their class scores and box
    offsets, by a second stage that costs little.

    Boxes go in and come out in pixels of the images given.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``. A timm network is built with
            ``output_stride=16`` where it takes that, so that its last stage is dilated.
        head: "thin"; "plain", the thin map of ``channels`` pooled by RoIAlign, each bin from the same map; "heavy",
            Faster R-CNN's two layers on the backbone's own features; or "voted", R-FCN's: 49 maps for each class and
            offset, whose means over a region's bins are its scores.
        channels: of a pooled region; the thin map has 49 times as many.
        hidden: of the second stage's layer, or layers; 2048, or 1024 for "heavy", if None. For "voted", 1024 if None,
            of the 1x1 convolution before the maps.
        inter_channels: inside the large separable convolution; the paper's small form has 64.
        kernel_size: of it.
        width: of the proposal network's 3x3 convolution.
        per_class: whether each class has offsets of its own; those of "heavy" always are.
        image_size: shorter side to which images are resized, the longer at most 5/3 of it; as they are if None.
        anchor_sizes: sides of the anchors in pixels.
        aspect_ratios: height / width of the anchors.
        before_nms, after_nms: proposals in training and in test.
        rois_per_image: the hardest regions that the second stage learns from, for each image of a batch.

    Raises:
        ValueError: an argument outside the above, or a backbone without a map of stride 16.
    """

    task = "detection"

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet101",
        head: Literal["thin", "plain", "heavy", "voted"] = "thin",
        channels: int = 10,
        hidden: int | None = None,
        inter_channels: int = 256,
        kernel_size: int = 15,
        width: int = 512,
        per_class: bool = False,
        image_size: int | None = None,
        anchor_sizes: Sequence[float] = (32.0, 64.0, 128.0, 256.0, 512.0),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (12000, 6000),
        after_nms: tuple[int, int] = (2000, 1000),
        rois_per_image: int = 256,
    ) -> None:
        super().__init__()
        if min(num_classes, channels, rois_per_image) < 1:
            raise ValueError(
                "num_classes, channels and rois_per_image must be >= 1, "
                f"got {num_classes}, {channels} and {rois_per_image}"
            )
        if head not in ("thin", "plain", "heavy", "voted"):
            raise ValueError(f"head must be thin, plain, heavy or voted, got {head!r}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.rois_per_image = rois_per_image
        self.backbone = _features(backbone, in_channels)
        levels: Any = self.backbone.levels
        fitting = [k for k, level in enumerate(levels) if level.stride == 16]
        if not fitting:
            raise ValueError(
                f"expected a backbone with a map of stride 16, its strides are {[v.stride for v in levels]}"
            )
        self.first, self.last = fitting[0], fitting[-1]  # conv4, and conv5 where it is dilated
        self.stride = 16
        shallow, deep = levels[self.first].channels, levels[self.last].channels
        self.rpn = RegionProposals(
            [levels[self.first]],
            anchor_sizes=[list(anchor_sizes)],
            aspect_ratios=aspect_ratios,
            before_nms=before_nms,
            after_nms=after_nms,
            head=ProposalHead(_three_by_three(shallow, width), width, len(anchor_sizes) * len(aspect_ratios)),
        )
        self.thin: nn.Module = nn.Identity()
        self.second: nn.Module
        if head == "heavy":
            self.second = _OnOneMap(deep, num_classes, hidden=hidden or 1024)
        elif head == "voted":
            self.second = VotedRegionStage(num_classes, per_class=per_class)
            first, maps = nn.Conv2d(deep, hidden or 1024, 1), nn.Conv2d(hidden or 1024, self.second.in_channels, 1)
            for layer in (first, maps):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            self.thin = nn.Sequential(first, nn.ReLU(), maps)
        else:
            self.second = ThinRegionStage(
                channels,
                num_classes,
                hidden=hidden or 2048,
                per_class=per_class,
                position_sensitive=head == "thin",
            )
            self.thin = nn.Sequential(
                LargeSeparableConv(
                    deep, self.second.in_channels, inter_channels=inter_channels, kernel_size=kernel_size
                ),
                nn.ReLU(),
            )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, P proposals of each image in fixed shapes.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``class_logits`` (N, P, K + 1), ``box_deltas`` (N, P, 4)
        or (N, P, 4 (K + 1)), and ``sizes`` (N, 2), height and width of the images in the network, in whose pixels the
        boxes are.
        """
        x, sizes = self._batch(inputs)
        maps = self.backbone(x)
        shallow = [maps[self.first]]
        raw: dict[str, Tensor] = self.rpn(shallow)
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(raw, shallow, sizes)
        boxes, image = raw["proposals"].flatten(0, 1), image_of(raw["proposals"])
        logits, deltas = self.second(self.thin(maps[self.last]), self.stride, boxes, image)
        count = raw["proposals"].shape[1]
        raw["class_logits"], raw["box_deltas"] = logits.unflatten(0, (-1, count)), deltas.unflatten(0, (-1, count))
        raw["sizes"] = sizes
        return raw

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box_reg``, and of the hardest regions ``loss_classifier`` and
        ``loss_box_reg``, the last doubled as in the release."""
        x, sizes = self._batch(inputs)
        targets = training_targets(targets, len(x), self.num_classes)
        targets = scale_targets(targets, sizes, image_sizes(inputs))
        maps = self.backbone(x)
        shallow = [maps[self.first]]
        raw = self.rpn(shallow)
        losses = self.rpn.losses(raw, shallow, targets, sizes)
        proposals = self.rpn.training_proposals(raw, shallow, sizes)
        regions = sample_regions(proposals, targets, count=ALL, positives=1.0)
        logits, deltas = self.second(self.thin(maps[self.last]), self.stride, regions.boxes, regions.image)
        score, offset = hard_region_loss(logits, deltas, regions, count=self.rois_per_image * len(x))
        losses["loss_classifier"], losses["loss_box_reg"] = score, 2 * offset
        return losses

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode_regions(raw, image_sizes, **options)

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
        return decode_regions(
            self(inputs),
            image_sizes(inputs),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            soft_sigma=soft_sigma,
        )

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, P, K, 4) in pixels of images of ``size`` (height, width), scores
        (N, P, K)."""
        return scored_regions(raw, size)

    def _batch(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images resized and padded to (N, C, H, W), and their sizes (N, 2) before padding."""
        check_images(inputs, self.in_channels)
        return batch_images(inputs, shorter=self.image_size, divisor=32)


class _OnOneMap(RegionStage):
    """Faster R-CNN's second stage, called as the thin one is."""

    def forward(self, x: Tensor, stride: int, boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward([x], [stride], boxes, image)


def _three_by_three(in_channels: int, width: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, width, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return nn.Sequential(conv, nn.ReLU())


def _features(backbone: str | nn.Module, in_channels: int) -> nn.Module:
    """A backbone whose last stage is dilated, where it can be."""
    if isinstance(backbone, str) and backbone.startswith("timm/"):
        try:
            return build_features(backbone, in_channels=in_channels, output_stride=16)
        except (TypeError, RuntimeError, AssertionError):
            pass  # a network that takes no output stride: its own map of stride 16 serves both stages
    return build_features(backbone, in_channels=in_channels)
