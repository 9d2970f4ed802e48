"""What happens between maps: fusion of neighbours, erasing and transferring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gate = Literal["channels", "max", "mean"]
Variant = Literal["both", "erase", "transfer"]


def to_finer(x: Tensor, like: Tensor) -> Tensor:
    """A map at the size of a finer one, bilinear."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def to_coarser(x: Tensor, like: Tensor, halvings: int) -> Tensor:
    """A map at the size of a coarser one: max pooling 2 x 2 as often as said; sizes of unpadded layers by nearest."""
    for _ in range(halvings):
        x = F.max_pool2d(x, 2, ceil_mode=True)
    if not torch.compiler.is_compiling() and x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


class NeighbourExchange(nn.Module):
    """Erasing and transferring between two maps: (N, C, H, W) and (N, C', H', W') to the same shapes.

    The erased map and what was taken from it add up to the map that came in.

    Args:
        channels: C of the shallow map.
        gate_channels: C' of the deep map.
        halvings: how often the shallow map's sides must be halved to be those of the deep one.
        variant: "both"; or "erase" or "transfer" alone.
        gate: one weight for each of the shallow map's "channels", from a 1 x 1 convolution; or one for each cell, from
            the deep map's "max" or "mean" over channels, times a weight, plus a bias.
        open_bias: the gate's bias at the start; -2 lets little through, 0 half.

    Raises:
        ValueError: another ``variant`` or ``gate``, or an argument below one.
    """

    def __init__(
        self,
        channels: int,
        gate_channels: int,
        *,
        halvings: int = 2,
        variant: Variant = "both",
        gate: Gate = "channels",
        open_bias: float = 0.0,
    ) -> None:
        super().__init__()
        if min(channels, gate_channels, halvings) < 1:
            raise ValueError(
                f"channels, gate_channels and halvings must be >= 1, got {channels}, {gate_channels} and {halvings}"
            )
        if variant not in ("both", "erase", "transfer") or gate not in ("channels", "max", "mean"):
            raise ValueError(
                f"expected variant both, erase or transfer and gate channels, max or mean, got {variant!r} and {gate!r}"
            )
        self.variant, self.gate, self.halvings = variant, gate, halvings
        each = gate == "channels"
        self.opening = nn.Conv2d(gate_channels if each else 1, channels if each else 1, 1)
        if not each:
            nn.init.ones_(self.opening.weight)
        assert self.opening.bias is not None
        nn.init.constant_(self.opening.bias, open_bias)
        self.carry = nn.Conv2d(channels, gate_channels, 1, bias=False) if variant != "erase" else None

    def forward(self, shallow: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
        larger = shallow * self.weigh(shallow, deep)  # (N, C, H, W): what larger objects gave the shallow map
        erased = shallow - larger if self.variant != "transfer" else shallow
        if self.carry is None:
            return erased, deep
        return erased, deep + self.carry(to_coarser(larger, deep, self.halvings))

    def weigh(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """The gate (N, C, H, W), or (N, 1, H, W) of one weight for each cell."""
        if self.gate == "max":
            deep = deep.amax(1, keepdim=True)
        elif self.gate == "mean":
            deep = deep.mean(1, keepdim=True)
        return to_finer(self.opening(deep), shallow).sigmoid()


class NearestFusion(nn.Module):
    """Each map joined by its nearest neighbours: maps (N, C_k, H_k, W_k) to maps of the same shapes.

    Args:
        channels: of the maps, finest first.
        fused: how many of them, from the finest on; the others pass.
    """

    def __init__(self, channels: Sequence[int], fused: int) -> None:
        super().__init__()
        self.joins = nn.ModuleList()
        for k in range(fused):
            near = [j for j in (k - 1, k, k + 1) if 0 <= j < len(channels)]
            self.joins.append(nn.ModuleDict({str(j - k + 1): nn.Conv2d(channels[j], channels[k], 1) for j in near}))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found = list(maps)
        for k, join in enumerate(self.joins):
            convs: nn.ModuleDict = join  # type: ignore[assignment]
            total = convs["1"](maps[k])
            if "0" in convs:
                total = total + convs["0"](to_coarser(maps[k - 1], maps[k], 1))
            if "2" in convs:  # convolution and interpolation commute; the smaller map is the cheaper one
                total = total + to_finer(convs["2"](maps[k + 1]), maps[k])
            found[k] = total
        return found


class TopDownFusion(nn.Module):
    """The way of feature pyramids: each map plus the one above it, which already holds what is above that.

    Args: as of ``NearestFusion``.
    """

    def __init__(self, channels: Sequence[int], fused: int) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.Conv2d(channels[k], channels[k], 1) for k in range(fused))
        self.above = nn.ModuleList(
            nn.Conv2d(channels[k + 1], channels[k], 1) for k in range(fused) if k + 1 < len(channels)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found = list(maps)
        for k in reversed(range(len(self.own))):
            found[k] = self.own[k](maps[k])
            if k < len(self.above):
                found[k] = found[k] + to_finer(self.above[k](found[k + 1]), found[k])
        return found
