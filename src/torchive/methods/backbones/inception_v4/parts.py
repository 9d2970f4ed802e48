"""Branches from one line of text each, and the residual unit around them.

A branch is written as in the paper's figures: ``1x1:64 1x7:224 3x3:96/2``. ``KHxKW:C`` is a convolution of C channels
with batch norm and ReLU, ``/2`` gives it stride 2 without padding, ``v`` no padding; ``a|b`` is a fork, both sides of
which see the same map; ``avg`` and ``max`` are 3x3 pools of stride 1, ``max/2`` one of stride 2 without padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Padding = Literal["valid", "same"]

#: Modules of the earlier papers, with the widths of one place of their networks.
LINEAGE: dict[str, tuple[str, ...]] = {
    # GoogLeNet: parallel scales behind 1x1 reductions, place 3a
    "v1": ("1x1:64", "1x1:96 3x3:128", "1x1:16 5x5:32", "max 1x1:32"),
    # v2 and v3: 5x5 as two 3x3; 7x7 as 1x7 and 7x1; 3x3 as 1x3 and 3x1 side by side
    "v2_a": ("1x1:64", "1x1:48 3x3:64", "1x1:64 3x3:96 3x3:96", "avg 1x1:64"),
    "v2_b": ("1x1:192", "1x1:128 1x7:128 7x1:192", "1x1:128 7x1:128 1x7:128 7x1:128 1x7:192", "avg 1x1:192"),
    "v2_c": ("1x1:320", "1x1:384 1x3:384|3x1:384", "1x1:448 3x3:384 1x3:384|3x1:384", "avg 1x1:192"),
}

_CONVOLUTION = re.compile(r"(\d)x(\d):(\d+)(v|/2)?")


class Branches(nn.Module):
    """Parallel branches, concatenated: (N, C, H, W) to (N, ``out_channels``, H', W').

    Args:
        in_channels: C.
        branches: one line of text for each, see the module.
        multiplier: factor on all channels inside.
        padding: "valid" is the text's; "same" pads the unpadded layers, too, so that no border is lost.

    Raises:
        ValueError: a word that cannot be read, or an unknown ``padding``.
    """

    def __init__(
        self,
        in_channels: int,
        branches: Sequence[str],
        *,
        multiplier: float = 1.0,
        padding: Padding = "valid",
    ) -> None:
        super().__init__()
        if padding not in ("valid", "same"):
            raise ValueError(f"padding must be valid or same, got {padding!r}")
        self.branches = nn.ModuleList()
        self.out_channels = 0
        for line in branches:
            channels, layers = in_channels, []
            for word in line.split():
                layer, channels = _layer(word, channels, multiplier, padding)
                layers.append(layer)
            self.branches.append(layers[0] if len(layers) == 1 else nn.Sequential(*layers))
            self.out_channels += channels

    def forward(self, x: Tensor) -> Tensor:
        if len(self.branches) == 1:
            return self.branches[0](x)
        return torch.cat([branch(x) for branch in self.branches], 1)


class ResidualBranches(nn.Module):
    """Branches, a linear 1x1 convolution and the scaled sum: (N, C, H, W) to (N, C, H, W).

    Args:
        channels: C.
        branches: as of ``Branches``.
        residual_scale: s, what the branches' sum is multiplied by; zero leaves relu(x).
        multiplier: factor on the channels inside.
        act: whether a ReLU follows the sum.
        residual: whether x is added at all, the paper's question.
    """

    def __init__(
        self,
        channels: int,
        branches: Sequence[str],
        *,
        residual_scale: float = 0.2,
        multiplier: float = 1.0,
        act: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.residual_scale, self.act, self.residual = residual_scale, act, residual
        self.branches = Branches(channels, branches, multiplier=multiplier)
        self.linear = nn.Conv2d(self.branches.out_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.branches(x)) * self.residual_scale
        if self.residual:
            y = y + x
        return torch.relu(y) if self.act else y


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], stride: int, padding: tuple[int, int]
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(out_channels, eps=1e-3),
            nn.ReLU(inplace=True),
        )


def lineage_module(kind: str, in_channels: int, *, multiplier: float = 1.0) -> Branches:
    """A module of Inception-v1, v2 or v3 by its name in ``LINEAGE``: "v1", "v2_a", "v2_b" or "v2_c".

    Raises:
        ValueError: another name.
    """
    if kind not in LINEAGE:
        raise ValueError(f"kind must be one of {', '.join(LINEAGE)}, got {kind!r}")
    return Branches(in_channels, LINEAGE[kind], multiplier=multiplier)


def _layer(word: str, channels: int, multiplier: float, padding: Padding) -> tuple[nn.Module, int]:
    """The layer of a word, and its output's channels."""
    if "|" in word:
        fork = Branches(channels, word.split("|"), multiplier=multiplier, padding=padding)
        return fork, fork.out_channels
    if word == "avg":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False), channels
    if word == "max":
        return nn.MaxPool2d(3, 1, 1), channels
    if word == "max/2":
        return nn.MaxPool2d(3, 2, 1 if padding == "same" else 0), channels
    found = _CONVOLUTION.fullmatch(word)
    if found is None:
        raise ValueError(f"expected avg, max, max/2 or a convolution such as 3x3:64, got {word!r}")
    height, wide, out = int(found[1]), int(found[2]), max(round(int(found[3]) * multiplier), 1)
    padded = found[4] is None or padding == "same"
    border = (height // 2, wide // 2) if padded else (0, 0)
    return ConvNorm(channels, out, (height, wide), 2 if found[4] == "/2" else 1, border), out
