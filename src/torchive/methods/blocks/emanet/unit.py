"""The unit as a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchive.methods.blocks.emanet.em import expectation, l2_normalised, maximisation


class EMAttentionUnit(nn.Module):
    """Map (N, C, *S) to the same shape: every position is rebuilt from K bases, at a cost of K L instead of L L.

    The bases of each image start from ``mu``, a buffer that follows the bases found in training and is fixed otherwise.
    In distributed training all processes hold the same ``mu``. An empty batch leaves it alone.

    Args:
        channels: C.
        bases: K.
        iterations: T, pairs of an E and an M step.
        momentum: the share of ``mu`` that a training pass keeps.
        temperature: tau, what scores are divided by.
        differentiable: whether gradients pass through the iterations. The release's form is False: then the first
            convolution is frozen at its start, and the input's gradient comes through the identity alone.
        norm: the normalisation after the last convolution, of (N, C, 1, L).
        act: the activation of the sum.
        start: "random" as in the release, or "identity": the norm's weight begins at zero.
        channel_dim: 1, or -1 for tokens (N, L, C).

    Raises:
        ValueError: ``channels``, ``bases`` or ``iterations`` below one, ``momentum`` outside [0, 1], ``temperature``
            not above zero, an unknown ``start`` or ``channel_dim``, or a norm without weight that is to start as the
            identity; in ``forward``, an input whose channel axis is not C.
    """

    mu: Tensor

    def __init__(
        self,
        channels: int,
        *,
        bases: int = 64,
        iterations: int = 3,
        momentum: float = 0.9,
        temperature: float = 1.0,
        differentiable: bool = False,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act: Callable[[], nn.Module] = nn.ReLU,
        start: Literal["random", "identity"] = "random",
        channel_dim: Literal[1, -1] = 1,
    ) -> None:
        super().__init__()
        if min(channels, bases, iterations) < 1:
            raise ValueError(f"channels, bases and iterations must be >= 1, got {channels}, {bases} and {iterations}")
        if not 0 <= momentum <= 1 or not temperature > 0:
            raise ValueError(f"momentum must be in [0, 1] and temperature > 0, got {momentum} and {temperature}")
        if start not in ("random", "identity"):
            raise ValueError(f"start must be random or identity, got {start!r}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
        self.channels, self.bases, self.iterations, self.momentum = channels, bases, iterations, momentum
        self.temperature, self.differentiable, self.channel_dim = temperature, differentiable, channel_dim
        self.register_buffer("mu", l2_normalised(torch.randn(1, channels, bases) * (2 / bases) ** 0.5))
        self.reduce = nn.Conv2d(channels, channels, 1)  # W_1
        self.restore = nn.Conv2d(channels, channels, 1, bias=False)  # W_2
        for layer in (self.reduce, self.restore):
            nn.init.normal_(layer.weight, std=(2 / channels) ** 0.5)
        self.reduce.requires_grad_(differentiable)
        self.norm, self.act = norm(channels), act()
        if start == "identity":
            weight = getattr(self.norm, "weight", None)
            if weight is None:
                raise ValueError(f"start='identity' needs a norm with a weight, got {type(self.norm).__name__}")
            nn.init.zeros_(weight)

    @classmethod
    def from_channels(cls, channels: int, **options: Any) -> EMAttentionUnit:
        """The unit for C channels, to be put behind another part: at first it changes nothing."""
        return cls(channels, **{"start": "identity", "act": nn.Identity, **options})

    def forward(self, x: Tensor) -> Tensor:
        y = self._first(x)
        flat = y.flatten(2)  # (N, C, L)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            z, mu = self._fit(flat)  # (N, L, K), (N, C, K)
            rebuilt = (z @ mu.mT).mT if flat.stride(1) == 1 else mu @ z.mT  # (N, C, L), in the input's layout
            rebuilt = rebuilt.relu_().unsqueeze(2)  # a row of positions: a map in either layout
        y = self.act(y + self.norm(self.restore(rebuilt)).view(y.shape))
        if self.training and x.shape[0]:
            self._follow(mu)
        return y if self.channel_dim == 1 else y.movedim(1, -1)

    def responsibilities(self, x: Tensor) -> Tensor:
        """How much each basis accounts for each position: (N, C, *S) to (N, K, *S), each position's sum is one."""
        y = self._first(x)
        return self._fit(y.flatten(2))[0].mT.unflatten(2, y.shape[2:])

    def fitted_bases(self, x: Tensor) -> Tensor:
        """The bases that EM finds for each sample: (N, C, *S) to (N, C, K), columns of length one."""
        return self._fit(self._first(x).flatten(2))[1]

    def _first(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[self.channel_dim] != self.channels:
            raise ValueError(
                f"expected {self.channels} channels on axis {self.channel_dim}, got shape {tuple(x.shape)}"
            )
        return x if self.channel_dim == 1 else x.movedim(-1, 1)

    def _fit(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """T iterations on (N, C, L): the last responsibilities (N, L, K) and bases (N, C, K)."""
        flat = self.reduce(flat.unsqueeze(2)).squeeze(2)
        mu = self.mu.to(flat.dtype).repeat(flat.shape[0], 1, 1)  # a copy: the buffer changes before the backward pass
        for _ in range(self.iterations):
            z = expectation(flat, mu, self.temperature)
            mu = maximisation(flat, z)
        return z, mu

    @torch.no_grad()
    def _follow(self, mu: Tensor) -> None:
        """Move the buffer towards the mean of the bases of all samples of all processes."""
        found = mu.mean(0, keepdim=True, dtype=self.mu.dtype)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(found)
            found /= dist.get_world_size()
        self.mu.mul_(self.momentum).add_(found, alpha=1 - self.momentum)

    def extra_repr(self) -> str:
        return f"{self.channels}, bases={self.bases}, iterations={self.iterations}, momentum={self.momentum}"
