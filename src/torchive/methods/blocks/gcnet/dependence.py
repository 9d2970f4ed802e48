"""How much a non-local block's answer depends on the query: mean distances between the queries' maps and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cosine_distance(vectors: Tensor) -> Tensor:
    """Mean of (1 - cos(v_i, v_j)) / 2 over all ordered pairs, i = j included: (N, Q, D) to (N,).

    The mean of all pairs' cosines is the squared length of the mean direction, so no pair is formed.
    """
    directions = nn.functional.normalize(vectors, dim=-1)
    return (1 - directions.mean(-2).square().sum(-1)) / 2


def js_distance(maps: Tensor, *, chunk: int = 64) -> Tensor:
    """Mean Jensen-Shannon divergence, in nats, over all ordered pairs, i = j included: (N, Q, L) to (N,).

    Args:
        maps: distributions over L positions, non-negative, each row's sum is one.
        chunk: queries compared with all others at a time; memory is N * chunk * Q * L.

    Raises:
        ValueError: a negative entry.
    """
    if (maps < 0).any():
        raise ValueError(f"maps must be distributions, got a smallest entry of {maps.min().item():.3g}; expected >= 0")
    own = torch.special.entr(maps).sum(-1)  # (N, Q)
    total = maps.new_zeros(len(maps))
    for part in maps.split(chunk, dim=1):
        middle = (part.unsqueeze(2) + maps.unsqueeze(1)) / 2  # (N, chunk, Q, L)
        total = total + torch.special.entr(middle).sum((1, 2, 3))
    return total / maps.shape[1] ** 2 - own.mean(1)


@torch.no_grad()
def query_dependence(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The paper's measurement on any block with ``attention(x)`` of shape (N, Q, L): (N,) distances, near 0 if all
    queries agree.

    Returns:
        "input": cosine distance of the features at the positions; "output": of what the block adds to them;
        "attention": of the maps; "attention_js": their Jensen-Shannon divergence, absent where a map is no
        distribution.

    Raises:
        ValueError: the block gives one map for all queries.
    """
    maps = block.attention(x)  # type: ignore[operator]
    first = x.movedim(getattr(block, "channel_dim", 1), -1).flatten(1, -2)  # (N, Q, C)
    if maps.ndim != 3 or maps.shape[1] != first.shape[1]:
        raise ValueError(f"expected maps (N, {first.shape[1]}, L), got one map for all queries: {tuple(maps.shape)}")
    added = (block(x) - x).movedim(getattr(block, "channel_dim", 1), -1).flatten(1, -2)
    found = {"input": cosine_distance(first), "attention": cosine_distance(maps), "output": cosine_distance(added)}
    if (maps >= 0).all() and torch.allclose(maps.sum(-1), maps.new_ones(()), atol=1e-4):
        found["attention_js"] = js_distance(maps)
    return found
