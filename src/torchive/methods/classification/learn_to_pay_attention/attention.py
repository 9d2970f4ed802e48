"""Attention over positions by agreement with a global vector, and an additive gate with the same interface."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Normalisation = Literal["softmax", "sigmoid"]


def attention_weights(scores: Tensor, normalisation: Normalisation) -> Tensor:
    """(N, L) scores to weights: a softmax, whose sum is one, or sigmoids divided by L."""
    if normalisation == "softmax":
        return scores.softmax(1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    return scores.sigmoid() / scores.shape[1]


class _PositionAttention(nn.Module):
    """Weighted sums of local features; what the weights are is the subclass's ``compatibility``."""

    def __init__(self, channels: int, gate_channels: int, normalisation: Normalisation) -> None:
        super().__init__()
        if min(channels, gate_channels) < 1:
            raise ValueError(f"channels must be >= 1, got {channels} and {gate_channels}")
        if normalisation not in ("softmax", "sigmoid"):
            raise ValueError(f"normalisation must be softmax or sigmoid, got {normalisation!r}")
        self.channels, self.gate_channels, self.normalisation = channels, gate_channels, normalisation

    def forward(self, local: Tensor, whole: Tensor) -> Tensor:
        """g_a: (N, C, *S) local and (N, D) global features to (N, C)."""
        return self.pooled(local, self.compatibility(local, whole))

    def pooled(self, local: Tensor, scores: Tensor) -> Tensor:
        """The sum of local features (N, C, *S), weighed by scores (N, 1, *S): (N, C)."""
        weights = attention_weights(scores.flatten(1), self.normalisation)  # (N, L)
        return torch.bmm(local.flatten(2), weights.unsqueeze(2)).squeeze(2)

    def attention(self, local: Tensor, whole: Tensor) -> Tensor:
        """a: the weights (N, 1, *S); a softmax's sum is one, the sigmoids' mean is at most one."""
        scores = self.compatibility(local, whole)
        return attention_weights(scores.flatten(1), self.normalisation).view_as(scores)

    def compatibility(self, local: Tensor, whole: Tensor) -> Tensor:
        """c: (N, C, *S) and (N, D) to (N, 1, *S)."""
        if local.ndim < 3 or local.shape[1] != self.channels:
            raise ValueError(f"expected local features (N, {self.channels}, *S), got shape {tuple(local.shape)}")
        expected = (local.shape[0], self.gate_channels)
        if whole.shape != expected:
            raise ValueError(f"expected global features {expected}, got shape {tuple(whole.shape)}")
        scores = self._scores(local.flatten(2), whole)  # (N, L)
        return scores.view(local.shape[0], 1, *local.shape[2:])

    def _scores(self, local: Tensor, whole: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no score")


class CompatibilityAttention(_PositionAttention):
    """Local features (N, C, *S) and global ones (N, C) to their attended sum (N, C).

    Equal scores give the global mean. With "pc" and a softmax the weights do not depend on the global features; with
    "dp" they do, and longer global features make them sharper.

    Args:
        channels: C, of both.
        score: "dp", the product of both, or "pc", a learnt direction of their sum.
        normalisation: "softmax" over positions, or "sigmoid" with a mean over positions.

    Raises:
        ValueError: ``channels`` below one or an unknown option; in ``forward``, features of other shapes.
    """

    def __init__(
        self, channels: int, *, score: Literal["dp", "pc"] = "pc", normalisation: Normalisation = "softmax"
    ) -> None:
        super().__init__(channels, channels, normalisation)
        if score not in ("dp", "pc"):
            raise ValueError(f"score must be dp or pc, got {score!r}")
        self.score = score
        self.direction = nn.Parameter(torch.empty(channels)) if score == "pc" else None  # u
        if self.direction is not None:
            nn.init.normal_(self.direction, std=(2 / (channels + 1)) ** 0.5)

    def _scores(self, local: Tensor, whole: Tensor) -> Tensor:
        if self.direction is None:
            return torch.bmm(whole.unsqueeze(1), local).squeeze(1)
        u = self.direction.to(local.dtype)
        return torch.bmm(u.expand(local.shape[0], 1, -1), local).squeeze(1) + (whole @ u).unsqueeze(1)

    def extra_repr(self) -> str:
        return f"{self.channels}, score={self.score}, normalisation={self.normalisation}"


class GridAttention(_PositionAttention):
    """The same from an additive gate, psi(relu(W_l l + W_g g)), as in Attention U-Net; the ReLU lets g in.

    Args:
        channels: C of the local features.
        gate_channels: D of the global ones.
        inter_channels: width of the sum; half of C, at least one, if None.
        normalisation: "sigmoid" with a mean over positions, or "softmax" over positions.

    Raises:
        ValueError: channels below one or an unknown ``normalisation``; in ``forward``, features of other shapes.
    """

    def __init__(
        self,
        channels: int,
        gate_channels: int,
        *,
        inter_channels: int | None = None,
        normalisation: Normalisation = "sigmoid",
    ) -> None:
        super().__init__(channels, gate_channels, normalisation)
        hidden = max(channels // 2, 1) if inter_channels is None else inter_channels
        if hidden < 1:
            raise ValueError(f"inter_channels must be >= 1, got {hidden}")
        self.theta = nn.Linear(channels, hidden, bias=False)
        self.phi = nn.Linear(gate_channels, hidden, bias=False)
        self.psi = nn.Linear(hidden, 1)

    def _scores(self, local: Tensor, whole: Tensor) -> Tensor:
        hidden = (self.theta(local.mT) + self.phi(whole).unsqueeze(1)).relu()  # (N, L, hidden)
        return self.psi(hidden).squeeze(2)
