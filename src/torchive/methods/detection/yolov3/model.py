"""The detector: backbone, neck, anchors, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchive.methods.detection.yolov3.darknet import Darknet53, TinyDarknet
from torchive.methods.detection.yolov3.decode import boxes_of, decode, scored_cells
from torchive.methods.detection.yolov3.loss import Coding, assign, owners, yolo_loss
from torchive.methods.detection.yolov3.neck import Neck
from torchive.nn.network import build_features
from torchive.nn.prior import prior_bias
from torchive.ops.anchors import centred_anchors
from torchive.ops.images import check_images, fit_boxes, image_sizes, letterbox, training_targets
from torchive.structures import Detections

Shapes = Sequence[Sequence[Sequence[float]]]

#: Width and height in pixels, finest map first; from k-means over COCO's boxes.
ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
TINY_ANCHORS = (((10, 14), (23, 27), (37, 58)), ((81, 82), (135, 169), (344, 319)))


class YOLOv3(nn.Module):
    """One-stage detector: images (N, C, H, W), or a list of (C, H, W), to the raw outputs of A predictions.

    A list is letterboxed to ``image_size`` first, a tensor goes into ``forward`` as it is; ``losses`` and ``predict``
    letterbox both. Boxes go in and come out in pixels of the images given.

    Args:
        num_classes: K; labels run from 1 to K.
        in_channels: C.
        backbone: "darknet53", "tiny", ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``, whose last
            maps are taken.
        image_size: side of the square that the network sees. The release tests at 320, 416 and 608.
        anchors: shapes (width, height) in pixels of each map, finest first; the release's if None.
            ``torchive.ops.anchors.kmeans_anchors`` finds them for your boxes.
        widths: channels F of each scale's convolutions, finest first; half of Darknet's own width if None.
        coding: "logistic", the paper's; "linear" places; or "rcnn", offsets relative to the anchor under smooth L1.
        ignore_threshold: overlap above which a prediction without an object counts for nothing: 0.5 in the paper,
            0.7 in the released configuration.
        accept_threshold: overlap above which it learns the object instead; the paper's dual threshold, which did not
            help.
        loss: of objectness logits and their truths, with ``reduction`` "none", such as ``FocalLoss``; binary
            cross-entropy if None.
        train_sizes: sides of which one is drawn for each batch of ``losses``; ``image_size`` if None. The release has
            320, 352, ..., 608.
        prior: objectness of every prediction at the start, by the bias; None leaves it.

    Raises:
        ValueError: an argument outside the above.
    """

    task = "detection"

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "darknet53",
        image_size: int = 416,
        anchors: Shapes | None = None,
        widths: Sequence[int] | None = None,
        coding: Coding = "logistic",
        ignore_threshold: float = 0.5,
        accept_threshold: float | None = None,
        loss: nn.Module | None = None,
        train_sizes: Sequence[int] | None = None,
        prior: float | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1 or image_size < 1:
            raise ValueError(f"num_classes and image_size must be >= 1, got {num_classes} and {image_size}")
        if coding not in ("logistic", "linear", "rcnn"):
            raise ValueError(f"coding must be logistic, linear or rcnn, got {coding!r}")
        if loss is not None and getattr(loss, "reduction", "none") != "none":
            raise ValueError(f"loss must have the reduction none, got {loss.reduction!r}")
        if train_sizes is not None and (not train_sizes or min(train_sizes) < 1):
            raise ValueError(f"train_sizes must be sides >= 1, got {list(train_sizes)}")
        tiny = backbone == "tiny"
        shapes = anchors if anchors is not None else TINY_ANCHORS if tiny else ANCHORS
        if backbone == "darknet53":
            backbone = Darknet53(in_channels=in_channels)
        elif backbone == "tiny":
            backbone = TinyDarknet(in_channels=in_channels)
        self.backbone = build_features(backbone, in_channels=in_channels)
        levels: Sequence[Any] = self.backbone.levels[-len(shapes) :]  # type: ignore[index,assignment]
        if len(levels) < len(shapes):
            raise ValueError(f"anchors are given for {len(shapes)} maps, the backbone has {len(levels)}")
        self.strides = tuple(level.stride for level in levels)
        if widths is None:
            widths = (128, 256) if tiny else [128 * 2**k for k in range(len(shapes))]
        if len(widths) != len(shapes):
            raise ValueError(f"expected {len(shapes)} widths, one for each map, got {list(widths)}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.coding, self.loss = coding, loss
        self.ignore_threshold, self.accept_threshold = ignore_threshold, accept_threshold
        self.train_sizes = tuple(train_sizes) if train_sizes is not None else None
        for k, shape in enumerate(shapes):
            self.register_buffer(f"shapes{k}", torch.tensor(shape, dtype=torch.float32), persistent=False)  # (B, 2)
        outputs = [len(shape) * (5 + num_classes) for shape in shapes]
        depths = [0] * (len(shapes) - 1) + [1] if tiny else [5] * len(shapes)
        self.neck = Neck([level.channels for level in levels], widths, outputs, depths)
        if prior is not None:
            for scale in self.neck.scales:
                bias: Tensor = scale.out.bias  # type: ignore[union-attr,assignment]
                nn.init.constant_(bias.detach().view(-1, 5 + num_classes)[:, 4], prior_bias(prior))

    @property
    def shapes(self) -> list[Tensor]:
        """Anchor shapes (B, 2) of each map in pixels, finest first."""
        return [getattr(self, f"shapes{k}") for k in range(len(self.strides))]

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs of A predictions, map by map, row by row, cell by cell.

        ``deltas`` (N, A, 4), ``objectness`` (N, A), ``logits`` (N, A, K), ``anchors`` (A, 4) xyxy and ``strides`` (A,)
        in pixels of the network's input, ``canvas`` (2,) its height and width.
        """
        check_images(inputs, self.in_channels)
        return self._raw(inputs if isinstance(inputs, Tensor) else self._framed(inputs))[0]

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``localisation``, ``objectness`` and ``classification``; without boxes the first and last are zero."""
        check_images(inputs, self.in_channels)
        sizes = image_sizes(inputs)
        targets = training_targets(targets, len(sizes), self.num_classes)
        side = self.image_size
        if self.train_sizes is not None and self.training:
            side = self.train_sizes[int(torch.randint(len(self.train_sizes), ()))]
        canvas = (side, side)
        raw, grids = self._raw(letterbox(inputs, canvas))
        wide = torch.promote_types(raw["deltas"].dtype, torch.float32)
        boxes = [fit_boxes(target["boxes"].to(wide), size, canvas) for target, size in zip(targets, sizes, strict=True)]
        own = owners(torch.cat(boxes), self.shapes, grids, self.strides).split([len(box) for box in boxes])
        with torch.no_grad():
            predicted = boxes_of(raw["deltas"].to(wide), raw["anchors"], raw["strides"], self.coding)
            matches = [
                assign(found, box, index, ignore=self.ignore_threshold, accept=self.accept_threshold)
                for found, box, index in zip(predicted, boxes, own, strict=True)
            ]
        labels = [target["labels"] for target in targets]
        return yolo_loss(raw, matches, boxes, labels, own, canvas, coding=self.coding, loss=self.loss)

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode(raw, image_sizes, coding=self.coding, **options)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.005,
        candidates: int = 1000,
        nms_threshold: float = 0.45,
        max_detections: int = 100,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in."""
        check_images(inputs, self.in_channels)
        return self.decode(
            self(self._framed(inputs)),
            image_sizes(inputs),
            score_threshold=score_threshold,
            candidates=candidates,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, A, 1, 4) in pixels of the canvas, of ``size``, scores (N, A, K)."""
        return scored_cells(raw, size, self.coding)

    def _framed(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        return letterbox(inputs, (self.image_size, self.image_size))

    def _raw(self, x: Tensor) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """``forward``'s outputs of a batch, and height and width of each map."""
        maps = self.neck(self.backbone(x)[-len(self.strides) :])
        rows = [
            m.unflatten(1, (len(shape), -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # (N, H W B, 5 + K)
            for m, shape in zip(maps, self.shapes, strict=True)
        ]
        flat = torch.cat(rows, 1)
        grids = [(m.shape[2], m.shape[3]) for m in maps]
        anchors = centred_anchors(grids, self.strides, self.shapes)
        cells = [torch.full_like(r[0, :, 0], s, dtype=anchors.dtype) for r, s in zip(rows, self.strides, strict=True)]
        raw = {
            "deltas": flat[..., :4],
            "objectness": flat[..., 4],
            "logits": flat[..., 5:],
            "anchors": anchors,
            "strides": torch.cat(cells),
            "canvas": torch.tensor([x.shape[2], x.shape[3]], device=x.device),
        }
        return raw, grids
