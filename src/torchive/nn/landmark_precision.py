"""How well landmarks are found: similarity of landmarks (OKS), and average precision of boxes, masks and landmarks over
the whole of a data set and over its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import box_iou

from torchive.nn.average_precision import THRESHOLDS, Compared, average_precision
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
    """``map``, ``map_50`` and ``map_75`` of landmarks, the mean over the classes that have objects.

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
    if not space.sigmas:
        raise ValueError("expected a LandmarkSpace with sigmas, got none")
    sigmas = torch.tensor(space.sigmas, dtype=torch.float64)

    def similarity(one: Detections, target: dict[str, Tensor], mine: Tensor, own: Tensor, label: int) -> Tensor:
        if one.keypoints is None:
            raise ValueError("expected detections with keypoints, got None")
        box = target["boxes"][own].double()
        area = (box[:, 2:] - box[:, :2]).prod(1)
        points, truth = one.keypoints[mine], target["keypoints"][own]
        return landmark_similarity(points, truth, area, box, sigmas, visible_only=visible_only)

    def marked(target: dict[str, Tensor], own: Tensor) -> Tensor:
        return (target["keypoints"][own][..., 2] > (1 if visible_only else 0)).any(1)

    return _summary(_classes(found, targets, similarity, marked, part), _LANDMARK_DETECTIONS)


def box_precision(
    found: Sequence[Detections],
    targets: Sequence[dict[str, Tensor]],
    *,
    masks: bool = False,
    part: tuple[str, int] | None = None,
) -> dict[str, float]:
    """``map``, ``map_50`` and ``map_75`` of boxes, or of masks, over all or a part of the objects."""

    def similarity(one: Detections, target: dict[str, Tensor], mine: Tensor, own: Tensor, label: int) -> Tensor:
        if not masks:
            return box_iou(one.boxes[mine].double(), target["boxes"][own].double())
        if one.masks is None:
            raise ValueError("expected detections with masks, got None")
        a, b = one.masks[mine].flatten(1).float(), target["masks"][own].flatten(1).float()
        both = a @ b.T
        return (both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)).double()

    def counted(target: dict[str, Tensor], own: Tensor) -> Tensor:
        return torch.ones_like(own, dtype=torch.bool)

    return _summary(_classes(found, targets, similarity, counted, part), _DETECTIONS)


def by_part(
    found: Sequence[Detections], targets: Sequence[dict[str, Tensor]], space: LandmarkSpace | None = None
) -> dict[str, float]:
    """Every figure over all objects and each part that the targets tell of: ``box/map``, ``box/map_50/scale/small``.

    Boxes; masks where all have them; with ``space`` landmarks, ``visible`` ones and all that are ``marked``. A part
    without objects has no figure.
    """
    figures: dict[str, Callable[..., dict[str, float]]] = {"box": partial(box_precision, found, targets)}
    if all(one.masks is not None for one in found) and all("masks" in target for target in targets):
        figures["mask"] = partial(box_precision, found, targets, masks=True)
    if space is not None:
        figures["visible"] = partial(landmark_precision, found, targets, space, visible_only=True)
        figures["marked"] = partial(landmark_precision, found, targets, space)
    chosen: list[tuple[str, tuple[str, int] | None]] = [("", None)]
    for key, names in PARTS.items():
        if all(key in target for target in targets):
            chosen += [(f"/{key}/{name}", (key, value)) for value, name in enumerate(names, 1)]
    result: dict[str, float] = {}
    for kind, figure in figures.items():
        for suffix, part in chosen:
            values = figure(part=part)
            result |= {f"{kind}/{name}{suffix}": value for name, value in values.items() if value >= 0}
    return result


def _classes(
    found: Sequence[Detections],
    targets: Sequence[dict[str, Tensor]],
    similarity: Callable[[Detections, dict[str, Tensor], Tensor, Tensor, int], Tensor],
    counted: Callable[[dict[str, Tensor], Tensor], Tensor],
    part: tuple[str, int] | None,
) -> Iterator[list[Compared]]:
    """Of each class, what its images compare."""
    if len(found) != len(targets):
        raise ValueError(f"expected detections of {len(targets)} images, got {len(found)}")
    labels = torch.cat([target["labels"] for target in targets]).unique().tolist() if targets else []
    for label in labels:
        images = []
        for one, target in zip(found, targets, strict=True):
            mine = torch.nonzero(one.labels == label)[:, 0]
            own = torch.nonzero(target["labels"] == label)[:, 0]
            if not len(mine) and not len(own):
                continue
            mine = mine[one.scores[mine].argsort(descending=True, stable=True)[:_DETECTIONS]]
            ignored = ~counted(target, own)
            if part is not None:
                ignored = ignored | (target[part[0]][own] != part[1])
            images.append(Compared(similarity(one, target, mine, own, label), one.scores[mine], ignored))
        yield images


def _summary(classes: Iterator[list[Compared]], most: int) -> dict[str, float]:
    every = [average_precision(images, max_detections=most) for images in classes]
    kept = [values for values in every if values[0] >= 0]
    if not kept:
        return {"map": -1.0, "map_50": -1.0, "map_75": -1.0}
    mean = torch.stack(kept).mean(0)
    return {
        "map": float(mean.mean()),
        "map_50": float(mean[THRESHOLDS.index(0.5)]),
        "map_75": float(mean[THRESHOLDS.index(0.75)]),
    }
