"""Objects to maps of classes: directions, depths, and the sizes that go with depths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from torchive.ops.masks import IGNORED

_CENTRE = 1e-6  # pixels from a centre, where rounding alone would give a direction


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How directions and depths become classes.

    Args:
        directions: number of direction classes; 0 keeps the direction as two numbers.
        depths: D; 0 leaves the depth out.
        depth_range: first and last border between the bins of depth; those between grow by one factor.
        object_size: side in pixels of an object at depth 1, so that one at depth z has ``object_size / z``.
    """

    directions: int = 8
    depths: int = 19
    depth_range: tuple[float, float] = (1.0, 32.0)
    object_size: float = 256.0

    def __post_init__(self) -> None:
        near, far = self.depth_range
        if self.directions < 0 or self.directions in (1, 2) or self.depths < 0 or self.depths == 1:
            raise ValueError(
                f"directions must be 0 or >= 3 and depths 0 or >= 2, got {self.directions} and {self.depths}"
            )
        if not near > 0 or not (near < far if self.depths else near <= far) or not self.object_size > 0:
            raise ValueError(
                f"expected 0 < near < far and object_size > 0, got {tuple(self.depth_range)} and {self.object_size}"
            )

    @property
    def edges(self) -> list[float]:
        """The D - 1 borders between bins, growing geometrically: near bins are the narrow ones."""
        if self.depths < 2:
            return []
        near, far = self.depth_range
        steps = max(self.depths - 2, 1)
        return [near * (far / near) ** (k / steps) for k in range(self.depths - 1)]

    @property
    def middles(self) -> list[float]:
        """A depth for each bin, the geometric middle; the first and last reach as far as their neighbours."""
        if self.depths < 2:
            return [math.sqrt(self.depth_range[0] * self.depth_range[1])]
        edges = self.edges
        half = math.sqrt(edges[1] / edges[0]) if len(edges) > 1 else 2.0
        return [edges[0] / half, *(math.sqrt(a * b) for a, b in pairwise(edges)), edges[-1] * half]

    @property
    def sides(self) -> list[float]:
        """The side of an object in pixels for each bin of depth, the nearest first."""
        return [self.object_size / depth for depth in self.middles]


def direction_classes(offsets: Tensor, directions: int = 8) -> Tensor:
    """The class (...), 0 to ``directions`` - 1, of offsets (..., 2), x and y; class 0 is right, 2 of 8 is down."""
    step = 2 * math.pi / directions
    angle = torch.atan2(offsets[..., 1], offsets[..., 0])
    return torch.floor(torch.remainder(angle + step / 2, 2 * math.pi) / step).long().clamp(max=directions - 1)


def direction_vectors(directions: int, like: Tensor) -> Tensor:
    """The middle (directions, 2) of each class, x and y of length one."""
    angle = torch.arange(directions, device=like.device, dtype=like.dtype) * (2 * math.pi / directions)
    return torch.stack([angle.cos(), angle.sin()], 1)


def depth_classes(depth: Tensor, edges: Sequence[float]) -> Tensor:
    """The bin (...), 0 to D - 1, of depths (...)."""
    return torch.bucketize(depth, torch.tensor(edges, device=depth.device, dtype=depth.dtype), right=True)


def visible_ids(masks: Tensor) -> Tensor:
    """The row from 1 (H, W) of the last of the masks (L, H, W) at each pixel, 0 where there is none."""
    row, y, x = torch.nonzero(masks, as_tuple=True)
    ids = torch.zeros(masks.shape[1] * masks.shape[2], dtype=torch.int64, device=masks.device)
    return ids.scatter_reduce(0, y * masks.shape[2] + x, row + 1, "amax").view(masks.shape[1:])


def areas_and_centroids(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pixels (count,) and mean pixel (count, 2), x and y, of the objects 1 to ``count`` of a map of ids (H, W).

    In float64: float32 would lose whole pixels over an object of a million.
    """
    flat = ids.flatten()
    y, x = (torch.arange(side, device=ids.device, dtype=torch.float64) for side in ids.shape)
    places = torch.stack([torch.ones_like(ids, dtype=x.dtype), x.expand(ids.shape), y[:, None].expand(ids.shape)])
    sums = places.new_zeros(3, count + 1).index_add(1, flat, places.flatten(1))[:, 1:]
    return sums[0], (sums[1:] / sums[0].clamp(min=1)).T


def median_depths(depth: Tensor, ids: Tensor, count: int) -> Tensor:
    """The median of a depth map (H, W) over each of the objects 1 to ``count`` of a map of ids: (count,), 0 for none.

    Of an even number of pixels the lower one of the middle two, as ``torch.median``; pixels that are zero, below or not
    finite were not measured and do not count.
    """
    known = (ids > 0) & (depth > 0) & depth.isfinite()
    owner, value = ids[known] - 1, depth[known]
    order = value.argsort()
    order = order[owner[order].argsort(stable=True)]  # object by object, the nearest first
    pixels = owner.bincount(minlength=count)
    middle = pixels.cumsum(0) - pixels + (pixels - 1).clamp(min=0) // 2
    found = torch.cat([value[order], value.new_zeros(1)])[middle]
    return torch.where(pixels > 0, found, 0)


def encode(target: dict[str, Tensor], size: tuple[int, int], encoding: Encoding) -> dict[str, Tensor]:
    """What the network is to say of one image.

    ``semantic`` (H, W): the class, 0 background, read from ``target["semantic"]`` where there is one; ``depth`` and
    ``direction`` (H, W): the class from 1, 0 where there is no object; ``vectors`` (2, H, W): x and y of the direction
    itself, zero at the centre. Where masks overlap the later lies on top; pixels of crowds are 255 in all three.

    Args:
        target: ``masks`` (L, H, W), ``labels`` (L,); ``depth``, in the unit of the encoding's range, (L,) the distance
            of each object or (H, W) of each pixel, whose ``median_depths`` are taken; where there is none, an object's
            size stands in: the depth at which it has the root of its visible area as its side; ``iscrowd`` (L,).
        size: H and W.
        encoding: directions and depths.
    """
    masks, labels = target["masks"], target["labels"]
    crowd = target.get("iscrowd", torch.zeros_like(labels)).bool()
    ignored = torch.zeros(size, dtype=torch.bool, device=masks.device)
    if bool(crowd.any()):
        ignored = (masks[crowd] != 0).any(0)
        masks, labels = masks[~crowd], labels[~crowd]
    ids, count = visible_ids(masks), len(masks)
    ignored &= ids == 0
    area, centre = areas_and_centroids(ids, count)
    there = ids > 0
    row = (ids - 1).clamp(min=0)
    classes = torch.where(there, labels[row], 0) if count else ids
    semantic = target.get("semantic", classes)
    vectors = centre.new_zeros(2, *size)
    if count:
        y, x = (torch.arange(side, device=ids.device, dtype=centre.dtype) for side in size)
        grid = torch.stack([x.expand(size), y[:, None].expand(size)])
        offsets = torch.where(there, centre.T[:, row] - grid, 0)
        length = offsets.norm(dim=0)
        vectors = torch.where(length > _CENTRE, offsets / length.clamp(min=_CENTRE), 0)
    numbers = vectors.to(torch.get_default_dtype())
    truth = {"semantic": torch.where(ignored, IGNORED, semantic), "vectors": numbers, "ignored": ignored}
    if encoding.directions:
        ways = direction_classes(vectors.movedim(0, -1), encoding.directions) + 1
        truth["direction"] = torch.where(ignored, IGNORED, torch.where(there, ways, 0))
    if encoding.depths:
        depth = encoding.object_size / area.clamp(min=1).sqrt()
        if "depth" in target and target["depth"].ndim == 2:
            median = median_depths(target["depth"], ids, count).to(depth)
            depth = torch.where(median > 0, median, depth)
        elif "depth" in target:
            depth = target["depth"][~crowd]
        bins = depth_classes(depth.to(area), encoding.edges) + 1
        depths = bins[row] if count else torch.zeros_like(ids)
        truth["depth"] = torch.where(ignored, IGNORED, torch.where(there, depths, 0))
    return truth


def mean_aspects(targets: Sequence[dict[str, Tensor]], num_classes: int) -> list[float]:
    """Height over width of each class's boxes, the geometric mean; 1 where a class has none. For ``template_aspects``.

    Args:
        targets: with ``boxes`` (L, 4) and ``labels`` (L,) from 1.
        num_classes: K.
    """
    sums, counts = torch.zeros(num_classes), torch.zeros(num_classes)
    for target in targets:
        side = (target["boxes"][:, 2:] - target["boxes"][:, :2]).float().clamp(min=1e-6)
        sums.index_add_(0, target["labels"] - 1, (side[:, 1] / side[:, 0]).log())
        counts.index_add_(0, target["labels"] - 1, torch.ones(len(side)))
    return list((sums / counts.clamp(min=1)).exp().tolist())
