"""Context enhancement and spatial attention, and the proposal network's own map between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContextEnhancement(nn.Module):
    """Maps of stride 16 (N, C, H, W) and 32 to one of stride 16, (N, C', H, W): local, wider and global context summed.

    Args:
        in_channels: of the map of stride 16.
        below_channels: of the map of stride 32.
        out_channels: C'.
        global_branch: whether the coarser map, and its mean over the whole image, are added.
    """

    def __init__(
        self, in_channels: int, below_channels: int, *, out_channels: int = 245, global_branch: bool = True
    ) -> None:
        super().__init__()
        self.local = nn.Conv2d(in_channels, out_channels, 1)
        self.coarse: nn.Conv2d | None = None
        self.whole: nn.Conv2d | None = None
        if global_branch:
            self.coarse = nn.Conv2d(below_channels, out_channels, 1)
            self.whole = nn.Conv2d(below_channels, out_channels, 1)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        x = self.local(fine)
        if self.coarse is None or self.whole is None:
            return x
        up = F.interpolate(self.coarse(coarse), size=x.shape[2:], mode="nearest")
        return x + up + self.whole(coarse.mean((2, 3), keepdim=True))


class ProposalMap(nn.Module):
    """(N, C, H, W) to (N, C', H, W): what the proposal network predicts from, and what attention is computed from.

    Args:
        in_channels: C.
        out_channels: C'.
        depthwise_act: whether an activation stands behind the depthwise convolution, too, as in the port.
    """

    def __init__(self, in_channels: int, *, out_channels: int = 256, depthwise_act: bool = False) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 5, padding=2, groups=in_channels)
        self.depthwise_norm = nn.BatchNorm2d(in_channels)
        self.act = nn.ReLU() if depthwise_act else nn.Identity()
        self.mix = nn.Conv2d(in_channels, out_channels, 1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depthwise_norm(self.depthwise(x)))
        mixed: Tensor = self.norm(self.mix(x))
        return mixed.relu()


class SpatialAttention(nn.Module):
    """A map (N, C, H, W) weighted by what another (N, C', H, W) says of each place and channel, from 0 to 1.

    Args:
        channels: C.
        gate_channels: C'.
    """

    def __init__(self, channels: int, gate_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(gate_channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * torch.sigmoid(self.norm(self.conv(gate)))
