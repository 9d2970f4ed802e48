"""The detector: network, heads, square anchors, and the three verbs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.faces.blazeface.decode import Blending, decode, fixed_faces
from torchive.methods.faces.blazeface.loss import joined, points_of, shape_losses
from torchive.methods.faces.blazeface.network import LAYOUTS, BlazeBlock, BlazeNet, Norm
from torchive.nn.multibox import classification_loss, match_targets, per_positive
from torchive.nn.network import build_features
from torchive.nn.prior import init_classifier
from torchive.ops.anchors import centred_anchors
from torchive.ops.images import check_images, fit_boxes, image_sizes, letterbox, training_targets
from torchive.protocols import Level
from torchive.structures import Detections

#: Smallest and largest side of an anchor as shares of the image, before the one between the last scale and the whole.
SMALLEST, LARGEST = 0.1484375, 0.75


class BlazeFace(nn.Module):
    """Face detector: images (N, C, H, W) in [0, 1], or a list of (C, H, W), to scores, boxes and points of A anchors.

    A list is letterboxed to ``image_size`` on black first, a tensor goes into ``forward`` as it is; ``losses`` and
    ``predict`` letterbox both. Boxes and points go in and come out in pixels of the images given.

    Args:
        num_classes: K; labels run from 1 to K.
        in_channels: C.
        backbone: "paper" or "short_range" (see ``BlazeNet``), ``timm/NAME``, ``torchvision/NAME`` or a module with
            ``levels``, whose maps of stride 8 and 16 are taken.
        image_size: side of the square that the network sees.
        kernel_size: of the depthwise convolutions of the two networks; theirs if None.
        keypoints: P points of each object; of a face the eyes come first.
        levels: 2, where all anchors of coarser maps stand on the one of stride 16; or 4, SSD's way with two more maps.
        anchor_sizes: sides of the square anchors in pixels, a list for each map; those of the released graph's scales
            if None. They decide what an anchor learns; raw outputs are in pixels, whatever its side.
        norm: after each convolution of the two networks; None for biases, as in the released weights.
        iou_threshold: an anchor overlapping an object by more is positive.
        mining_ratio: hardest negatives for each positive; None counts all.
        loss: of class logits and their truths, with ``reduction`` "none", such as ``FocalLoss``; binary cross-entropy
            if None.
        prior: score of every anchor at the start.

    Raises:
        ValueError: an argument outside the above.
    """

    task = "detection"
    anchors: Tensor

    def __init__(
        self,
        *,
        num_classes: int = 1,
        in_channels: int = 3,
        backbone: str | nn.Module = "paper",
        image_size: int = 128,
        kernel_size: int | None = None,
        keypoints: int = 6,
        levels: Literal[2, 4] = 2,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        norm: Norm | None = nn.BatchNorm2d,
        iou_threshold: float = 0.5,
        mining_ratio: float | None = 3.0,
        loss: nn.Module | None = None,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if num_classes < 1 or image_size < 1 or keypoints < 0:
            raise ValueError(
                "expected num_classes and image_size >= 1 and keypoints >= 0, "
                f"got {num_classes}, {image_size} and {keypoints}"
            )
        if levels not in (2, 4):
            raise ValueError(f"levels must be 2 or 4, got {levels!r}")
        if loss is not None and getattr(loss, "reduction", "none") != "none":
            raise ValueError(f"loss must have the reduction none, got {loss.reduction!r}")
        if isinstance(backbone, str) and backbone in LAYOUTS:
            backbone = BlazeNet(backbone, in_channels=in_channels, kernel_size=kernel_size, norm=norm)
        self.backbone = build_features(backbone, in_channels=in_channels)
        found: Sequence[Level] = self.backbone.levels  # type: ignore[assignment]
        kept = {level.stride: k for k, level in enumerate(found) if level.stride in (8, 16)}
        if set(kept) != {8, 16}:
            raise ValueError(
                f"expected a backbone with maps of stride 8 and 16, its strides are {[v.stride for v in found]}"
            )
        self.kept = (kept[8], kept[16])
        channels = [found[k].channels for k in self.kept]
        self.extra = nn.ModuleList(BlazeBlock(channels[1], channels[1], stride=2, norm=norm) for _ in range(levels - 2))
        channels += [channels[1]] * (levels - 2)
        self.strides = (8, 16, 32, 64)[:levels]
        sizes = anchor_sizes if anchor_sizes is not None else default_sizes(image_size, levels)
        if len(sizes) != levels or any(not side or min(side) <= 0 for side in sizes):
            raise ValueError(f"expected {levels} lists of anchor_sizes above zero, got {sizes}")
        for k, side in enumerate(sizes):
            self.register_buffer(
                f"shapes{k}", torch.tensor([[s, s] for s in side], dtype=torch.float32), persistent=False
            )
        self.grids = [(-(-image_size // stride),) * 2 for stride in self.strides]
        self.register_buffer("anchors", self._anchors(self.grids), persistent=False)  # of the size that it is made for
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.keypoints, self.iou_threshold, self.mining_ratio, self.loss = keypoints, iou_threshold, mining_ratio, loss
        width = 4 + 2 * keypoints
        self.classifiers = nn.ModuleList(
            nn.Conv2d(c, len(side) * num_classes, 1) for c, side in zip(channels, sizes, strict=True)
        )
        self.regressors = nn.ModuleList(
            nn.Conv2d(c, len(side) * width, 1) for c, side in zip(channels, sizes, strict=True)
        )
        for classifier in self.classifiers:
            init_classifier(classifier, prior=prior)
        for regressor, side in zip(self.regressors, sizes, strict=True):  # a box starts as its anchor
            bias: Tensor = regressor.bias.detach().zero_().view(-1, width)  # type: ignore[operator]
            bias[:, 2:4] = torch.tensor(side)[:, None]

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs of A anchors, map by map, row by row, cell by cell.

        ``logits`` (N, A, K); ``deltas`` (N, A, 4 + 2 P), centre relative to the anchor's, width, height and points
        relative to the anchor's centre; ``anchors`` (A, 4) xyxy; all in pixels of the network's input, of which
        ``canvas`` (2,) is height and width.
        """
        check_images(inputs, self.in_channels)
        x = inputs if isinstance(inputs, Tensor) else self._framed(inputs)
        maps = self.backbone(2 * x - 1)
        maps = [maps[k] for k in self.kept]
        for block in self.extra:
            maps.append(block(maps[-1]))
        grids = [(m.shape[2], m.shape[3]) for m in maps]
        # halves do not hold pixel numbers, and a graph must follow its image
        usual = not torch.compiler.is_compiling() and grids == self.grids and self.anchors.itemsize >= 4
        return {
            "logits": _rows(self.classifiers, maps, self.num_classes),
            "deltas": _rows(self.regressors, maps, 4 + 2 * self.keypoints),
            "anchors": self.anchors if usual else self._anchors(grids),
            "canvas": torch.tensor([x.shape[2], x.shape[3]], device=x.device),
        }

    def _anchors(self, grids: Sequence[Sequence[int]]) -> Tensor:
        return centred_anchors(grids, self.strides, [getattr(self, f"shapes{k}") for k in range(len(grids))])

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``classification``, ``localisation`` and ``keypoints``, over the number of matched anchors of the batch.

        A target may have ``keypoints`` (L, P, 3) as torchvision's: x, y, and whether the point is given. All three
        are zero where no anchor is matched.
        """
        check_images(inputs, self.in_channels)
        sizes = image_sizes(inputs)
        targets = training_targets(targets, len(sizes), self.num_classes)
        raw, canvas = self(self._framed(inputs)), (self.image_size, self.image_size)
        wide = torch.promote_types(raw["deltas"].dtype, torch.float32)
        deltas = raw["deltas"].to(wide)
        points = [points_of(target, self.keypoints, k) for k, target in enumerate(targets)]
        boxes = [fit_boxes(t["boxes"].to(wide), size, canvas) for t, size in zip(targets, sizes, strict=True)]
        matches, _ = match_targets(
            raw["anchors"], [(1, 1)] * len(sizes), [{"boxes": box} for box in boxes], self.iou_threshold
        )
        moved = [
            torch.cat([fit_boxes(p[..., :2].to(wide).repeat(1, 1, 2), size, canvas)[..., :2], p[..., 2:].to(wide)], -1)
            for p, size in zip(points, sizes, strict=True)
        ]
        places, shapes = shape_losses(deltas, raw["anchors"], matches, joined(boxes, deltas), joined(moved, deltas))
        share = per_positive(matches >= 0, wide)
        labels = torch.cat([target["labels"] for target in targets])
        options: dict[str, Any] = {"mode": "sigmoid", "mining_ratio": self.mining_ratio, "loss": self.loss}
        return {
            "classification": classification_loss(raw["logits"].to(wide), matches, labels, **options),
            "localisation": places * share,
            "keypoints": shapes * share,
        }

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode(raw, image_sizes, **options)

    def decoded(self, raw: dict[str, Tensor], size: Sequence[int], **options: Any) -> dict[str, Tensor]:
        """Faces of framed images in fixed shapes, as ``fixed_faces``; for export."""
        return fixed_faces(raw, size, **options)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        candidates: int = 200,
        overlap: float = 0.3,
        blending: Blending = "top",
        max_detections: int = 100,
    ) -> list[Detections]:
        """One ``Detections`` with ``keypoints`` per image, in pixels of the image that went in.

        Overlapping boxes are averaged; see ``blend`` for ``overlap`` and ``blending``. The released graph takes
        scores from 0.5, its port from 0.75; the default keeps the weak ones for the average precision.
        """
        check_images(inputs, self.in_channels)
        return self.decode(
            self(self._framed(inputs)),
            image_sizes(inputs),
            score_threshold=score_threshold,
            candidates=candidates,
            overlap=overlap,
            blending=blending,
            max_detections=max_detections,
        )

    def _framed(self, inputs: Tensor | Sequence[Tensor]) -> Tensor:
        return letterbox(inputs, (self.image_size, self.image_size), value=0.0)


def default_sizes(image_size: int, levels: int) -> list[list[float]]:
    """Sides of the anchors in pixels: of four scales each its own and the mean with the next, two to a map.

    With two maps all of the coarser three stand on the second: two and six anchors a cell.
    """
    scales = [SMALLEST + (LARGEST - SMALLEST) * k / 3 for k in range(4)] + [1.0]
    pairs = [[image_size * scales[k], image_size * math.sqrt(scales[k] * scales[k + 1])] for k in range(4)]
    return pairs if levels == 4 else [pairs[0], [side for pair in pairs[1:] for side in pair]]


def _rows(heads: nn.ModuleList, maps: Sequence[Tensor], width: int) -> Tensor:
    """Outputs (N, A, width) of a head on each map."""
    parts = [head(m).permute(0, 2, 3, 1) for head, m in zip(heads, maps, strict=True)]
    return torch.cat([part.unflatten(3, (-1, width)).flatten(1, 3) for part in parts], 1)
