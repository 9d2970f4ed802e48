"""The two dense detectors that the masks may stand on, seen alike: points with scores and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetHead

from torchive.nn.fcos import (
    FCOSHead,
    fcos_boxes,
    fcos_detections,
    fcos_loss,
    interest_of,
    lay_points,
    level_detections,
    match_points,
    scored_points,
)
from torchive.nn.prior import init_classifier
from torchive.nn.retinanet import dense_loss, lay_anchors, tower_rows
from torchive.ops.anchors import cell_anchors
from torchive.ops.boxes import clip_to, decode_boxes
from torchive.ops.matching import match_anchors
from torchive.structures import Detections

Targets = Sequence[dict[str, Tensor]]
Sizes = Sequence[tuple[int, int]]


class PointDetector(Protocol):
    """A dense detector over maps. ``cue`` names the raw output (N, A, 4) that says how large an object is.

    ``per_cell`` points stand on each cell of the maps; ``detections`` returns the points' rows beside each image's.
    ``nms_threshold`` is the overlap that it is usually suppressed at.
    """

    cue: str
    per_cell: int
    nms_threshold: float

    def raw(self, maps: Sequence[Tensor]) -> dict[str, Tensor]: ...

    def match(self, raw: dict[str, Tensor], targets: Targets) -> Tensor: ...

    def losses(self, raw: dict[str, Tensor], match: Tensor, targets: Targets) -> dict[str, Tensor]: ...

    def boxes(self, raw: dict[str, Tensor]) -> Tensor: ...

    def detections(self, raw: dict[str, Tensor], sizes: Sizes, **options: Any) -> list[tuple[Detections, Tensor]]: ...

    def scored(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]: ...


class FCOSPoints(nn.Module):
    """FCOS: a point of interest is a location, described by its distances to the box's sides in strides.

    Args:
        channels: of the maps.
        num_classes: K.
        strides: of the maps.
        depth: convolutions of each tower.
        sizes_of_interest, radius: as of ``interest_of`` and ``match_points``.
        prior: score of every class at the start.
    """

    cue, per_cell, nms_threshold = "distances", 1, 0.6
    interest: Tensor

    def __init__(
        self,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        depth: int,
        sizes_of_interest: Sequence[float] | None,
        radius: float | None,
        prior: float,
    ) -> None:
        super().__init__()
        self.strides, self.radius = tuple(strides), radius
        self.head = FCOSHead(channels, num_classes, levels=len(strides), depth=depth, prior=prior)
        self.register_buffer("interest", interest_of(strides, sizes_of_interest), persistent=False)

    def raw(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """``logits``, ``distances``, ``centerness``, ``points``, ``strides`` and ``levels`` of A points."""
        return self.head(maps)[0] | lay_points(maps, self.strides)

    def match(self, raw: dict[str, Tensor], targets: Targets) -> Tensor:
        """The row (N, A) of its image's target that each point learns, below zero for none."""
        found = [match_points(raw, self.interest, [t["boxes"]], radius=self.radius) for t in targets]
        return torch.cat(found)

    def losses(self, raw: dict[str, Tensor], match: Tensor, targets: Targets) -> dict[str, Tensor]:
        """``classification``, ``localisation`` and ``centerness``."""
        counts = torch.tensor([0, *(len(t["labels"]) for t in targets[:-1])], device=match.device).cumsum(0)
        rows = torch.where(match >= 0, match + counts[:, None], -1)
        boxes, labels = (torch.cat([t[key] for t in targets]) for key in ("boxes", "labels"))
        return fcos_loss(raw, rows, boxes, labels)

    def boxes(self, raw: dict[str, Tensor]) -> Tensor:
        """Predicted boxes (N, A, 4) in pixels."""
        return fcos_boxes(raw)

    def detections(self, raw: dict[str, Tensor], sizes: Sizes, **options: Any) -> list[tuple[Detections, Tensor]]:
        """As ``fcos_detections``."""
        return fcos_detections(raw, sizes, **options)

    def scored(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As ``scored_points``."""
        return scored_points(raw, size)


class RetinaNetPoints(nn.Module):
    """RetinaNet: a point of interest is an anchor, described by its box deltas.

    Args:
        channels: of the maps and of torchvision's towers, which have four convolutions.
        num_classes: K.
        strides: of the maps.
        anchor_sizes: sides in pixels, a list for each map; three from four strides on if None.
        prior: score of every class at the start.

    Raises:
        ValueError: ``anchor_sizes`` do not fit the maps.
    """

    cue, nms_threshold = "deltas", 0.5

    def __init__(
        self,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        *,
        anchor_sizes: Sequence[Sequence[float]] | None,
        prior: float,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        if anchor_sizes is None:
            anchor_sizes = [[4 * s * 2 ** (k / 3) for k in range(3)] for s in strides]
        if len(anchor_sizes) != len(strides) or len({len(sizes) for sizes in anchor_sizes}) != 1:
            raise ValueError(f"anchor_sizes must have {len(strides)} lists of one length, got {list(anchor_sizes)}")
        for k, sizes in enumerate(anchor_sizes):
            self.register_buffer(f"cell{k}", cell_anchors(sizes, (0.5, 1.0, 2.0)), persistent=False)
        self.per_cell = 3 * len(anchor_sizes[0])
        self.head = RetinaNetHead(channels, self.per_cell, num_classes)
        init_classifier(self.head.classification_head.cls_logits, prior=prior)
        self.matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    def raw(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """``logits``, ``deltas``, ``anchors`` and ``levels`` of A anchors."""
        cells: list[Tensor] = [getattr(self, f"cell{k}") for k in range(len(maps))]
        return tower_rows(self.head, maps) | lay_anchors(maps, self.strides, cells)

    def match(self, raw: dict[str, Tensor], targets: Targets) -> Tensor:
        """The row (N, A) of its image's target that each anchor learns, below zero for none."""
        return torch.stack([match_anchors(raw["anchors"], t["boxes"], self.matcher) for t in targets])

    def losses(self, raw: dict[str, Tensor], match: Tensor, targets: Targets) -> dict[str, Tensor]:
        """``classification`` and ``localisation``."""
        return dense_loss(raw, match, targets)

    def boxes(self, raw: dict[str, Tensor]) -> Tensor:
        """Predicted boxes (N, A, 4) in pixels."""
        return decode_boxes(raw["deltas"].float(), raw["anchors"].float())

    def detections(self, raw: dict[str, Tensor], sizes: Sizes, **options: Any) -> list[tuple[Detections, Tensor]]:
        """As ``level_detections``; scores are those of the classes."""
        return level_detections(self.boxes(raw), raw["logits"].float().sigmoid(), raw["levels"], sizes, **options)

    def scored(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Boxes (N, A, 1, 4) cut to images of one ``size`` (height, width), and scores (N, A, K)."""
        return clip_to(self.boxes(raw), size)[:, :, None], raw["logits"].float().sigmoid()
