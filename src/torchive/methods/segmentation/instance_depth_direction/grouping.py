"""Pixels to centres, pieces to objects: votes, leftovers, and parts that belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchive.methods.segmentation.instance_depth_direction.templates import Centres, points_at
from torchive.ops.components import connected_components, neighbours

_BAND = 2**12  # pixels of objects that are looked at together
_SLACK = 1.5  # pixels by which a direction may miss a centre that is itself known to a pixel
_JUMPS = 10  # of pointers in an exported file: chains of a thousand parts


@dataclass(frozen=True)
class Fields:
    """What each pixel of an image says: ``directions`` (2, H, W); ``categories`` (H, W) from 1, 0 for no object;
    ``depths`` (H, W), bin from 0."""

    directions: Tensor
    categories: Tensor
    depths: Tensor


def vote(fields: Fields, centres: Centres, sides: Tensor, *, tolerance: float, reach: float, depth_gap: int) -> Tensor:
    """The candidate (H, W) that each pixel goes to, from 1; 0 for none.

    The nearest one of its category and of similar depth that lies in its direction and not too far.

    Args:
        fields: of the image.
        centres: M candidates.
        sides: (D,), side of an object in pixels at each depth.
        tolerance: degrees by which a direction may be wrong.
        reach: distance up to which a centre takes pixels, in sides of its objects.
        depth_gap: bins up to which two depths are similar.
    """
    height, width = fields.categories.shape
    ids = torch.zeros_like(fields.categories).flatten()
    place = torch.arange(height * width, device=ids.device)
    limit = reach * sides[centres.depth] + _SLACK
    if torch.compiler.is_compiling():
        every = torch.arange(centres.points.shape[0], device=ids.device)
        found = _nearest(fields, centres, limit, place, every, tolerance, depth_gap)
        return found.view(height, width)
    real = torch.nonzero(centres.there)[:, 0]
    middle = centres.points[real, 1]
    members = place[fields.categories.flatten() > 0]
    for rows in members.split(_BAND) if len(members) else ():  # a band of the image sees few centres
        top, below = int(rows[0]) // width, int(rows[-1]) // width
        near = real[(middle >= top - limit[real]) & (middle <= below + limit[real])]
        if len(near):
            ids[rows] = _nearest(fields, centres, limit, rows, near, tolerance, depth_gap)
    return ids.view(height, width)


def _nearest(
    fields: Fields, centres: Centres, limit: Tensor, rows: Tensor, some: Tensor, tolerance: float, depth_gap: int
) -> Tensor:
    """The nearest fitting candidate (P,), from 1, of pixels ``rows`` (P,) among the candidates ``some`` (m,)."""
    away = centres.points[some] - points_at(rows, fields.categories.shape[1])[:, None]  # (P, m, 2)
    unit = torch.nn.functional.normalize(fields.directions.flatten(1)[:, rows], dim=0).T[:, None]
    along = (away * unit).sum(-1)
    across = (away[..., 0] * unit[..., 1] - away[..., 1] * unit[..., 0]).abs()
    distance = away.norm(dim=-1)
    fits = (along >= -_SLACK) & (across <= math.tan(math.radians(tolerance)) * along.clamp(min=0) + _SLACK)
    fits &= centres.there[some] & (distance <= limit[some])
    fits &= fields.categories.flatten()[rows, None] == centres.category[some]
    fits &= (fields.depths.flatten()[rows, None] - centres.depth[some]).abs() <= depth_gap
    nearest, best = torch.where(fits, distance, torch.inf).min(1)
    return torch.where(nearest < torch.inf, some[best] + 1, 0)


def keep_largest_pieces(ids: Tensor, count: int) -> Tensor:
    """The map of ids (H, W) with the largest connected piece of each id, 1 to ``count``; 0 elsewhere."""
    pieces = connected_components(ids, diagonal=True).flatten()
    area = torch.zeros(pieces.shape[0] + 1, dtype=torch.int64, device=ids.device)
    area = area.scatter_add(0, pieces, torch.ones_like(pieces))[pieces]  # of each pixel's piece
    flat = ids.flatten()
    rank = torch.where(flat > 0, area * (pieces.shape[0] + 1) - pieces, 0)  # the larger, then the first
    best = torch.zeros(count + 1, dtype=torch.int64, device=ids.device).scatter_reduce(0, flat, rank, "amax")
    return torch.where(rank == best[flat], flat, 0).view_as(ids)


def join_leftovers(ids: Tensor, fields: Fields, depth: Tensor, *, depth_gap: int, leftover: int) -> Tensor:
    """Pixels without an object join a neighbour's of their category and of similar depth, ring by ring.

    Args:
        ids: (H, W), 0 for none; a lower id goes first.
        fields: of the image.
        depth: (M,), the bin of each object.
        depth_gap: bins up to which two depths are similar.
        leftover: pixels that an object may grow; what is farther is dropped.
    """
    bins = torch.cat([depth.new_zeros(1), depth])
    none = depth.shape[0] + 1
    flat, exported = ids.flatten(), torch.compiler.is_compiling()
    free = (flat == 0) & (fields.categories.flatten() > 0)
    rows = torch.arange(flat.shape[0], device=ids.device) if exported else torch.nonzero(free)[:, 0]
    beside, far = neighbours(fields.categories, diagonal=True)[:, rows], fields.depths.flatten()[rows]
    free = free[rows]
    for _ in range(leftover):
        other = flat[beside]  # (8, P)
        fits = (other > 0) & ((bins[other] - far).abs() <= depth_gap)
        best = torch.where(fits, other, none).amin(0)
        grows = free & (best < none)
        if not exported and not bool(grows.any()):
            break
        flat = flat.scatter(0, rows, torch.where(grows, best, flat[rows]))
        free = free & ~grows
    return flat.view_as(ids)


def fuse(ids: Tensor, fields: Fields, centres: Centres, *, bias: float, depth_gap: int) -> Tensor:
    """The map of ids (H, W) with parts that belong together under one id.

    The directions in a whole object cancel. Where their mean is longer than ``bias``, the object goes on there: it
    joins the neighbour of its category and of similar depth, within 45 degrees of that direction, with which it has
    most border.
    """
    count = centres.points.shape[0]
    if not count:
        return ids
    flat = ids.flatten()
    area = torch.zeros(count + 1, dtype=centres.points.dtype, device=ids.device)
    area = area.index_add(0, flat, torch.ones_like(flat, dtype=area.dtype))
    sums = area.new_zeros(2, count + 1).index_add(1, flat, fields.directions.flatten(1))
    mean = (sums / area.clamp(min=1))[:, 1:].T  # (M, 2)
    beside = neighbours(torch.zeros_like(ids), diagonal=True)
    own = flat
    if not torch.compiler.is_compiling():
        beside, own = beside[:, flat > 0], flat[flat > 0]
    other = flat[beside]  # (8, P)
    meets = (other != own) & (other > 0) & (own > 0)
    pair = torch.where(meets, own * (count + 1) + other, 0).flatten()
    pair = pair if torch.compiler.is_compiling() else pair[pair > 0]
    contact = area.new_zeros((count + 1) * (count + 1)).index_add(0, pair, torch.ones_like(pair, dtype=area.dtype))
    border = contact.view(count + 1, count + 1)[1:, 1:]
    away = centres.points - centres.points[:, None]  # (M, M, 2), from the row's centre to the column's
    ahead = (away * mean[:, None]).sum(-1) >= math.sqrt(0.5) * away.norm(dim=-1) * mean.norm(dim=1, keepdim=True)
    fits = (border > 0) & ahead & (centres.category[:, None] == centres.category)
    fits &= ((centres.depth[:, None] - centres.depth).abs() <= depth_gap) & (mean.norm(dim=1, keepdim=True) > bias)
    most, target = torch.where(fits, border, 0).max(1)
    joined = roots(torch.where(most > 0, target, torch.arange(count, device=ids.device)))
    return torch.cat([joined.new_zeros(1), joined + 1])[ids]


def roots(target: Tensor) -> Tensor:
    """The lowest row (M,) of the cycle that each row ends in when it follows ``target`` (M,) for ever."""
    lowest, jump = torch.minimum(target, torch.arange(target.shape[0], device=target.device)), target
    steps = _JUMPS if torch.compiler.is_compiling() else max(target.shape[0], 1).bit_length() + 1
    for _ in range(steps):
        lowest, jump = torch.minimum(lowest, lowest[jump]), jump[jump]
    return lowest[jump]
