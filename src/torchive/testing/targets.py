"""Seeded truths by kind: classes, masks, boxes, values; and the empty ones that a loss must survive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

KINDS = ("classes", "masks", "boxes", "values", "none")


def draw_targets(spec: dict[str, Any], shape: Any, g: torch.Generator, *, batch: int = 0) -> Any:
    """Truths for an input of ``shape`` (for boxes: the list of image shapes), as ``spec`` on the card says.

    Raises:
        ValueError: an unknown ``kind``.
    """
    kind = spec.get("kind")
    if kind == "none":
        return None
    if kind == "classes":
        sizes = (batch, *spec.get("shape", [batch])[1:])
        count = int(torch.tensor(sizes).prod())
        order = torch.randperm(count, generator=g)
        return (torch.arange(count) % spec["num_classes"])[order].view(sizes)
    if kind == "masks":
        rest = tuple(shape[2:])  # the sizes follow the prediction or the image
        return torch.randint(0, spec["num_classes"], (batch, *rest), generator=g)
    if kind == "values":
        return torch.randn((batch, *spec.get("shape", shape)[1:]), generator=g)
    if kind == "boxes":
        return [_objects(spec, one, g, spec.get("per_image", 2)) for one in shape]
    raise ValueError(f"target kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _objects(spec: dict[str, Any], shape: Sequence[int], g: torch.Generator, count: int) -> dict[str, Tensor]:
    height, width = shape[-2:]
    extent = torch.tensor([width, height])
    size = 0.05 * 18 ** torch.rand(count, 1, generator=g)  # from a twentieth to nine tenths of the image
    side = size * (0.9 + 0.2 * torch.rand(count, 2, generator=g)) * extent
    corner = torch.rand(count, 2, generator=g) * (extent - side)
    boxes = torch.cat([corner, corner + side], 1)
    labels = torch.randint(1, spec["num_classes"] + 1, (count,), generator=g)
    target = {"boxes": boxes, "labels": labels}
    if spec.get("masks", False):
        y, x = torch.arange(height).view(1, -1, 1) + 0.5, torch.arange(width).view(1, 1, -1) + 0.5
        x1, y1, x2, y2 = (b.view(-1, 1, 1) for b in boxes.unbind(1))
        target["masks"] = ((x > x1) & (x < x2) & (y > y1) & (y < y2)).to(torch.uint8)
    if "landmarks" in spec:
        target["keypoints"] = _landmarks(spec["landmarks"], boxes, labels, g)
    if spec.get("pairs", False):  # an item is a user's or a shop's, of one of two pairs
        target |= {key: torch.randint(0, 2, (count,), generator=g) for key in ("pair_id", "style", "source")}
    return target


def _landmarks(counts: Sequence[int], boxes: Tensor, labels: Tensor, g: torch.Generator) -> Tensor:
    """Points (L, P, 3) inside their boxes, hidden or visible, zeros outside the run of their own class."""
    owner = torch.repeat_interleave(torch.arange(1, len(counts) + 1), torch.tensor(counts))
    place = (
        boxes[:, None, :2] + torch.rand(len(boxes), len(owner), 2, generator=g) * (boxes[:, 2:] - boxes[:, :2])[:, None]
    )
    marked = torch.randint(1, 3, (len(boxes), len(owner), 1), generator=g)
    return torch.cat([place, marked], 2) * (labels[:, None] == owner)[..., None]


def empty_targets(spec: dict[str, Any], target: Any, shapes: Any) -> Iterator[tuple[str, Any]]:
    """Truths with little or nothing in them, each with a name: what a data set holds sooner or later."""
    kind = spec.get("kind")
    if kind == "classes":
        yield "all samples of one class", torch.zeros_like(target)
        if target.numel() <= spec["num_classes"] or spec.get("open", False):
            yield "all samples of different classes", torch.arange(target.numel()).view_as(target)
    elif kind == "masks":
        yield "one class everywhere", torch.zeros_like(target)
        one = torch.zeros_like(target)
        one.view(len(one), -1)[:, 0] = min(1, spec["num_classes"] - 1)
        yield "one pixel of a class", one
        if "ignore_index" in spec:
            yield "every pixel ignored", torch.full_like(target, spec["ignore_index"])
    elif kind == "boxes":
        nothing = [_objects(spec, shape, torch.Generator().manual_seed(0), 0) for shape in shapes]
        yield "no object in the first image", [nothing[0], *target[1:]]
        yield "no object at all", nothing
    elif kind == "values":
        yield "all zero", torch.zeros_like(target)
