"""The bottom-up map, and the pooling layer that it weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchive.nn.global_pool import flattens

Attention = Literal["linear", "relu", "softmax"]
ATTENTIONS = ("linear", "relu", "softmax")


def saliency(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h = X b + c: (N, C, L) features, (M, C) and (M,) to (N, M, L) maps; any strides, nothing is copied."""
    maps = torch.bmm(weight.to(x.dtype).expand(x.shape[0], -1, -1), x)
    return maps + bias.to(x.dtype)[:, None]


def attend(maps: Tensor, attention: Attention) -> Tensor:
    """The maps (N, M, L) as they are, cut at zero, or with a soft-max over positions, in float32 or better."""
    if attention == "relu":
        return maps.relu()
    if attention == "softmax":
        return maps.softmax(-1, dtype=torch.promote_types(maps.dtype, torch.float32)).to(maps.dtype)
    return maps


def weighted_means(maps: Tensor, x: Tensor) -> Tensor:
    """mean_l h_ml x_l: (N, M, L) and (N, C, L) to (N, M, C)."""
    return torch.bmm(maps, x.transpose(1, 2)) / x.shape[2]


def attended_means(x: Tensor, weight: Tensor, bias: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
    """The weighted means (N, M, C) and the maps' own means (N, M), of (N, C, L) features and M maps of them."""
    if torch.is_grad_enabled() and not torch.compiler.is_exporting():
        return _AttendedMeans.apply(x, weight, bias, attention)
    maps = attend(saliency(x, weight, bias), attention)
    return weighted_means(maps, x), maps.mean(2)


class _AttendedMeans(torch.autograd.Function):
    """Autograd alone would write the gradient of x three times; here it is one product of 2 M vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, attention: Attention) -> tuple[Tensor, Tensor]:
        maps = attend(saliency(x, weight, bias), attention)
        ctx.save_for_backward(x, weight, maps)
        ctx.attention, ctx.kind = attention, bias.dtype
        return weighted_means(maps, x), maps.mean(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmeans: Tensor, dmaps_mean: Tensor) -> Any:
        x, weight, maps = ctx.saved_tensors
        dmeans = dmeans.to(x.dtype) / x.shape[2]  # (N, M, C)
        slope = torch.bmm(dmeans, x) + dmaps_mean.to(x.dtype)[..., None] / x.shape[2]  # (N, M, L)
        if ctx.attention == "relu":
            slope = slope * (maps > 0)
        elif ctx.attention == "softmax":
            slope = maps * (slope - (maps * slope).sum(-1, keepdim=True))
        dweight = torch.bmm(slope, x.transpose(1, 2)).sum(0).to(weight.dtype)
        left = torch.cat([dmeans, weight.to(x.dtype).expand_as(dmeans)], 1)  # (N, 2M, C)
        right = torch.cat([maps, slope], 1)  # (N, 2M, L)
        if x.stride(1) == 1:  # channels-last
            dx = torch.bmm(right.transpose(1, 2), left).transpose(1, 2)
        else:
            dx = torch.bmm(left.transpose(1, 2), right)
        return dx, dweight, slope.sum((0, 2)).to(ctx.kind), None


class BottomUpPool(nn.Module):
    """Global pooling (N, C, *S) to (N, C, 1..) that weights each position by a learnt map: mean_l (b . x_l + c) x_l.

    A linear layer behind it gives rank-1 attentional pooling. A new layer is exactly the mean over positions.

    Args:
        channels: C.
        attention: what the map goes through: "linear" (nothing), "relu" or "softmax", which has no new layer equal to
            the mean but for the factor 1 / L and is therefore not divided by L here.
        flatten: whether the result is (N, C).

    Raises:
        ValueError: ``channels`` below one, an unknown ``attention``; in ``forward``, another number of channels.
    """

    def __init__(self, channels: int, *, attention: Attention = "linear", flatten: bool = False) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be >= 1, got {channels}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self.channels, self.attention, self.flatten = channels, attention, flatten
        self.weight = nn.Parameter(torch.zeros(channels))  # b
        self.bias = nn.Parameter(torch.ones(1))

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int, **options: Any) -> BottomUpPool:
        """The layer that takes a global mean's place.

        Raises:
            ValueError: ``old`` does not pool to one position, or has its channels last.
        """
        return cls(channels, **{"flatten": flattens(old), **options})

    def maps(self, x: Tensor) -> Tensor:
        """The weights of the positions: (N, C, *S) to (N, 1, *S)."""
        flat = self._flat(x)
        maps = attend(saliency(flat, self.weight[None], self.bias), self.attention)
        return (maps * flat.shape[2] if self.attention == "softmax" else maps).unflatten(2, x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        flat = self._flat(x)  # (N, C, L)
        y = attended_means(flat, self.weight[None], self.bias, self.attention)[0].squeeze(1)  # (N, C)
        if self.attention == "softmax":
            y = y * flat.shape[2]
        return y if self.flatten else y.view(*y.shape, *[1] * (x.ndim - 2))

    def _flat(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] != self.channels:
            raise ValueError(f"expected (N, {self.channels}, *S), got shape {tuple(x.shape)}")
        return x.flatten(2)

    def extra_repr(self) -> str:
        return f"{self.channels}, attention={self.attention}, flatten={self.flatten}"
