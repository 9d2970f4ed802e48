"""The model: pyramid, dense detector, mask tower, instance-aware head, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.segmentation.pointins.detectors import FCOSPoints, PointDetector, RetinaNetPoints
from torchive.methods.segmentation.pointins.head import Cues, InstanceAwareHead, Variant
from torchive.nn.dice import mask_dice
from torchive.nn.fcos import conv_tower, flat_rows
from torchive.nn.pyramid import Pyramid
from torchive.ops.images import check_images, image_sizes, pad_batch, training_targets
from torchive.ops.masks import check_masks, crop_masks, paste_masks
from torchive.structures import Detections


class PointINS(nn.Module):
    """Instance segmentation: images (N, C, H, W), or a list of (C, H, W), to boxes, classes and masks.

    Images are padded to one size, a multiple of the backbone's largest stride. Boxes and masks go in and come out in
    pixels of the images given. Masks are the same for all classes.

    Args:
        num_classes: K; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        channels: of the pyramid's maps and of the towers.
        finest: stride of the finest map, 8 in the paper; 4 serves small objects.
        top: "convolutions", two more maps on the coarsest one as in the paper, or "none", for small images.
        detector: "fcos" or "retinanet", on which the masks stand.
        sizes_of_interest: FCOS: borders in pixels between the maps; eight strides each if None.
        radius: FCOS: strides around a box's centre within which locations are positive; None is the whole box.
        anchor_sizes: RetinaNet: sides of the anchors in pixels, a list for each map.
        depth: convolutions of the mask tower, and of FCOS's.
        size: k, side of the template; masks have twice as many cells.
        template_channels, aware_channels: c and c'.
        hidden: width of the weight generator.
        kernel_size: of the instance-aware convolutions: 1 or 3.
        aware_depth: their number.
        variant: "dynamic", the paper's; "static" weights, the same for all points; "template", without the
            instance-aware convolution; or "direct", the baseline: one layer from the feature to all logits.
        cues: what weights are made from: the "feature" at the point, the predicted "box", or "both".
        reference: box that the mask is laid over in training: the "truth" or the "predicted" one.
        mask_loss: "bce" or "dice".
        masks_per_image: points of an image that learn a mask, drawn at random.
        prior: score of every class at the start.

    Raises:
        ValueError: an argument outside the above.
    """

    task = "detection"

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        channels: int = 256,
        finest: int = 8,
        top: Literal["convolutions", "none"] = "convolutions",
        detector: Literal["fcos", "retinanet"] = "fcos",
        sizes_of_interest: Sequence[float] | None = None,
        radius: float | None = 1.5,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        depth: int = 4,
        size: int = 14,
        template_channels: int = 16,
        aware_channels: int = 16,
        hidden: int = 256,
        kernel_size: int = 1,
        aware_depth: int = 1,
        variant: Variant = "dynamic",
        cues: Cues = "both",
        reference: Literal["truth", "predicted"] = "truth",
        mask_loss: Literal["bce", "dice"] = "bce",
        masks_per_image: int = 100,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if num_classes < 1 or depth < 0 or masks_per_image < 1:
            raise ValueError(
                "expected num_classes >= 1, depth >= 0 and masks_per_image >= 1, "
                f"got {num_classes}, {depth} and {masks_per_image}"
            )
        if detector not in ("fcos", "retinanet") or reference not in ("truth", "predicted"):
            raise ValueError(
                "expected detector fcos or retinanet and reference truth or predicted, "
                f"got {detector!r} and {reference!r}"
            )
        if mask_loss not in ("bce", "dice"):
            raise ValueError(f"mask_loss must be bce or dice, got {mask_loss!r}")
        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels, finest=finest, top=top)
        strides = [level.stride for level in self.backbone.levels]
        self.num_classes, self.in_channels = num_classes, in_channels
        self.reference, self.mask_loss, self.masks_per_image = reference, mask_loss, masks_per_image
        self.divisor = strides[len(self.backbone.kept) - 1]
        self.detector: PointDetector
        if detector == "fcos":
            self.detector = FCOSPoints(
                channels,
                num_classes,
                strides,
                depth=depth,
                sizes_of_interest=sizes_of_interest,
                radius=radius,
                prior=prior,
            )
        else:
            self.detector = RetinaNetPoints(channels, num_classes, strides, anchor_sizes=anchor_sizes, prior=prior)
        self.mask_tower = conv_tower(channels, depth)
        self.mask_head = InstanceAwareHead(
            channels,
            size=size,
            template_channels=template_channels,
            aware_channels=aware_channels,
            hidden=hidden,
            kernel_size=kernel_size,
            depth=aware_depth,
            variant=variant,
            cues=cues,
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs of A points, map by map, row by row, cell by cell, of each cell its anchors.

        The detector's: FCOS has ``logits`` (N, A, K), ``distances`` (N, A, 4) in strides, ``centerness`` (N, A),
        ``points`` (A, 2), ``strides`` (A,) and ``levels`` (A,); RetinaNet ``logits``, ``deltas`` (N, A, 4), ``anchors``
        (A, 4) and ``levels``. And ``features`` (N, cells, C) of the mask tower.
        """
        check_images(inputs, self.in_channels)
        maps = self.backbone(pad_batch(inputs, self.divisor))
        return self.detector.raw(maps) | {"features": flat_rows([self.mask_tower(m) for m in maps])}

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``classification``, ``localisation``, with FCOS ``centerness``, and ``mask``.

        Without a positive point all but the first are zero. Targets have ``masks`` (L, H, W), too.
        """
        check_images(inputs, self.in_channels)
        sizes = image_sizes(inputs)
        targets = training_targets(targets, len(sizes), self.num_classes)
        check_masks(targets, sizes)
        raw = self(inputs)
        match = self.detector.match(raw, targets)
        losses = self.detector.losses(raw, match, targets)
        losses["mask"] = self._mask_loss(raw, match, targets)
        return losses

    def masks(self, raw: dict[str, Tensor], image: Tensor | int, rows: Tensor) -> Tensor:
        """Logits (P, 2k, 2k) of the points ``rows`` (P,) of the images ``image`` (P,), or of one image."""
        cells = torch.div(rows, self.detector.per_cell, rounding_mode="floor")
        logits: Tensor = self.mask_head(raw["features"][image, cells], raw[self.detector.cue][image, rows].detach())
        return logits

    def decode(
        self,
        raw: dict[str, Tensor],
        image_sizes: Sequence[tuple[int, int]],
        *,
        mask_threshold: float = 0.5,
        nms_threshold: float | None = None,
        **options: Any,
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; a mask is made for each that is left, no other.

        Options as those of ``predict``.
        """
        boxes = self.detector.boxes(raw)
        options["nms_threshold"] = self.detector.nms_threshold if nms_threshold is None else nms_threshold
        found = []
        for k, (detections, rows) in enumerate(self.detector.detections(raw, image_sizes, **options)):
            scores = self.masks(raw, k, rows).float().sigmoid()
            # the mask lies over the box that was predicted, also where that crosses the image's border
            masks = paste_masks(scores, boxes[k, rows], image_sizes[k], threshold=mask_threshold)
            found.append(replace(detections, masks=masks))
        return found

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        candidates: int = 1000,
        nms_threshold: float | None = None,
        max_detections: int = 100,
        mask_threshold: float = 0.5,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes and masks in pixels of the image that went in.

        ``score_threshold`` is of the class, with FCOS of class times centerness, whose root is the score given. If
        ``nms_threshold`` is None, overlaps above 0.6 are suppressed with FCOS and above 0.5 with RetinaNet.
        """
        return self.decode(
            self(inputs),
            image_sizes(inputs),
            score_threshold=score_threshold,
            candidates=candidates,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            mask_threshold=mask_threshold,
        )

    @property
    def thresholds(self) -> dict[str, float]:
        """What ``predict`` takes where its ``nms_threshold`` is None."""
        return {"nms_threshold": self.detector.nms_threshold}

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, A, 1, 4) in pixels of images of ``size`` (height, width), scores
        (N, A, K), with FCOS the root of class times centerness."""
        return self.detector.scored(raw, size)

    def score_cut(self, threshold: float) -> float:
        """What scores of ``scored_boxes`` are compared with: with FCOS the root of a threshold of the product."""
        return threshold**0.5 if isinstance(self.detector, FCOSPoints) else threshold

    def masks_of(self, raw: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Scores ``masks`` (N, D, 2k, 2k) of the points ``rows`` (N, D), and ``mask_boxes`` (N, D, 4), in pixels, over
        which they lie: boxes that are not cut to the image."""
        image = torch.arange(rows.shape[0], device=rows.device)[:, None].expand_as(rows)
        masks = self.masks(raw, image.flatten(), rows.flatten()).float().sigmoid()
        return {"masks": masks.unflatten(0, rows.shape), "mask_boxes": self.detector.boxes(raw)[image, rows]}

    def _mask_loss(self, raw: dict[str, Tensor], match: Tensor, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        predicted = self.detector.boxes(raw).detach() if self.reference == "predicted" else None
        images, rows, truths = [], [], []
        for k, target in enumerate(targets):
            row = torch.nonzero(match[k] >= 0)[:, 0]
            row = row[torch.randperm(len(row), device=row.device)[: self.masks_per_image]]
            owner = match[k, row]
            box = target["boxes"][owner].float() if predicted is None else predicted[k, row]
            truths.append(crop_masks(target["masks"], owner, box, 2 * self.mask_head.size))
            images.append(torch.full_like(row, k))
            rows.append(row)
        logits = self.masks(raw, torch.cat(images), torch.cat(rows)).float()
        truth = torch.cat(truths).to(logits.dtype)
        if not len(logits):
            return logits.sum() + raw["features"].sum() * 0
        if self.mask_loss == "dice":
            return mask_dice(logits.sigmoid(), truth).mean()
        return F.binary_cross_entropy_with_logits(logits, truth)
