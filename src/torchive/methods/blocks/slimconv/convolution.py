"""The convolution that takes a 3x3 convolution's place."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn


def fold_channels(x: Tensor, weight: Tensor, folds: int) -> Tensor:
    """(N, C, H, W) weighted by (N, C, 1, 1), its ``folds`` runs of channels summed: (N, C / folds, H, W)."""
    (first, *parts), (first_weight, *weights) = x.chunk(folds, 1), weight.chunk(folds, 1)
    y = first_weight * first
    for part, own in zip(parts, weights, strict=True):
        y = torch.addcmul(y, own, part)
    return y


class SlimConv(nn.Module):
    """Map (N, C, H, W) to (N, C / r + C / (2 r), H', W'); the map has the sides that a 3x3 convolution would give.

    Args:
        channels: C, a multiple of 2 r.
        folds: r; the paper's k is 2 r / 3.
        stride: step of both 3x3 windows.
        dilation: distance of their taps; the padding follows it.
        groups: groups of the upper path's 3x3 convolution.
        lower_groups: those of the lower path's; as many as ``groups`` if None.
        reduction: by which the gate squeezes its channels.
        gate_norm: "batch" as in the release, or "layer", which takes a training batch of one image, too; it has two or
            more hidden channels.

    Raises:
        ValueError: numbers below one, channels that do not divide, or an unknown ``gate_norm``; in ``forward``, an
            input of other channels, or a training batch of one where the gate has a batch norm.
    """

    def __init__(
        self,
        channels: int,
        *,
        folds: int = 2,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        lower_groups: int | None = None,
        reduction: int = 32,
        gate_norm: Literal["batch", "layer"] = "batch",
    ) -> None:
        super().__init__()
        lower_groups = groups if lower_groups is None else lower_groups
        if min(channels, folds, stride, dilation, groups, lower_groups, reduction) < 1:
            given = (channels, folds, stride, dilation, groups, lower_groups, reduction)
            raise ValueError(f"channels, folds, stride, dilation, groups and reduction must be >= 1, got {given}")
        if channels % (2 * folds):
            raise ValueError(f"channels must be a multiple of {2 * folds} for {folds} folds, got {channels}")
        if gate_norm not in ("batch", "layer"):
            raise ValueError(f"gate_norm must be batch or layer, got {gate_norm!r}")
        upper, lower = channels // folds, channels // (2 * folds)
        if upper % groups or lower % lower_groups:
            raise ValueError(f"{groups} and {lower_groups} groups do not divide {upper} and {lower} channels")
        self.channels, self.folds, self.out_channels = channels, folds, upper + lower
        hidden = max(channels // reduction, 2 if gate_norm == "layer" else 1)  # one number alone norms to nothing
        self.gate = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden) if gate_norm == "batch" else nn.GroupNorm(1, hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )
        window: dict[str, Any] = {"stride": stride, "padding": dilation, "dilation": dilation, "bias": False}
        self.upper = nn.Sequential(nn.Conv2d(upper, upper, 3, groups=groups, **window), nn.BatchNorm2d(upper))
        self.lower = nn.Sequential(
            nn.Conv2d(upper, lower, 1, bias=False),
            nn.BatchNorm2d(lower),
            nn.ReLU(inplace=True),
            nn.Conv2d(lower, lower, 3, groups=lower_groups, **window),
            nn.BatchNorm2d(lower),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int | None = None, **options: Any) -> SlimConv:
        """A new layer of a 3x3 convolution's shape; nothing of its weights has a place here.

        Raises:
            TypeError: ``old`` is no ``Conv2d``. ValueError: it is not 3x3 with equal padding, or changes the channels.
        """
        if not isinstance(old, nn.Conv2d):
            raise TypeError(f"expected a torch.nn.Conv2d, got {type(old).__name__}")
        dilation = old.dilation[0]
        padding = (dilation, dilation) if old.padding == "same" else old.padding
        if (
            old.kernel_size != (3, 3)
            or old.in_channels != old.out_channels
            or padding != (dilation, dilation)
            or old.dilation != (dilation, dilation)
            or old.stride[0] != old.stride[1]
        ):
            raise ValueError(
                f"expected a 3x3 convolution that keeps the channels and is padded by its dilation, got {old}"
            )
        return cls(old.in_channels, stride=old.stride[0], dilation=dilation, groups=old.groups, **options)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected (N, {self.channels}, H, W), got shape {tuple(x.shape)}")
        norm = self.gate[1]
        if norm.training and isinstance(norm, nn.BatchNorm2d) and x.shape[0] == 1:
            raise ValueError('expected a training batch of 2 or more, got 1; gate_norm="layer" takes it')
        weight = self.gate(x.mean((2, 3), keepdim=True))  # (N, C, 1, 1)
        top = fold_channels(x, weight, self.folds)  # (N, C / r, H, W)
        bottom = fold_channels(x, weight.flip(1), self.folds)
        return torch.cat([self.upper(top), self.lower(bottom)], 1)
