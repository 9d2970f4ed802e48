"""The detector: sources, fusion, exchange and heads; its verbs are those of ``MultiBoxDetector``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.ssd import SSDHead

from torchive.methods.detection.netnet.exchange import Gate, NearestFusion, NeighbourExchange, TopDownFusion, Variant
from torchive.nn.multibox import BoxSet, MultiBoxDetector, source_shapes, source_steps
from torchive.nn.multibox_sources import PyramidSources, VGGSources


class NETNet(MultiBoxDetector):
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
        self.sources = tuple(range(len(channels)))
        shapes = source_shapes(len(channels), default_box_set)
        for k, shape in enumerate(shapes):
            self.register_buffer(f"shapes{k}", torch.tensor(shape), persistent=False)  # (B, 2)
        self.steps = source_steps(image_size, default_box_set)
        self.head = SSDHead(list(channels), [len(shape) for shape in shapes], num_classes + 1)

    def scale_aware(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's maps after fusion and exchange, of the same shapes."""
        found = list(maps) if self.fusion is None else self.fusion(maps)
        for (s, d), exchange in zip(self.pairs, self.exchanges, strict=True):
            found[s], found[d] = exchange(found[s], found[d])
        return found

    def _maps(self, x: Tensor) -> list[Tensor]:
        return self.scale_aware(self.backbone(x))
