"""The detector: sources, fusion, exchange, heads, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSDHead

from torchive.methods.detection.netnet.exchange import Gate, NearestFusion, NeighbourExchange, TopDownFusion, Variant
from torchive.nn.multibox import (
    BoxSet,
    decode_multibox,
    match_targets,
    multibox_loss,
    scored_multibox,
    source_shapes,
    source_steps,
)
from torchive.nn.multibox_sources import PyramidSources, VGGSources
from torchive.ops.anchors import default_boxes
from torchive.ops.images import check_images, image_sizes, stack_resized, training_targets
from torchive.structures import Detections


class NETNet(nn.Module):
    """Single-shot detector: images (N, C, H, W), or a list of (C, H, W), to scores and offsets of A default boxes.

    A list is resized to ``image_size`` first, a tensor goes into ``forward`` as it is; ``losses`` and ``predict``
    resize both. Boxes go in and come out in pixels of the images given. Without ``fusion`` and ``pairs`` it is SSD.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: "vgg16" (the paper's fast form), ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        image_size: side to which images are resized. VGG-16 takes 300, or 512 with one more source.
        fusion: of neighbouring maps before the exchange: "nearest", the paper's; "top_down", as in feature pyramids; or
            "none".
        pairs: shallow and deep map of each exchange, one after the other, counted from 0 at the finest; the paper skips
            one in between, since the default boxes of neighbours overlap in scale.
        variant: "both"; or "erase" or "transfer" alone.
        gate, open_bias: as of ``NeighbourExchange``.
        mining_ratio: hardest negatives for each positive; None counts all.
        iou_threshold: a default box overlapping an object by more is positive.
        default_box_set: "paper", or "torchvision" (VGG-16 at 300 only), which is SSD's COCO setting.

    Raises:
        ValueError: an argument outside the above; in ``forward``, an image smaller than VGG-16's sources need.
    """

    task = "detection"

    def __init__(
        self,
        *,
        num_classes: int = 20,
        in_channels: int = 3,
        backbone: str | nn.Module = "vgg16",
        image_size: int = 300,
        fusion: Literal["nearest", "top_down", "none"] = "nearest",
        pairs: Sequence[Sequence[int]] = ((0, 2), (1, 3)),
        variant: Variant = "both",
        gate: Gate = "channels",
        open_bias: float = 0.0,
        mining_ratio: float | None = 3.0,
        iou_threshold: float = 0.5,
        default_box_set: BoxSet = "paper",
    ) -> None:
        super().__init__()
        if num_classes < 1 or image_size < 1:
            raise ValueError(f"num_classes and image_size must be >= 1, got {num_classes} and {image_size}")
        if fusion not in ("nearest", "top_down", "none") or default_box_set not in ("paper", "torchvision"):
            raise ValueError(
                "expected fusion nearest, top_down or none and default_box_set paper or torchvision, "
                f"got {fusion!r} and {default_box_set!r}"
            )
        if default_box_set == "torchvision" and (backbone != "vgg16" or image_size != 300):
            raise ValueError(f"torchvision's default boxes are for vgg16 at 300, got {backbone!r} at {image_size}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.mining_ratio, self.iou_threshold = mining_ratio, iou_threshold
        self.backbone: VGGSources | PyramidSources
        if backbone == "vgg16":
            self.backbone = VGGSources(in_channels=in_channels, image_size=image_size)
        else:
            self.backbone = PyramidSources(backbone, in_channels=in_channels, image_size=image_size)
        channels = self.backbone.channels
        self.pairs = tuple((int(shallow), int(deep)) for shallow, deep in pairs)
        if any(not 0 <= shallow < deep < len(channels) for shallow, deep in self.pairs):
            raise ValueError(f"pairs must be a finer and a coarser of {len(channels)} maps, got {self.pairs}")
        fused = max((deep for _, deep in self.pairs), default=len(channels) - 1) + 1
        self.fusion: nn.Module | None = None
        if fusion != "none":
            self.fusion = (NearestFusion if fusion == "nearest" else TopDownFusion)(channels, fused)
        self.exchanges = nn.ModuleList(
            NeighbourExchange(channels[s], channels[d], halvings=d - s, variant=variant, gate=gate, open_bias=open_bias)
            for s, d in self.pairs
        )
        shapes = source_shapes(len(channels), default_box_set)
        for k, shape in enumerate(shapes):
            self.register_buffer(f"shapes{k}", torch.tensor(shape), persistent=False)  # (B, 2)
        self.steps = source_steps(image_size, default_box_set)
        self.head: nn.Module = SSDHead(list(channels), [len(shape) for shape in shapes], num_classes + 1)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """``logits`` (N, A, K + 1), ``deltas`` (N, A, 4), ``anchors`` (A, 4) in fractions of the image."""
        check_images(inputs, self.in_channels)
        x = inputs if isinstance(inputs, Tensor) else self._resize(inputs)
        if min(x.shape[2:]) < self.backbone.smallest:
            raise ValueError(f"each side must be at least {self.backbone.smallest}, got {tuple(x.shape[2:])}")
        maps = self.scale_aware(self.backbone(x))
        out: dict[str, Tensor] = self.head(maps)
        shapes = [getattr(self, f"shapes{k}") for k in range(len(maps))]
        anchors = default_boxes([m.shape[2:] for m in maps], shapes, self.steps)
        return {"logits": out["cls_logits"], "deltas": out["bbox_regression"], "anchors": anchors}

    def scale_aware(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps after fusion and exchange, of the same shapes."""
        found = list(maps) if self.fusion is None else self.fusion(maps)
        for (s, d), exchange in zip(self.pairs, self.exchanges, strict=True):
            found[s], found[d] = exchange(found[s], found[d])
        return found

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``classification`` and ``localisation``, both zero where no default box is matched."""
        check_images(inputs, self.in_channels)
        sizes = image_sizes(inputs)
        targets = training_targets(targets, len(sizes), self.num_classes)
        raw = self(self._resize(inputs))
        matches, boxes = match_targets(raw["anchors"], sizes, targets, self.iou_threshold)
        labels = torch.cat([target["labels"] for target in targets])
        return multibox_loss(
            raw["logits"], raw["deltas"], raw["anchors"], matches, boxes, labels, mining_ratio=self.mining_ratio
        )

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode_multibox(raw, image_sizes, **options)

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
        return scored_multibox(raw, size)

    def _resize(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        return stack_resized(inputs, (self.image_size, self.image_size))
