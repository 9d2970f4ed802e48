r"""Dynamic ReLU: a piecewise-linear activation whose slopes and offsets are computed from its input.

Paper    Chen et al., "Dynamic ReLU", ECCV 2020, arXiv:2003.10027.
Formula  y_c = max_k ( a_k_c(x) x_c + b_k_c(x) ),  k = 1..K                                          (eq. 1)
         a_k = alpha_k + lambda_a Da_k(x),  b_k = beta_k + lambda_b Db_k(x)                          (eq. 5)
         [Da, Db] = 2 sigmoid(W2 relu(W1 mean_hw(x))) - 1, each in (-1, 1)
         C only: pi_hw = min( gamma softmax_hw(z / tau), 1 ), gamma = H W / 3                        (eq. 7)
Symbols  N batch, C channels, K pieces, L positions; alpha = (1, 0, ..), beta = 0, lambda_a = 1, lambda_b = 0.5,
         tau = 10.
Differs  pi multiplies the residuals, not the whole coefficients, so that closed attention leaves plain ReLU; the
         paper's text allows either reading. The last linear layer starts at zero bias and small weights, so a new
         layer is near ReLU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def spatial_attention(logits: Tensor, temperature: float = 10.0) -> Tensor:
    """pi of eq. 7: (N, 1, *S) logits to weights min(L/3 softmax(logits / tau), 1) of the same shape, L = positions."""
    flat = logits.flatten(2)  # (N, 1, L)
    pi = (flat / temperature).softmax(-1) * (flat.shape[-1] / 3)
    return pi.clamp(max=1.0).view_as(logits)


class _TwoPieces(torch.autograd.Function):
    """max of two lines; keeps the input and one bit for each number, where autograd alone keeps both lines."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slopes: Tensor, offsets: Tensor) -> Tensor:
        """(N, C, *S), (2, N, C or 1, 1..) and the same to (N, C, *S)."""
        first = torch.addcmul(offsets[0], slopes[0], x)
        second = torch.addcmul(offsets[1], slopes[1], x)
        ctx.save_for_backward(x, slopes, first > second)  # at a tie the second counts, as zero does in ReLU
        return torch.maximum(first, second, out=first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, slopes, wins = ctx.saved_tensors
        own = grad * wins
        other = grad - own
        dx = (own * slopes[0]).addcmul_(other, slopes[1])
        shape = slopes.shape[1:]
        doffsets = torch.stack([own.sum_to_size(shape), other.sum_to_size(shape)])
        dslopes = torch.stack([own.mul_(x).sum_to_size(shape), other.mul_(x).sum_to_size(shape)])
        return dx, dslopes, doffsets


class DynamicReLU(nn.Module):
    """Map (N, C, *S) to the same shape, S any number of position axes; with a zeroed hyper function it is ReLU.

    Args:
        channels: C.
        variant: "A" shares the pieces over channels, "B" has pieces for each channel, "C" is B with spatial attention.
        pieces: K; the first starts as identity, the others as zero.
        reduction: R, the squeeze of the hyper function.
        slope_range, offset_range: lambda_a and lambda_b.
        temperature: tau of variant C.
        channel_dim: 1, or -1 for tokens (N, L, C).

    Raises:
        ValueError: ``channels``, ``pieces`` or ``reduction`` below one, or an unknown ``variant`` or ``channel_dim``;
            in ``forward``, an input whose channel axis is not C.
    """

    def __init__(
        self,
        channels: int,
        *,
        variant: Literal["A", "B", "C"] = "B",
        pieces: int = 2,
        reduction: int = 8,
        slope_range: float = 1.0,
        offset_range: float = 0.5,
        temperature: float = 10.0,
        channel_dim: Literal[1, -1] = 1,
    ) -> None:
        super().__init__()
        if min(channels, pieces, reduction) < 1:
            raise ValueError(f"channels, pieces and reduction must be >= 1, got {channels}, {pieces} and {reduction}")
        if variant not in ("A", "B", "C"):
            raise ValueError(f"variant must be A, B or C, got {variant!r}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
        self.channels, self.variant, self.pieces, self.channel_dim = channels, variant, pieces, channel_dim
        self.temperature = temperature
        hidden = max(channels // reduction, 1)
        outputs = 2 * pieces * (1 if variant == "A" else channels)
        self.hyper = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
        nn.init.normal_(self.hyper[2].weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(self.hyper[2].bias)  # type: ignore[arg-type]
        self.attention = nn.Linear(channels, 1) if variant == "C" else None
        scale = [slope_range] * pieces + [offset_range] * pieces
        self.register_buffer("scale", torch.tensor(scale), persistent=False)  # (2K,): lambda_a, .., lambda_b, ..

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int, **options: Any) -> DynamicReLU:
        """The layer that takes an activation's place; an activation has no weights to take over."""
        return cls(channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[self.channel_dim] != self.channels:
            where = f"on axis {self.channel_dim}"
            raise ValueError(f"expected {self.channels} channels {where}, got shape {tuple(x.shape)}")
        if self.channel_dim == -1:
            return self._pieces(x.movedim(-1, 1)).movedim(1, -1)
        return self._pieces(x)

    def _pieces(self, x: Tensor) -> Tensor:
        context = x.mean(tuple(range(2, x.ndim)))  # (N, C)
        residual = 2 * self.hyper(context).sigmoid() - 1  # (N, 2KC), in (-1, 1)
        residual = residual.unflatten(1, (-1, 2 * self.pieces)) * self.scale.to(x.dtype)  # (N, C or 1, 2K)
        parts = residual.permute(2, 0, 1).contiguous()[(..., *[None] * (x.ndim - 2))]  # (2K, N, C or 1, 1..)
        pi = self._attention(x)
        lean = pi is None and self.pieces == 2 and parts.dtype == x.dtype
        if lean and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            slopes = torch.stack([parts[0] + 1, parts[1]])
            return _TwoPieces.apply(x, slopes, parts[2:])
        y: Tensor | None = None
        for k in range(self.pieces):
            slope, offset = parts[k], parts[self.pieces + k]
            if pi is None:
                piece = torch.addcmul(offset, slope + 1 if k == 0 else slope, x)
            else:
                piece = torch.addcmul(offset, slope, x) * pi
                piece = piece + x if k == 0 else piece
            y = piece if y is None else torch.maximum(y, piece)
        assert y is not None
        return y  # (N, C, *S)

    def _attention(self, x: Tensor) -> Tensor | None:
        if self.attention is None:
            return None
        weight = self.attention.weight.view(1, self.channels, *[1] * (x.ndim - 2))
        logits = (x * weight).sum(1, keepdim=True) + self.attention.bias.view(-1, *[1] * (x.ndim - 2))
        return spatial_attention(logits, self.temperature)

    def extra_repr(self) -> str:
        return f"{self.channels}, variant={self.variant}, pieces={self.pieces}, channel_dim={self.channel_dim}"
