"""The detector: sources, heads and default boxes; its verbs are those of ``MultiBoxDetector``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

from torchive.nn.multibox import MultiBoxDetector, source_shapes, source_steps
from torchive.nn.multibox_sources import PyramidSources, VGGSources
from torchive.nn.prior import init_classifier


class SSD(MultiBoxDetector):
    """Single-shot detector: images (N, C, H, W), or a list of (C, H, W), to scores and offsets of A default boxes.

    A list is resized to ``image_size`` first, a tensor goes into ``forward`` as it is; ``losses`` and ``predict``
    resize both. Boxes go in and come out in pixels of the images given.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: "vgg16" (the paper's), ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        image_size: side to which images are resized. VGG-16 takes 300, or 512 with one more source.
        default_box_set: "paper", or "torchvision" (VGG-16 at 300 only), which is the authors' COCO setting.
        classification: one "softmax" over K + 1, the published loss, or K "sigmoid"s, the reading notes' reading.
        mining_ratio: hardest negatives for each positive; None counts all.
        sources: indices of the maps to keep, ``(1,)`` for the paper's single-source baseline; the default boxes of a
            map left out move to the nearest one kept. All if None.
        lite: whether heads, and the maps added to another backbone than "vgg16", are depthwise separable: SSDLite
            (Sandler et al., CVPR 2018, arXiv:1801.04381, 6.2).
        iou_threshold: a default box overlapping an object by more is positive.
        alpha: weight of the localisation loss.
        loss: of sigmoid logits and their truths, with ``reduction`` "none", such as ``FocalLoss``; binary
            cross-entropy if None. Or, with either classification, one with ``takes_ious``, such as ``IoUBalancedLoss``.
        localisation_loss: of box codes and their targets, such as ``IoUBalancedLocalisation``; smooth L1 if None.
        prior: with sigmoids, the score of every default box at the start, by the bias; None leaves it.

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
        default_box_set: Literal["paper", "torchvision"] = "paper",
        classification: Literal["softmax", "sigmoid"] = "softmax",
        mining_ratio: float | None = 3.0,
        sources: Sequence[int] | None = None,
        lite: bool = False,
        iou_threshold: float = 0.5,
        alpha: float = 1.0,
        loss: nn.Module | None = None,
        localisation_loss: nn.Module | None = None,
        prior: float | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or image_size < 1:
            raise ValueError(f"num_classes and image_size must be >= 1, got {num_classes} and {image_size}")
        if classification not in ("softmax", "sigmoid") or default_box_set not in ("paper", "torchvision"):
            raise ValueError(
                "expected classification softmax or sigmoid and default_box_set paper or torchvision, "
                f"got {classification!r} and {default_box_set!r}"
            )
        plain = loss is not None and not getattr(loss, "takes_ious", False)
        if classification == "softmax" and (plain or prior is not None):
            raise ValueError("loss and prior are for classification sigmoid, got softmax")
        for part in (loss, localisation_loss):
            if part is not None and getattr(part, "reduction", "none") != "none":
                raise ValueError(f"loss must have the reduction none, got {part.reduction!r}")
        self.loss, self.localisation_loss = loss, localisation_loss
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.classification, self.mining_ratio = classification, mining_ratio
        self.iou_threshold, self.alpha = iou_threshold, alpha
        if backbone == "vgg16":
            self.backbone = VGGSources(in_channels=in_channels, image_size=image_size)
        else:
            self.backbone = PyramidSources(backbone, in_channels=in_channels, image_size=image_size, lite=lite)
        count = len(self.backbone.channels)
        self.sources = tuple(range(count) if sources is None else sources)
        if not self.sources or min(self.sources) < 0 or max(self.sources) >= count:
            raise ValueError(f"sources must be among 0 to {count - 1}, got {self.sources}")
        if default_box_set == "torchvision" and (backbone != "vgg16" or image_size != 300 or sources is not None):
            raise ValueError(
                f"torchvision's default boxes are for all sources of vgg16 at 300, got {backbone!r} at {image_size}"
            )
        shapes = source_shapes(count, default_box_set)
        self.steps = source_steps(image_size, default_box_set)
        merged: dict[int, list[tuple[float, float]]] = {k: [] for k in self.sources}
        for k, shape in enumerate(shapes):
            merged[min(self.sources, key=lambda kept: (abs(kept - k), kept))] += shape
        for k, shape in merged.items():
            self.register_buffer(f"shapes{k}", torch.tensor(shape), persistent=False)  # (B, 2)
        channels = [self.backbone.channels[k] for k in self.sources]
        per_cell = [len(merged[k]) for k in self.sources]
        outputs = num_classes + (classification == "softmax")
        self.head = (
            SSDLiteHead(channels, per_cell, outputs, nn.BatchNorm2d) if lite else SSDHead(channels, per_cell, outputs)
        )
        if prior is not None:
            for layer in self.head.get_submodule("classification_head").modules():
                if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                    init_classifier(layer, prior=prior)

    def _loss_options(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "loss": self.loss, "localisation_loss": self.localisation_loss}
