"""The one-stage form: RetinaNet whose one anchor at each position is guided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from torchive.methods.detection.guided_anchoring.adaption import FeatureAdaption, Source
from torchive.methods.detection.guided_anchoring.anchors import Centre
from torchive.methods.detection.guided_anchoring.assign import assign
from torchive.methods.detection.guided_anchoring.guide import AnchorGuide, Matching, position_rows
from torchive.methods.detection.guided_anchoring.masked import (
    LEFT_OUT,
    kept_positions,
    put_back,
    widened,
    windows_through,
)
from torchive.nn.prior import init_classifier
from torchive.nn.pyramid import Pyramid
from torchive.nn.retinanet import DenseDetector, dense_loss
from torchive.ops.images import image_sizes, scale_targets, training_targets


class GuidedRetinaNet(DenseDetector):
    """Images (N, C, H, W), or a list of (C, H, W), to class scores and box codes of one anchor at each of A positions.

    Boxes go in and come out in pixels of the images given.

    Args:
        num_classes: K; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        channels: of the pyramid's maps and of the towers.
        anchor_scale: side of the square whose sides are stretched, in strides.
        adaption, offset_groups, shape_matching, location_threshold, centre: as of ``GuidedAnchoring``.
        shape_weight: of the loss of the shapes.
        image_size: shorter side to which images are resized, the longer at most 5/3 of it; as they are if None.
        prior: score of every class, and of a centre, at the start.

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
        anchor_scale: float = 4.0,
        adaption: Source = "shape",
        offset_groups: int = 4,
        shape_matching: Matching = "samples",
        location_threshold: float = 0.01,
        centre: Centre = "middle",
        shape_weight: float = 1.0,
        image_size: int | None = None,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        if not 0 <= location_threshold < 1:
            raise ValueError(f"location_threshold must lie in [0, 1), got {location_threshold}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.threshold = location_threshold
        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels, finest=8, top="convolutions")
        self.strides = tuple(level.stride for level in self.backbone.levels)
        self.head = RetinaNetHead(channels, 1, num_classes)
        init_classifier(self.head.classification_head.cls_logits, prior=prior)
        self.guide = AnchorGuide(
            channels,
            self.strides,
            anchor_scale=anchor_scale,
            std=1.0,
            shape_matching=shape_matching,
            thresholds=(0.5, 0.4, 0.4),
            centre=centre,
            shape_weight=shape_weight,
            prior=prior,
        )
        self.class_adaption, self.box_adaption = (
            FeatureAdaption(channels, channels, offset_groups=offset_groups, adaption=adaption) for _ in range(2)
        )

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs of A positions, map by map, row by row, cell by cell.

        ``logits`` (N, A, K) and ``deltas`` (N, A, 4), -1000 and zeros where a position is not ``kept`` (N, A),
        ``location`` (N, A), ``shapes`` (N, A, 2), ``anchors`` (N, A, 4) in pixels of the batch, ``levels`` (A,), the
        number of each position's map, and ``sizes`` (N, 2), height and width of the images in the batch.
        """
        x, sizes = self._batch(inputs)
        return {**self._raw(self.backbone(x)), "sizes": sizes}

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``classification``, ``localisation``, ``loss_location`` and ``loss_shape``."""
        x, sizes = self._batch(inputs)
        targets = training_targets(targets, len(x), self.num_classes)
        targets = scale_targets(targets, sizes, image_sizes(inputs))
        maps = self.backbone(x)
        raw = self._raw(maps, everywhere=True)
        return {**guided_dense_loss(raw, targets), **self.guide.losses(raw, maps, targets)}

    def _raw(self, maps: Sequence[Tensor], *, everywhere: bool = False) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        of_class, of_box = self.head.classification_head, self.head.regression_head
        for m in maps:
            seen, boxed = of_class.conv(m), of_box.conv(m)
            raw = self.guide(seen, boxed)
            kept = kept_positions(raw["location"], 0 if everywhere else self.threshold)
            if everywhere or torch.compiler.is_compiling():
                logits = of_class.cls_logits(self.class_adaption(seen, raw["shapes"]))
                deltas = of_box.bbox_reg(self.box_adaption(boxed, raw["shapes"]))
                if not everywhere:
                    logits = torch.where(kept[:, None], logits, LEFT_OUT)
                    deltas = torch.where(kept[:, None], deltas, 0)
            else:
                place, near = torch.nonzero(kept), torch.nonzero(widened(kept))
                grid = (m.shape[0], *m.shape[2:])
                adapted = put_back(self.class_adaption.at(seen, raw["shapes"], near), near, grid)
                logits = put_back(windows_through(of_class.cls_logits, adapted, place), place, grid, LEFT_OUT)
                adapted = put_back(self.box_adaption.at(boxed, raw["shapes"], near), near, grid)
                deltas = put_back(windows_through(of_box.bbox_reg, adapted, place), place, grid)
            raw |= {"kept": kept[:, None], "logits": logits, "deltas": deltas}
            for name, part in raw.items():
                found.setdefault(name, []).append(position_rows(part))
        levels = [torch.full_like(part[0, :, 0], k, dtype=torch.int64) for k, part in enumerate(found["location"])]
        result = {name: torch.cat(parts, 1) for name, parts in found.items()}
        result |= {name: result[name].squeeze(2) for name in ("location", "kept")}
        return {**result, "anchors": self.guide.anchors(result, maps), "levels": torch.cat(levels)}


def guided_dense_loss(raw: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``classification``, focal loss, and ``localisation``, smooth L1 with beta 0.04, over the positive anchors.

    A guided anchor is positive from an overlap of 0.5, or as the best of an object.
    """
    matches = [
        assign(box_iou(target["boxes"].to(anchors), anchors), positive=0.5, negative=0.5, low=0.0)
        for anchors, target in zip(raw["anchors"], targets, strict=True)
    ]
    smooth = nn.SmoothL1Loss(beta=0.04, reduction="none")
    return dense_loss(raw, torch.stack(matches), targets, localisation=smooth)
