"""All processes' embeddings on each process, with a gradient back to the one that made them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def processes() -> tuple[int, int]:
    """Rank and number of processes; (0, 1) where none were started together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """The rows (n_r, ..) of all processes in rank order, (sum n_r, ..), and where this process's rows start.

    The numbers of rows may differ. The gradient of a row is the sum of what all processes send to it.
    """
    rank, world = processes()
    if world == 1:
        return x, 0
    mine = torch.tensor([len(x)], device=x.device)
    counted = [torch.zeros_like(mine) for _ in range(world)]
    dist.all_gather(counted, mine)
    sizes = [int(count) for count in counted]
    return _Gather.apply(x, sizes, rank), sum(sizes[:rank])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], rank: int) -> Tensor:
        ctx.start, ctx.length = sum(sizes[:rank]), sizes[rank]
        longest = max(sizes)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.length], None, None
