"""Centres of objects by template matching: normalised cross-correlation with boxes of directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_TOGETHER = 4  # templates that are matched at a time
_ROUNDS = 32  # of suppression in an exported file


@dataclass(frozen=True)
class Centres:
    """M candidates of one image, best score first; ``there`` (M,) says which are real."""

    points: Tensor  # (M, 2), x and y
    score: Tensor  # (M,)
    category: Tensor  # (M,), from 1
    depth: Tensor  # (M,), bin from 0
    there: Tensor  # (M,)


def direction_template(half: Tensor, reach: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Boxes of unit vectors that point to their middle: (P, 2, 2 reach_y + 1, 2 reach_x + 1), zero outside each box.

    Args:
        half: (P, 2), pixels of each box above and beside its middle.
        reach: the largest of them.
        dtype: of the vectors.
    """
    y, x = (torch.arange(-r, r + 1, device=half.device, dtype=dtype) for r in reach)
    grid = torch.stack([x.expand(len(y), len(x)), y[:, None].expand(len(y), len(x))])
    units = -grid / grid.norm(dim=0).clamp(min=1e-6)
    inside = (y.abs() <= half[:, 0, None])[:, :, None] & (x.abs() <= half[:, 1, None])[:, None]
    return units * inside[:, None]


def match_templates(
    directions: Tensor, categories: Tensor, depths: Tensor, half: Tensor, largest: tuple[int, ...]
) -> Tensor:
    """The score (H, W) in [-1, 1] of every pixel as a centre of its own category at its own depth; -1 elsewhere.

    Only the pixels of that category count; what lies outside the image counts neither as found nor as missing.

    Args:
        directions: (2, H, W), at most of length one.
        categories: (H, W), from 1; 0 is no object.
        depths: (H, W), bin from 0.
        half: (G, D, 2), pixels of the template of each category and depth above and beside its middle.
        largest: of these, above and beside; an exported file needs to know.
    """
    groups, bins = half.shape[:2]
    kind = torch.where(categories > 0, (categories - 1) * bins + depths, -1)  # which template a pixel is matched with
    box = half.flatten(0, 1)
    score = torch.full_like(directions[0], -1)
    if torch.compiler.is_compiling():
        for name in range(groups):
            part = torch.arange(name * bins, (name + 1) * bins, device=kind.device)
            score = _matched(score, directions * (categories == name + 1), kind, box, part, largest)
    else:
        # more than the image sees nothing else; few templates at a time, so that small ones have small transforms
        box = torch.minimum(box, box.new_tensor([max(side - 1, 1) for side in categories.shape]))
        for name in categories[categories > 0].unique().tolist():
            own = categories == name
            for part in kind[own].unique().split(_TOGETHER):
                score = _matched(score, directions * own, kind, box, part, tuple(box[part].amax(0).tolist()))
    energy, cells = _window_energy(directions, categories, box[kind.clamp(min=0)], groups)
    return torch.where(kind >= 0, (score / (energy * (cells - 1)).clamp(min=1e-6).sqrt()).clamp(-1, 1), -1)


def _matched(score: Tensor, members: Tensor, kind: Tensor, box: Tensor, part: Tensor, reach: tuple[int, ...]) -> Tensor:
    """``score`` (H, W) with ``sum_u d(p + u) . t(u)`` at the pixels whose template is one of ``part`` (P,).

    By Fourier transforms, whose cost depends on the largest template's ``reach`` alone; ``members`` (2, H, W) are the
    directions of the templates' own category.
    """
    height, width = kind.shape
    margin = 2 if torch.compiler.is_compiling() else 1  # templates may be larger than an exported file's image
    size = ((height + margin * reach[0] + 31) // 32 * 32, (width + margin * reach[1] + 31) // 32 * 32)
    fields = torch.fft.rfft2(members[None], s=size)
    kernels = torch.fft.rfft2(direction_template(box[part], reach, members.dtype), s=size)
    found = torch.fft.irfft2((fields * kernels.conj()).sum(1), s=size)  # (P, h, w)
    # a template's middle lies at ``reach``, its corner at zero, which the roll makes good
    found = found.roll((reach[0], reach[1]), (1, 2))[:, :height, :width]
    for name, value in zip(part, found, strict=True):
        score = torch.where(kind == name, value, score)
    return score


def find_centres(
    score: Tensor,
    categories: Tensor,
    depths: Tensor,
    half: Tensor,
    *,
    score_threshold: float,
    nms_radius: float,
    depth_gap: int,
    candidates: int,
) -> Centres:
    """Maxima of the score that do not lie in the box of a better one of their category and of similar depth.

    Args:
        score, categories, depths: (H, W), as of ``match_templates``.
        half: (G, D, 2), as there.
        score_threshold: what does not score more is no centre.
        nms_radius: half sides of the box that a centre keeps free, as a multiple of its template's.
        depth_gap: bins up to which two depths are similar.
        candidates: maxima that are looked at, the best ones.
    """
    width = score.shape[1]
    peak = (F.max_pool2d(score[None], 3, 1, 1)[0] == score) & (score > score_threshold)
    value, place = torch.where(peak, score, -1).flatten().topk(min(candidates, score.shape[0] * width))
    if not torch.compiler.is_compiling():
        value, place = value[value > score_threshold], place[value > score_threshold]
    points = points_at(place, width).to(score.dtype)
    category, depth = categories.flatten()[place].clamp(min=1), depths.flatten()[place]
    there = value > score_threshold
    free = nms_radius * half[category - 1, depth].flip(1).to(score.dtype)  # (M, 2), x and y
    gap = (points[:, None] - points[None]).abs()
    rivals = (gap <= free[:, None]).all(-1) & (category[:, None] == category) & there[:, None]  # row suppresses column
    rivals &= (depth[:, None] - depth).abs() <= depth_gap
    return Centres(points, value, category, depth, there & _greedy(rivals))


def points_at(place: Tensor, width: int) -> Tensor:
    """x and y (P, 2) of pixels by their index row by row; without a remainder, which an exported file cannot take."""
    row = torch.div(place, width, rounding_mode="floor")
    return torch.stack([place - row * width, row], 1)


def _greedy(rivals: Tensor) -> Tensor:
    """Mask (M,) of the rows, best first, that no kept row before them suppresses; ``rivals`` (M, M) says which would.

    Every round settles at least the next row of each chain, so it ends with what one row after the other would give.
    """
    rank = torch.arange(rivals.shape[0], device=rivals.device)
    before = (rivals & (rank[:, None] < rank)).to(torch.float32)
    keep = torch.ones_like(before[0]) if rivals.shape[0] else before.new_ones(0)
    for _ in range(_ROUNDS if torch.compiler.is_compiling() else rivals.shape[0]):
        new = (keep @ before == 0).to(keep.dtype)
        if not torch.compiler.is_compiling() and bool((new == keep).all()):
            break
        keep = new
    return keep > 0


def _window_energy(directions: Tensor, categories: Tensor, half: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Squared lengths of the own category's directions in each pixel's box, and its pixels inside the image."""
    height, width = categories.shape
    y = torch.arange(height, device=half.device)[:, None]
    x = torch.arange(width, device=half.device)
    top, left = (y - half[..., 0]).clamp(min=0), (x - half[..., 1]).clamp(min=0)
    below, right = (y + half[..., 0] + 1).clamp(max=height), (x + half[..., 1] + 1).clamp(max=width)
    corners = [row * (width + 1) + column for row in (below, top) for column in (right, left)]
    square = directions.double().square().sum(0)
    total = square.new_zeros(height, width)
    names = range(1, groups + 1) if torch.compiler.is_compiling() else categories.unique().tolist()
    for name in names:
        own = categories == name
        sums = F.pad((square * own).cumsum(0).cumsum(1), (1, 0, 1, 0)).flatten()
        a, b, c, d = (sums[corner] for corner in corners)
        total = torch.where(own, a - b - c + d, total)
    return total.to(directions.dtype), ((below - top) * (right - left)).to(directions.dtype)
