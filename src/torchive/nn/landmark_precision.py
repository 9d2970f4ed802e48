"""How well landmarks are found: similarity of landmarks (OKS), and average precision of boxes, masks and landmarks over
the whole of a data set and over its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import box_iou

from torchive.nn.average_precision import THRESHOLDS, Compared, average_precision
from torchive.ops.masks import mask_iou
from torchive.structures import Detections
from torchive.structures.landmarks import LandmarkSpace

#: Each part by its key in a target, and what its values 1, 2 and 3 are called in DeepFashion2.
PARTS: dict[str, tuple[str, str, str]] = {
    "scale": ("small", "moderate", "large"),
    "occlusion": ("slight", "medium", "heavy"),
    "zoom_in": ("none", "medium", "large"),
    "viewpoint": ("not worn", "frontal", "side or back"),
}
_LANDMARK_DETECTIONS, _DETECTIONS = 20, 100  # the best of an image that COCO looks at


def landmark_similarity(
    found: Tensor, truth: Tensor, area: Tensor, boxes: Tensor, sigmas: Tensor, *, visible_only: bool = False
) -> Tensor:
    """The object landmark similarity (D, L) in [0, 1].

    The mean, over an object's marked landmarks, of exp(-d^2 / (2 area (2 sigma)^2)), d being the distance. Where an
    object has none, d is how far a point lies outside the box of three times its sides, and the mean is over all.

    Args:
        found: (D, P, 2).
        truth: (L, P, 3), 0 where a landmark is not marked, 1 where it is hidden, 2 where it is visible.
        area: (L,) of the objects in pixels.
        boxes: (L, 4) of the objects.
        sigmas: (P,).
        visible_only: leave the hidden ones out.
    """
    kind = torch.float64
    found, truth, boxes, sigmas = (part.to(kind) for part in (found, truth, boxes, sigmas))
    marked = truth[..., 2] > (1 if visible_only else 0)  # (L, P)
    near = (found[:, None] - truth[None, ..., :2]).square().sum(-1)  # (D, L, P)
    side = boxes[:, 2:] - boxes[:, :2]
    low, high = (boxes[:, :2] - side)[:, None], (boxes[:, 2:] + side)[:, None]
    outside = ((low - found[:, None]).clamp(min=0) + (found[:, None] - high).clamp(min=0)).square().sum(-1)
    some = marked.any(1)
    square = torch.where(some[:, None], near, outside)
    spread = 2 * (2 * sigmas).square() * (area.to(kind)[:, None] + torch.finfo(kind).eps)
    weight = torch.where(some[:, None], marked, torch.ones_like(marked)).to(kind)
    return (torch.exp(-square / spread) * weight).sum(-1) / weight.sum(-1)


def landmark_precision(
    found: Sequence[Detections],
    targets: Sequence[dict[str, Tensor]],
    space: LandmarkSpace,
    *,
    visible_only: bool = False,
    part: tuple[str, int] | None = None,
) -> dict[str, float]:
    """``map``, ``map_50`` and ``map_75`` of landmarks, the mean over the classes that have objects; -1 without any.

    Detections are compared to objects of the class that they are found as, so that its own run of landmarks counts. An
    object without a marked landmark is ignored; what lies near it, by all P landmarks as in the release, is not false.

    Args:
        found: with ``keypoints`` (D, P, 2), of each image.
        targets: with ``boxes``, whose area measures the distances, ``labels``, ``keypoints`` (L, P, 3) and what
            ``part`` names.
        space: the classes' landmarks, with sigmas.
        visible_only: compare the visible landmarks only, not the hidden ones.
        part: a key of the targets and a value; objects that have another value are ignored.

    Raises:
        ValueError: no sigmas, as many predictions as targets are not there, or a detection without landmarks.
    """
    return _landmarks(found, targets, space, visible_only).precision(part)


def box_precision(
    found: Sequence[Detections],
    targets: Sequence[dict[str, Tensor]],
    *,
    masks: bool = False,
    part: tuple[str, int] | None = None,
) -> dict[str, float]:
    """``map``, ``map_50`` and ``map_75`` of boxes, or of masks, over all or a part of the objects."""
    return (_masks if masks else _boxes)(found, targets).precision(part)


def by_part(
    found: Sequence[Detections], targets: Sequence[dict[str, Tensor]], space: LandmarkSpace | None = None
) -> dict[str, float]:
    """Every figure over all objects and each part that the targets tell of: ``box/map``, ``box/map_50/scale/small``.

    Boxes; masks where all have them; with ``space`` landmarks, ``visible`` ones and all that are ``marked``. A part
    without objects has no figure.
    """
    tables = {"box": _boxes(found, targets)}
    if all(one.masks is not None for one in found) and all("masks" in target for target in targets):
        tables["mask"] = _masks(found, targets)
    if space is not None:
        tables["visible"] = _landmarks(found, targets, space, True)
        tables["marked"] = _landmarks(found, targets, space, False)
    chosen: list[tuple[str, tuple[str, int] | None]] = [("", None)]
    for key, names in PARTS.items():
        if all(key in target for target in targets):
            chosen += [(f"/{key}/{name}", (key, value)) for value, name in enumerate(names, 1)]
    result: dict[str, float] = {}
    for kind, table in tables.items():
        for suffix, part in chosen:
            values = table.precision(part)
            result |= {f"{kind}/{name}{suffix}": value for name, value in values.items() if value >= 0}
    return result


@dataclass(frozen=True)
class _Table:
    """Of each class that has objects, what its images compare, with the numbers that tell their objects' parts."""

    classes: dict[int, list[tuple[Compared, dict[str, Tensor]]]]
    most: int

    def precision(self, part: tuple[str, int] | None) -> dict[str, float]:
        """The three figures over all objects, or over those whose number ``part[0]`` is ``part[1]``."""
        every = []
        for rows in self.classes.values():
            images = [one for one, _ in rows]
            if part is not None:
                images = [replace(one, ignored=one.ignored | (known[part[0]] != part[1])) for one, known in rows]
            every.append(average_precision(images, max_detections=self.most))
        kept = [values for values in every if values[0] >= 0]
        mean = torch.stack(kept).mean(0) if kept else torch.full((len(THRESHOLDS),), -1.0)
        half, three_quarters = THRESHOLDS.index(0.5), THRESHOLDS.index(0.75)
        return {"map": float(mean.mean()), "map_50": float(mean[half]), "map_75": float(mean[three_quarters])}


Similar = Callable[[Detections, dict[str, Tensor], Tensor, Tensor], Tensor]
Counted = Callable[[dict[str, Tensor], Tensor], Tensor]


def _table(
    found: Sequence[Detections], targets: Sequence[dict[str, Tensor]], similar: Similar, counted: Counted, most: int
) -> _Table:
    """``similar`` gives the similarity (D, L) of rows of an image's detections and objects, ``counted`` (L,) bool."""
    if len(found) != len(targets):
        raise ValueError(f"expected detections of {len(targets)} images, got {len(found)}")
    labels = torch.cat([target["labels"] for target in targets]).unique().tolist() if targets else []
    classes: dict[int, list[tuple[Compared, dict[str, Tensor]]]] = {label: [] for label in labels}
    for one, target in zip(found, targets, strict=True):
        for label in torch.cat([one.labels, target["labels"]]).unique().tolist():
            if label not in classes:
                continue
            mine = torch.nonzero(one.labels == label)[:, 0]
            mine = mine[one.scores[mine].argsort(descending=True, stable=True)[:most]]
            own = torch.nonzero(target["labels"] == label)[:, 0]
            compared = Compared(similar(one, target, mine, own), one.scores[mine], ~counted(target, own))
            classes[label].append((compared, {key: target[key][own] for key in PARTS if key in target}))
    return _Table(classes, most)


def _landmarks(
    found: Sequence[Detections], targets: Sequence[dict[str, Tensor]], space: LandmarkSpace, visible_only: bool
) -> _Table:
    if not space.sigmas:
        raise ValueError("expected a LandmarkSpace with sigmas, got none")
    sigmas = torch.tensor(space.sigmas, dtype=torch.float64)

    def similar(one: Detections, target: dict[str, Tensor], mine: Tensor, own: Tensor) -> Tensor:
        if one.keypoints is None:
            raise ValueError("expected detections with keypoints, got None")
        box = target["boxes"][own].double()
        area = (box[:, 2:] - box[:, :2]).prod(1)
        points, truth = one.keypoints[mine], target["keypoints"][own]
        return landmark_similarity(points, truth, area, box, sigmas, visible_only=visible_only)

    def marked(target: dict[str, Tensor], own: Tensor) -> Tensor:
        return (target["keypoints"][own][..., 2] > (1 if visible_only else 0)).any(1)

    return _table(found, targets, similar, marked, _LANDMARK_DETECTIONS)


def _boxes(found: Sequence[Detections], targets: Sequence[dict[str, Tensor]]) -> _Table:
    def similar(one: Detections, target: dict[str, Tensor], mine: Tensor, own: Tensor) -> Tensor:
        return box_iou(one.boxes[mine].double(), target["boxes"][own].double())

    return _table(found, targets, similar, _every, _DETECTIONS)


def _masks(found: Sequence[Detections], targets: Sequence[dict[str, Tensor]]) -> _Table:
    def similar(one: Detections, target: dict[str, Tensor], mine: Tensor, own: Tensor) -> Tensor:
        if one.masks is None:
            raise ValueError("expected detections with masks, got None")
        return mask_iou(one.masks[mine], target["masks"][own]).double()

    return _table(found, targets, similar, _every, _DETECTIONS)


def _every(_target: dict[str, Tensor], own: Tensor) -> Tensor:
    return torch.ones_like(own, dtype=torch.bool)
