"""Global attention upsample, with the other ways to join two maps in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from torchive.nn.fcn import Norm, conv_norm_act
from torchive.nn.unet import resize

GATES = ("channel", "spatial", "none")


class GlobalAttentionUpsample(nn.Module):
    """A finer map (N, skip_channels, H, W) and a coarser (N, C, h, w) to (N, C, H, W): the coarser one, upsampled, plus
    the finer one, weighed by what the coarser one holds as a whole.

    With a gate of one everywhere it is the addition of a feature pyramid network, with zero it is upsampling alone. In
    training batch norm needs a batch of two or more, since the gate is computed at one position.

    Args:
        skip_channels: channels of the finer map.
        channels: C, of the coarser map and of the result.
        gate: "channel" as in the paper; "spatial", a map of weights from both, as an attention U-Net's gate, with about
            as many parameters; or "none".
        act: the activation of the gate: ``nn.ReLU`` as in the paper's text, or ``nn.Sigmoid``.
        fusion: "add", or "concat" with a 3x3 convolution of both.
        norm: normalisation after each convolution: a function of the number of channels.
        align_corners: how linear resizing treats the borders.

    Raises:
        ValueError: channels below one, an unknown ``gate`` or ``fusion``; in ``forward``, maps with other channels.
    """

    def __init__(
        self,
        skip_channels: int,
        channels: int,
        *,
        gate: Literal["channel", "spatial", "none"] = "channel",
        act: Callable[[], nn.Module] = nn.ReLU,
        fusion: Literal["add", "concat"] = "add",
        norm: Norm = nn.BatchNorm2d,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        if min(skip_channels, channels) < 1:
            raise ValueError(f"skip_channels and channels must be >= 1, got {skip_channels} and {channels}")
        if gate not in GATES or fusion not in ("add", "concat"):
            raise ValueError(
                f"expected gate in {', '.join(GATES)} and fusion in add, concat; got {gate!r} and {fusion!r}"
            )
        self.skip_channels, self.channels = skip_channels, channels
        self.kind, self.align_corners = gate, align_corners
        self.skip = conv_norm_act(skip_channels, channels, 3, norm)
        self.gate: nn.Module = nn.Identity()
        self.theta: nn.Module | None = None
        if gate == "channel":
            self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), norm(channels), act())
        elif gate == "spatial":
            hidden = max(channels // 2, 1)
            self.theta = nn.Conv2d(channels, hidden, 1, bias=False)
            self.phi = nn.Conv2d(channels, hidden, 1)
            self.gate = nn.Sequential(nn.ReLU(), nn.Conv2d(hidden, 1, 1), act())
        self.fuse = conv_norm_act(2 * channels, channels, 3, norm) if fusion == "concat" else None

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        self._check(low, high)
        skip = self.skip(low)  # (N, C, H, W)
        up = resize(high, low.shape[2:], self.align_corners)
        if self.kind != "none":
            skip = skip * self._gate(skip, high)
        return up + skip if self.fuse is None else self.fuse(torch.cat([up, skip], 1))

    def attention(self, low: Tensor, high: Tensor) -> Tensor:
        """The gate: (N, C, 1, 1) of channels, (N, 1, H, W) of positions, or (1, 1, 1, 1) of ones."""
        self._check(low, high)
        return low.new_ones(1, 1, 1, 1) if self.kind == "none" else self._gate(self.skip(low), high)

    def _gate(self, skip: Tensor, high: Tensor) -> Tensor:
        if self.theta is None:
            return self.gate(high.mean((2, 3), keepdim=True))
        return self.gate(self.theta(skip) + resize(self.phi(high), skip.shape[2:], self.align_corners))

    def _check(self, low: Tensor, high: Tensor) -> None:
        for name, x, channels in (("low", low, self.skip_channels), ("high", high, self.channels)):
            if x.ndim != 4 or x.shape[1] != channels:
                raise ValueError(f"expected {name} with shape (N, {channels}, H, W), got {tuple(x.shape)}")
