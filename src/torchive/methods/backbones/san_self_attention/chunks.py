"""Computing in chunks: nothing inside is kept for the gradient, and one batch norm serves all chunks together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def light(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """The function's result; for the gradient it is computed anew, so nothing inside is kept."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def moments_of(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Count, mean and summed squared distance from it of each channel of what the function gives."""

    def found(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = function(*tensors)
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        count = x.new_tensor(x.numel() / x.shape[1])
        return count, mean, variance * count

    return found


def joint_norm(norm: nn.BatchNorm2d, found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scale and shift (1, C, 1, 1) of a batch norm over all chunks; its running statistics are moved on."""
    counts, means, squares = (torch.stack(parts) for parts in zip(*found, strict=True))
    count, share = counts.sum(), (counts / counts.sum())[:, None]
    mean = (means * share).sum(0)
    variance = (squares.sum(0) + (counts[:, None] * (means - mean).square()).sum(0)) / count
    if norm.track_running_stats:
        with torch.no_grad():
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            rate = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean.to(norm.running_mean), rate)  # type: ignore[union-attr]
            unbiased = variance * (count / (count - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var), rate)  # type: ignore[union-attr]
    scale = (variance + norm.eps).rsqrt() * norm.weight
    return scale.view(1, -1, 1, 1), (norm.bias - mean * scale).view(1, -1, 1, 1)
