"""The non-local block in its four forms, for the comparison."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NonLocal(nn.Module):
    """Map (N, C, *S) to the same shape: every position reads all others; a new block is exactly the identity.

    Args:
        channels: C.
        kind: "embedded_gaussian", "gaussian", "dot" or "concat", the function f of two positions.
        reduction: the squeeze of theta, phi and g: max(C // reduction, 1) channels.
        scale: a factor on the products under the soft-max; 1 in the paper.
        channel_dim: 1, or -1 for tokens (N, L, C).

    Raises:
        ValueError: ``channels`` or ``reduction`` below one, an unknown ``kind`` or ``channel_dim``; in ``forward``, an
            input whose channel axis is not C.
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: Literal["embedded_gaussian", "gaussian", "dot", "concat"] = "embedded_gaussian",
        reduction: int = 2,
        scale: float = 1.0,
        channel_dim: Literal[1, -1] = 1,
    ) -> None:
        super().__init__()
        if min(channels, reduction) < 1:
            raise ValueError(f"channels and reduction must be >= 1, got {channels} and {reduction}")
        if kind not in ("embedded_gaussian", "gaussian", "dot", "concat"):
            raise ValueError(f"kind must be embedded_gaussian, gaussian, dot or concat, got {kind!r}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
        self.channels, self.kind, self.scale, self.channel_dim = channels, kind, scale, channel_dim
        hidden = max(channels // reduction, 1)
        self.theta = None if kind == "gaussian" else nn.Conv2d(channels, hidden, 1)
        self.phi = None if kind == "gaussian" else nn.Conv2d(channels, hidden, 1)
        self.g = nn.Conv2d(channels, hidden, 1)
        self.pair = nn.Parameter(torch.empty(2, hidden)) if kind == "concat" else None  # w of [theta, phi]
        self.out = nn.Conv2d(hidden, channels, 1)
        for layer in (self.theta, self.phi, self.g):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        if self.pair is not None:
            nn.init.normal_(self.pair, std=0.01)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    @classmethod
    def from_channels(cls, channels: int, **options: Any) -> NonLocal:
        """The block for C channels, to be put behind another part."""
        return cls(channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self._first(x)
        theta, phi, flat = self._embed(y)  # (N, L, D) each, and (N, C, L, 1)
        g = self.g(flat).squeeze(-1).transpose(1, 2)  # (N, L, D)
        if self.kind == "concat":
            context = self._pairs(theta, phi) @ g
        elif self.kind == "dot":
            context = theta @ (phi.transpose(1, 2) @ g) / flat.shape[2]  # the map of all pairs is never written
        else:
            q, k, v = theta.unsqueeze(1), phi.unsqueeze(1), g.unsqueeze(1)  # ONNX wants an axis of heads
            context = F.scaled_dot_product_attention(q, k, v, scale=self.scale).squeeze(1)
        change = self.out(context.transpose(1, 2).unsqueeze(-1))  # (N, C, L, 1)
        y = y + change.view(y.shape)
        return y if self.channel_dim == 1 else y.movedim(1, -1)

    def attention(self, x: Tensor) -> Tensor:
        """f(x_i, x_j) of all pairs: (N, C, *S) to (N, L, L), a row for each query."""
        theta, phi, flat = self._embed(self._first(x))
        if self.kind == "concat":
            return self._pairs(theta, phi)
        products = theta @ phi.transpose(1, 2)
        return products / flat.shape[2] if self.kind == "dot" else (products * self.scale).softmax(-1)

    def _first(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[self.channel_dim] != self.channels:
            raise ValueError(
                f"expected {self.channels} channels on axis {self.channel_dim}, got shape {tuple(x.shape)}"
            )
        return x if self.channel_dim == 1 else x.movedim(-1, 1)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = x.flatten(2).unsqueeze(-1)  # (N, C, L, 1)
        if self.theta is None or self.phi is None:
            tokens = flat.squeeze(-1).transpose(1, 2)
            return tokens, tokens, flat
        theta, phi = self.theta(flat), self.phi(flat)
        return theta.squeeze(-1).transpose(1, 2), phi.squeeze(-1).transpose(1, 2), flat

    def _pairs(self, theta: Tensor, phi: Tensor) -> Tensor:
        assert self.pair is not None
        left, right = F.linear(theta, self.pair[:1]), F.linear(phi, self.pair[1:])  # (N, L, 1)
        return (left + right.transpose(1, 2)).relu() / theta.shape[1]

    def extra_repr(self) -> str:
        return f"{self.channels}, kind={self.kind}, scale={self.scale}"
