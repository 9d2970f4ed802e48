"""The system: a pyramid, Mask R-CNN and the semantic branch on it, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.segmentation.panoptic_fpn.semantic import PyramidSemanticHead
from torchive.nn.mask_head import MaskHead, detection_masks, mask_loss, mask_targets, of_label, positive_regions
from torchive.nn.pixel_cross_entropy import PixelCrossEntropy
from torchive.nn.pyramid import Pyramid
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import RegionStage, class_boxes, image_of, region_loss, sample_regions
from torchive.nn.two_stage import DetectsInForward
from torchive.ops.images import box_factors, image_sizes, scale_targets, training_targets
from torchive.ops.masks import IGNORED, check_masks, paste_masks, semantic_targets
from torchive.ops.panoptic import merge
from torchive.ops.suppression import fixed_detections
from torchive.structures import Detections


class PanopticFPN(DetectsInForward):
    """Panoptic segmentation: images (N, C, H, W), or a list of (C, H, W), to instances, stuff and one map of both.

    Targets hold ``boxes``, ``labels`` and ``masks``, and may hold ``semantic`` (H, W): 0 background, 1 to K the things,
    K + 1 to K + S the stuff, 255 where nothing is known. Without it everything between the masks is background. The
    semantic branch has one class, the first, for all things; it is never given out.

    Args:
        num_classes: K; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        stuff_classes: S.
        background: whether category 0 is stuff of its own; otherwise its pixels are not learnt.
        separate: backbone of a second pyramid for the semantic branch alone, the paper's two networks; None is the
            joint one.
        channels: of the pyramid's maps and the mask branch.
        hidden: of the box stage's two layers.
        width: of the semantic branch; its norms have 32 groups, fewer where a group would have less than four channels.
        combine: how the semantic branch joins its maps: "add", the paper's, or "concat".
        image_size: shorter side to which images are resized (the paper's 800), the longer at most 5/3 of it; as they
            are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 32 on the finest, doubled on the next, if
            None.
        aspect_ratios: height / width of the anchors.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        rois_per_image: proposals that train the second stage.
        instance_weight, semantic_weight: lambda_i and lambda_s.
        stuff_area: smallest segment of stuff in pixels of the image; the paper's 4096 are for images of 800 pixels.

    Raises:
        ValueError: an argument outside the above.
    """

    detected: ClassVar[dict[str, Any]] = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100}

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        stuff_classes: int = 0,
        background: bool = True,
        separate: str | nn.Module | None = None,
        channels: int = 256,
        hidden: int = 1024,
        width: int = 128,
        combine: Literal["add", "concat"] = "add",
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        rois_per_image: int = 512,
        instance_weight: float = 1.0,
        semantic_weight: float = 0.5,
        stuff_area: int = 4096,
    ) -> None:
        super().__init__()
        if num_classes < 1 or stuff_classes < 0 or num_classes + stuff_classes >= IGNORED:
            raise ValueError(
                f"expected num_classes >= 1, stuff_classes >= 0 and fewer than {IGNORED} together, got {num_classes} "
                f"and {stuff_classes}"
            )
        if not background and not stuff_classes:
            raise ValueError("without a background there must be stuff_classes, got 0")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.rois_per_image, self.stuff_area = rois_per_image, stuff_area
        self.highest = num_classes + stuff_classes
        self.instance_weight, self.semantic_weight = instance_weight, semantic_weight
        stuff = ([0] if background else []) + list(range(num_classes + 1, num_classes + 1 + stuff_classes))
        category = torch.tensor([IGNORED, *stuff])  # of each class of the semantic branch, the first for the things
        channel = torch.full((IGNORED + 1,), -1)  # and back; -1 for classes that are not there
        channel[0], channel[1 : num_classes + 1], channel[IGNORED] = IGNORED, 0, IGNORED
        channel[stuff] = torch.arange(1, len(stuff) + 1)
        self.register_buffer("category", category, persistent=False)
        self.register_buffer("channel", channel, persistent=False)

        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels)
        self.second = None if separate is None else Pyramid(separate, in_channels=in_channels, channels=channels)
        levels = self.backbone.levels
        self.strides = tuple(level.stride for level in levels)
        semantic_strides = (self.second or self.backbone).levels[:-1]
        self.rpn = RegionProposals(
            levels,
            anchor_sizes=anchor_sizes or [[32.0 * 2**k] for k in range(len(levels))],
            aspect_ratios=aspect_ratios,
            before_nms=before_nms,
            after_nms=after_nms,
        )
        self.roi_heads = RegionStage(channels, num_classes, hidden=hidden)
        self.masks = MaskHead(channels, num_classes, width=channels)
        self.semantic = PyramidSemanticHead(
            channels,
            len(category),
            strides=[level.stride for level in semantic_strides],
            width=width,
            groups=next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or (width % g == 0 and width >= 4 * g)),
            combine=combine,
        )
        self.finest = semantic_strides[0].stride
        self.semantic_loss = PixelCrossEntropy()

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, D detections of each image in fixed shapes, boxes in pixels of the batch.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``class_logits`` (N, P, K + 1), ``box_deltas``
        (N, P, 4 (K + 1)), ``boxes`` (N, D, 4), ``labels`` (N, D), ``scores`` (N, D), -1 where a row is empty,
        ``masks`` (N, D, S, S) in [0, 1], ``semantic_logits`` (N, 1 + stuff, h, w), and ``sizes`` (N, 2).
        """
        return self._raw(inputs, **self.detected)

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``, ``loss_mask`` and
        ``loss_semantic``, as they are weighted in the sum.
        """
        x, sizes = self._batch(inputs)
        originals = image_sizes(inputs)
        targets = training_targets(targets, len(originals), self.num_classes)
        check_masks(targets, originals)
        targets = scale_targets(targets, sizes, originals)
        maps, raw = self._maps(x)
        losses = self.rpn.losses(raw, maps, targets, sizes)
        regions = sample_regions(self.rpn.training_proposals(raw, maps, sizes), targets, count=self.rois_per_image)
        used = maps[:-1]
        logits, deltas = self.roi_heads(used, self.strides[:-1], regions.boxes, regions.image)
        losses["loss_classifier"], losses["loss_box_reg"] = region_loss(logits, deltas, regions)
        regions = positive_regions(regions)
        masks = self.masks(used, self.strides[:-1], regions.boxes, regions.image)
        truth = mask_targets(regions, targets, sizes, originals, masks.shape[-1])
        losses["loss_mask"] = mask_loss(masks, regions.labels, truth)
        losses = {key: self.instance_weight * value for key, value in losses.items()}
        classes = self._classes(semantic_targets(targets, sizes, originals, x.shape[2:], 1))
        large = F.interpolate(raw["semantic_logits"], size=x.shape[2:], mode="bilinear", align_corners=False)
        losses["loss_semantic"] = self.semantic_weight * self.semantic_loss(large, classes)
        return losses

    def decode(
        self,
        raw: dict[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        *,
        mask_threshold: float = 0.5,
        instance_threshold: float = 0.5,
        overlap: float = 0.5,
        stuff_area: int | None = None,
    ) -> list[Detections]:
        """Raw outputs to detections with masks and the merged map, in pixels of ``image_sizes`` (height, width)."""
        found = []
        keys = ("boxes", "labels", "scores", "masks", "semantic_logits", "sizes")
        for box, label, score, mask, logits, size, original in zip(
            *(raw[key] for key in keys), image_sizes, strict=True
        ):
            there = score >= 0
            box = box[there] * box_factors(size, original)
            pasted = paste_masks(mask[there], box, original, threshold=mask_threshold)
            instances = Detections(box, label[there], score[there], pasted)
            whole = [side * self.finest for side in logits.shape[1:]]
            height, width = (round(float(side)) for side in size)
            large = F.interpolate(logits[None].float(), size=whole, mode="bilinear", align_corners=False)
            large = large[..., :height, :width]
            if (height, width) != tuple(original):
                large = F.interpolate(large, size=original, mode="bilinear", align_corners=False)
            panoptic = merge(
                instances,
                self.category[large[0].argmax(0)],  # type: ignore[index]
                score_threshold=instance_threshold,
                overlap=overlap,
                stuff_area=self.stuff_area if stuff_area is None else stuff_area,
            )
            found.append(replace(instances, panoptic=panoptic))
        return found

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        mask_threshold: float = 0.5,
        instance_threshold: float = 0.5,
        overlap: float = 0.5,
        stuff_area: int | None = None,
    ) -> list[Detections]:
        """One ``Detections`` with masks and ``panoptic`` per image, in pixels of the image that went in.

        ``instance_threshold``, ``overlap`` and ``stuff_area`` are those of ``torchive.ops.panoptic.merge``.
        """
        raw = self.detect(
            inputs, score_threshold=score_threshold, nms_threshold=nms_threshold, max_detections=max_detections
        )
        return self.decode(
            raw,
            image_sizes(inputs),
            mask_threshold=mask_threshold,
            instance_threshold=instance_threshold,
            overlap=overlap,
            stuff_area=stuff_area,
        )

    def _raw(self, inputs: Tensor | Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
        x, sizes = self._batch(inputs)
        maps, raw = self._maps(x)
        proposals, sure = self.rpn.propose(raw, maps, sizes)
        used, count = maps[:-1], proposals.shape[1]
        logits, deltas = self.roi_heads(used, self.strides[:-1], proposals.flatten(0, 1), image_of(proposals))
        raw["proposals"], raw["proposal_scores"] = proposals, sure
        raw["class_logits"], raw["box_deltas"] = logits.unflatten(0, (-1, count)), deltas.unflatten(0, (-1, count))
        raw["sizes"] = sizes
        raw["boxes"], raw["labels"], raw["scores"], _ = fixed_detections(*class_boxes(raw), **options)
        raw["masks"] = detection_masks(
            lambda boxes, image, labels: of_label(self.masks(used, self.strides[:-1], boxes, image), labels).sigmoid(),
            raw["boxes"],
            raw["labels"],
            raw["scores"],
        )
        return raw

    def _classes(self, semantic: Tensor) -> Tensor:
        """Classes of the semantic branch for a target's.

        Raises:
            ValueError: a class that is neither a thing nor stuff.
        """
        classes: Tensor = self.channel[semantic]  # type: ignore[index]
        if bool((classes < 0).any()):
            raise ValueError(
                f"semantic maps must hold 0 to {self.highest} and {IGNORED}, got {int(semantic[classes < 0][0])}"
            )
        return classes

    def _maps(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The pyramid's maps, and the raw outputs of the branches that read whole maps."""
        maps = self.backbone(x)
        raw = self.rpn(maps)
        others = maps if self.second is None else self.second(x)
        raw["semantic_logits"] = self.semantic(others[:-1])  # the pooled map on top is for proposals
        return maps, raw
