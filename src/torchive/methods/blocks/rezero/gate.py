"""The gate: alone behind a branch that a network has already, or with branch and shortcut of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class ReZero(nn.Module):
    """x + alpha F(x) of the shape of x; without a branch the gate alone, alpha x, which ends a branch elsewhere.

    Args:
        branch: F; None for the gate alone.
        shortcut: what x goes through beside the branch, such as a projection; nothing if None.
        act: a module applied to the sum, such as the ReLU of a ResNet.
        channels: C, for one alpha for each channel (LayerScale, not ReZero); None for the one alpha of the paper.
        channel_dim: axis of the channels, 1 or -1 for tokens; matters for one alpha for each channel only.
        start: alpha before training; 1 leaves a trained network as it is.
        rate: learning rate of alpha as a multiple of the others'; it never has weight decay.

    Raises:
        ValueError: ``channels`` below one, ``rate`` below zero, or an unknown ``channel_dim``; in ``forward``, branch
            and shortcut of different shapes, or another number of channels.
        TypeError: in ``forward``, whole numbers behind the branch.
    """

    def __init__(
        self,
        branch: nn.Module | None = None,
        *,
        shortcut: nn.Module | None = None,
        act: nn.Module | None = None,
        channels: int | None = None,
        channel_dim: int = 1,
        start: float = 0.0,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        if channels is not None and channels < 1:
            raise ValueError(f"channels must be >= 1, got {channels}")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim}")
        if not rate >= 0:
            raise ValueError(f"rate must be >= 0, got {rate}")
        if branch is None and (shortcut is not None or act is not None):
            raise ValueError("shortcut and act need a branch, got None")
        self.branch, self.shortcut, self.act = branch, shortcut, act
        self.channels, self.channel_dim, self.rate = channels, channel_dim, rate
        self.alpha = nn.Parameter(torch.full((channels or 1,), float(start)))

    @classmethod
    def from_channels(
        cls,
        channels: int,
        *,
        per_channel: bool = False,
        channel_dim: int = 1,
        start: float = 0.0,
        rate: float = 1.0,
    ) -> ReZero:
        """The gate alone, for the end of a branch with C channels."""
        return cls(channels=channels if per_channel else None, channel_dim=channel_dim, start=start, rate=rate)

    @classmethod
    def from_host(cls, host: nn.Module, *, channels: int, **options: Any) -> ReZero:
        """The gate behind ``host``, the end of a branch; a norm in it whose gamma is zero throughout gets gamma = 1.

        A gate that does not start at zero leaves the host alone.
        """
        gate = cls.from_channels(channels, **options)
        if options.get("start", 0.0) == 0:
            for module in host.modules():
                weight = getattr(module, "weight", None)
                if (
                    isinstance(module, _NORMS)
                    and isinstance(weight, Tensor)
                    and not weight.is_meta
                    and not weight.any()
                ):
                    nn.init.ones_(weight)
        return gate

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """What the optimiser does with alpha."""
        return {"alpha": {"lr": self.rate, "weight_decay": 0.0}}

    def forward(self, x: Tensor) -> Tensor:
        if self.branch is None:
            return x * self.shaped(self.alpha, x)
        f = self.branch(x)
        base = x if self.shortcut is None else self.shortcut(x)
        if base.shape != f.shape:
            raise ValueError(f"the branch gives {tuple(f.shape)}, the shortcut {tuple(base.shape)}")
        y = torch.addcmul(base, f, self.shaped(self.alpha, f))
        return y if self.act is None else self.act(y)

    def shaped(self, alpha: Tensor, x: Tensor) -> Tensor:
        """(1,) or (C,) values in a shape that multiplies x."""
        if x.ndim < 2:
            raise ValueError(f"expected at least 2 axes, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point numbers, got {x.dtype}")
        if self.channels is not None and x.shape[self.channel_dim] != self.channels:
            raise ValueError(f"expected {self.channels} channels on axis {self.channel_dim}, got {tuple(x.shape)}")
        alpha = alpha.to(x.dtype)
        if self.channels is None or self.channel_dim == -1:
            return alpha
        return alpha.view(-1, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, channel_dim={self.channel_dim}, rate={self.rate}"
