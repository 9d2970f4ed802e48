"""Where guided anchors stand and what shapes they have: squares, predicted sides and angles, and sampled shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torchive.ops.anchors import grid_anchors
from torchive.ops.boxes import LOG_CLAMP

Centre = Literal["middle", "corner"]


def base_squares(
    grids: Sequence[Sequence[int]],
    strides: Sequence[int],
    like: Tensor,
    *,
    scale: float = 8.0,
    centre: Centre = "middle",
) -> Tensor:
    """Squares (A, 4) of side ``scale`` strides at each position, map by map, row by row, cell by cell.

    ``centre`` is where in its cell a square stands: in the "middle", ((i + 1/2) s, (j + 1/2) s), or at the "corner",
    (i s, j s), as in the release. ``like`` gives the device and the kind of numbers.
    """
    kind = torch.promote_types(like.dtype, torch.float32)
    parts = []
    for grid, stride in zip(grids, strides, strict=True):
        half, shift = scale * stride / 2, stride / 2 if centre == "middle" else 0.0
        cell = torch.tensor([[-half, -half, half, half]], device=like.device, dtype=kind) + shift
        parts.append(grid_anchors(grid, stride, cell))
    return torch.cat(parts)


def guided_sides(squares: Tensor, shapes: Tensor, std: float = 1.0) -> Tensor:
    """w = scale s exp(std dw), h = scale s exp(std dh): squares (A, 4) and shapes (N, A, 2) to (N, A, 2)."""
    side = squares[:, 2:] - squares[:, :2]
    return side * (shapes.to(side.dtype) * std).clamp(-LOG_CLAMP, LOG_CLAMP).exp()


def anchors_at(squares: Tensor, sides: Tensor, turns: Tensor | None = None) -> Tensor:
    """Boxes (N, A, 4) of ``sides`` (N, A, 2) in the middle of the squares (A, 4).

    With ``turns`` (N, A, 2), cosine and sine of an angle, they are the boxes around the turned anchors.
    """
    if turns is not None:
        c, s = turns.abs().to(sides.dtype).unbind(-1)
        w, h = sides.unbind(-1)
        sides = torch.stack([w * c + h * s, w * s + h * c], -1)
    middle = (squares[:, :2] + squares[:, 2:]) / 2
    return torch.cat([middle - sides / 2, middle + sides / 2], -1)


def turns_of(doubled: Tensor) -> Tensor:
    """(cos 2a, sin 2a) of any length (..., 2) to (cos a, sin a), a from -90 to 90 degrees; gradients do not pass."""
    angle = torch.atan2(doubled[..., 1], doubled[..., 0]).detach() / 2
    return torch.stack([angle.cos(), angle.sin()], -1)


def sampled_shapes(
    scale: float = 8.0, ratios: Sequence[float] = (0.5, 1.0, 2.0), octaves: int = 3
) -> list[list[float]]:
    """Width and height, in strides, of the sampled anchors: three sizes of an octave times three ratios."""
    sizes = [scale * 2 ** (k / octaves) for k in range(octaves)]
    return [[size / ratio**0.5, size * ratio**0.5] for ratio in ratios for size in sizes]
