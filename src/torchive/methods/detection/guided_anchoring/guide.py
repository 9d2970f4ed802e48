"""The two branches that say where anchors stand and which shapes they have, with what they learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from torchive.methods.detection.guided_anchoring.anchors import Centre, anchors_at, base_squares, guided_sides, turns_of
from torchive.methods.detection.guided_anchoring.assign import (
    assign,
    free_overlaps,
    level_of,
    location_targets,
    sampled_overlaps,
)
from torchive.methods.detection.guided_anchoring.loss import angle_loss, bounded_iou_loss, location_loss
from torchive.nn.prior import init_classifier
from torchive.ops.matching import IGNORED

Matching = Literal["samples", "continuous"]


class AnchorGuide(nn.Module):
    """Features (N, C, H, W) to the logit of a centre (N, 1, H, W), log ratios of sides (N, 2, H, W), and an angle.

    Args:
        channels: C.
        strides: of the maps, finest first.
        anchor_scale: side of the square whose sides are stretched, in strides.
        std: a predicted number times this is a log ratio of sides.
        shape_matching: vIoU by nine "samples", or "continuous", its exact maximum on the object's own map.
        thresholds: of vIoU: positive, negative, and of an object's best position.
        centre: as of ``base_squares``.
        oriented: whether an angle is predicted as well.
        shape_weight: of the loss of the shapes.
        prior: probability of a centre at the start.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        anchor_scale: float,
        std: float,
        shape_matching: Matching = "samples",
        thresholds: tuple[float, float, float] = (0.7, 0.3, 0.3),
        centre: Centre = "middle",
        oriented: bool = False,
        shape_weight: float = 1.0,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        if shape_matching not in ("samples", "continuous") or centre not in ("middle", "corner"):
            raise ValueError(
                "expected shape_matching samples or continuous and centre middle or corner, "
                f"got {shape_matching!r} and {centre!r}"
            )
        if anchor_scale <= 0:
            raise ValueError(f"anchor_scale must be > 0, got {anchor_scale}")
        self.strides, self.scale, self.std = tuple(strides), anchor_scale, std
        self.shape_matching, self.thresholds, self.centre, self.shape_weight = (
            shape_matching,
            thresholds,
            centre,
            shape_weight,
        )
        self.location, self.shape = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, 2, 1)
        init_classifier(self.location, prior=prior)
        nn.init.normal_(self.shape.weight, std=0.01)
        nn.init.zeros_(self.shape.bias)  # type: ignore[arg-type]
        self.angle: nn.Conv2d | None = None
        if oriented:
            self.angle = nn.Conv2d(channels, 2, 1)
            nn.init.normal_(self.angle.weight, std=0.01)
            with torch.no_grad():
                self.angle.bias.copy_(torch.tensor([1.0, 0.0]))  # type: ignore[union-attr]
        self.sampler, self.eps = BalancedPositiveNegativeSampler(256, 0.5), 0.0

    def forward(self, x: Tensor, shape_features: Tensor | None = None) -> dict[str, Tensor]:
        """``location``, ``shapes`` and of oriented anchors ``doubled`` (N, 2, H, W), (cos 2a, sin 2a) of any length."""
        seen = x if shape_features is None else shape_features
        found = {"location": self.location(x), "shapes": self.shape(seen)}
        if self.angle is not None:
            found["doubled"] = self.angle(seen)
        return found

    def turns(self, raw: dict[str, Tensor]) -> Tensor | None:
        """Cosine and sine (N, 2, H, W) of the angle that features are turned by."""
        return turns_of(raw["doubled"].movedim(1, -1)).movedim(-1, 1) if "doubled" in raw else None

    def anchors(self, rows: dict[str, Tensor], maps: Sequence[Tensor]) -> Tensor:
        """Guided anchors (N, A, 4) of ``shapes`` and ``doubled`` as rows (N, A, 2), without gradient."""
        squares = self._squares(maps)
        sides = guided_sides(squares, rows["shapes"].detach(), self.std)
        return anchors_at(squares, sides, turns_of(rows["doubled"]) if "doubled" in rows else None)

    def losses(
        self, rows: dict[str, Tensor], maps: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """``loss_location``, ``loss_shape`` and of oriented anchors ``loss_angle``.

        Args:
            rows: ``location`` (N, A), ``shapes`` (N, A, 2) and ``doubled`` (N, A, 2).
            maps: that they come from.
            targets: dicts with ``boxes`` (L, 4) in pixels of the batch, and of oriented anchors ``rotated`` (L, 5):
                centre, sides, and the angle of the first side in radians, from x to y.
        """
        wide = torch.promote_types(rows["location"].dtype, torch.float32)
        squares, level = self._squares(maps), self._levels(maps)
        objects = [self._objects(target, squares) for target in targets]
        labels = [self._labels(target, own[1], maps) for target, own in zip(targets, objects, strict=True)]
        losses = {"loss_location": location_loss(rows["location"].to(wide), torch.stack(labels))}
        matches = torch.stack([self._match(squares, level, *own) for own in objects])  # (N, A)
        drawn = self.sampler(list(labels_of(matches)))
        positive, negative = (torch.stack(part).bool() for part in drawn)
        count = (positive | negative).sum().clamp(min=1)
        image, place = torch.nonzero(positive, as_tuple=True)
        first = torch.tensor([0, *(len(own[1]) for own in objects)], device=matches.device).cumsum(0)
        row = matches[image, place] + first[image]
        truth = torch.cat([own[1] for own in objects])[row].to(wide)  # (P, 2)
        sides = guided_sides(squares[place], rows["shapes"][image, place].to(wide), self.std)
        losses["loss_shape"] = self.shape_weight * bounded_iou_loss(sides, truth, eps=self.eps).sum() / count
        if self.angle is not None:
            angle = torch.cat([own[2] for own in objects])[row].to(wide)
            each = angle_loss(rows["doubled"][image, place].to(wide), angle, truth)
            losses["loss_angle"] = each.sum() / max(len(each), 1)
        return losses

    def _objects(self, target: dict[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centres (L, 2), sides (L, 2) and angles (L,) of an image's objects."""
        if self.angle is None:
            boxes = target["boxes"].to(like)
            return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], torch.zeros_like(boxes[:, 0])
        if "rotated" not in target:
            raise ValueError(f"oriented anchors need targets with rotated (L, 5), got {sorted(target)}")
        found = target["rotated"].to(like)
        sides, angle = found[:, 2:4], found[:, 4]
        lying = sides[:, 0] >= sides[:, 1]  # the first side is the longer one
        return (
            found[:, :2],
            torch.where(lying[:, None], sides, sides.flip(1)),
            torch.where(lying, angle, angle + torch.pi / 2),
        )

    def _labels(self, target: dict[str, Tensor], sides: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Of the locations (A,)."""
        level = level_of(sides, self.strides, self.scale)
        grids = [tuple(m.shape[2:]) for m in maps]
        return location_targets(target["boxes"].to(sides), level, grids, self.strides, centre=self.centre)

    def _match(self, squares: Tensor, level: Tensor, centres: Tensor, sides: Tensor, angle: Tensor) -> Tensor:
        """Of each position (A,) the row of the object whose shape it learns, -1 or -2."""
        places = (squares[:, :2] + squares[:, 2:]) / 2 - centres[:, None]  # (L, A, 2)
        if self.angle is not None:
            c, s = angle.cos()[:, None], angle.sin()[:, None]
            x, y = places.unbind(-1)
            places = torch.stack([x * c + y * s, y * c - x * s], -1)
        if self.shape_matching == "samples":
            strides = squares.new_tensor(self.strides)[level]
            overlaps = sampled_overlaps(places, strides, sides, scale=self.scale)
        else:
            own = level_of(sides, self.strides, self.scale)[:, None] == level
            overlaps = torch.where(own, free_overlaps(places, sides), 0)
        high, negative, low = self.thresholds
        return assign(overlaps, positive=high, negative=negative, low=low)

    def _squares(self, maps: Sequence[Tensor]) -> Tensor:
        grids = [m.shape[2:] for m in maps]
        return base_squares(grids, self.strides, maps[0], scale=self.scale, centre=self.centre)

    def _levels(self, maps: Sequence[Tensor]) -> Tensor:
        """Number (A,) of each position's map."""
        return torch.cat(
            [torch.full((m.shape[2] * m.shape[3],), k, dtype=torch.int64, device=m.device) for k, m in enumerate(maps)]
        )


def labels_of(matches: Tensor) -> Tensor:
    """1 for an object, 0 for background, -1 where it does not count, of matches as of ``assign``."""
    return torch.where(matches >= 0, 1, torch.where(matches == IGNORED, -1, 0))


def position_rows(part: Tensor) -> Tensor:
    """A map (N, K, H, W) as rows (N, H W, K)."""
    return part.permute(0, 2, 3, 1).flatten(1, 2)
