"""Connected pieces of a map."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 16  # of hooking in an exported file, each with two jumps
_STEPS = ((0, -1), (-1, 0), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))


def neighbours(segments: Tensor, *, diagonal: bool = False) -> Tensor:
    """The pixels beside each pixel, (4, H * W) or (8, H * W), as indices row by row.

    A neighbour beyond the border or of another segment is replaced by the pixel itself.

    Args:
        segments: (H, W), whole numbers.
        diagonal: whether pixels that share a corner alone are neighbours, too: eight instead of four.
    """
    height, width = segments.shape
    y = torch.arange(height, device=segments.device)[:, None]
    x = torch.arange(width, device=segments.device)
    flat, own = segments.flatten(), (y * width + x).flatten()
    found = []
    for down, right in _STEPS[: 8 if diagonal else 4]:
        row, column = (y + down).clamp(0, height - 1), (x + right).clamp(0, width - 1)
        other = (row * width + column).flatten()
        step = width * down + right
        found.append(torch.where((flat[other] == flat) & (other - own == step), other, own))
    return torch.stack(found)


def connected_components(segments: Tensor, *, diagonal: bool = False) -> Tensor:
    """The piece of each pixel: neighbours of one segment are one piece, (H, W) int64.

    A piece is named by one more than the index of its first pixel, row by row; where ``segments`` (H, W) is zero, so is
    the result. Every round hooks each piece on the lowest one beside it and shortens the chains that arise, so that
    their number falls with the logarithm of the number of pixels, not with the length of a winding piece. An exported
    file has sixteen rounds.

    Args:
        segments: (H, W), whole numbers.
        diagonal: whether pixels that share a corner alone are neighbours, too.
    """
    beside = neighbours(segments, diagonal=diagonal)
    kept = (segments != 0).flatten()
    exported = torch.compiler.is_compiling()
    place = torch.arange(beside.shape[1], device=segments.device)
    if not exported:  # what is not in a segment costs nothing
        place = place[kept]
        beside = (kept.cumsum(0) - 1)[beside[:, place]]
    name = torch.arange(beside.shape[1], device=segments.device)
    for _ in range(_ROUNDS if exported else beside.shape[1] + 1):
        lowest = torch.minimum(name, name[beside].amin(0))
        hooked = torch.minimum(lowest, name.scatter_reduce(0, name, lowest, "amin"))
        hooked = hooked[hooked]
        hooked = hooked[hooked]
        if not exported and bool((hooked == name).all()):
            break
        name = hooked
    found = torch.zeros(segments.numel(), dtype=torch.int64, device=segments.device).scatter(0, place, place[name] + 1)
    return torch.where(kept, found, 0).view(segments.shape)
