"""The semantic branch: each map of a pyramid comes to the finest one's size by convolutions, then they are joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PyramidSemanticHead(nn.Module):
    """Maps (N, C, h, w) of a pyramid to logits (N, K, h, w) at the finest one's size.

    A map of stride s goes through log2(s / finest) rounds of 3x3 convolution, group norm, ReLU and bilinear doubling;
    the finest one through a single round that keeps its size (section 3, figure 3).

    Args:
        channels: C.
        num_classes: K.
        strides: of the maps, finest first, each a power of two times the finest.
        width: of the convolutions.
        groups: of the group norms.
        combine: "add" the maps, the paper's, or "concat" them.
        align_corners: of the doubling; True in segmentation_models.pytorch.

    Raises:
        ValueError: strides that are no powers of two apart, or another ``combine``.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        width: int = 128,
        groups: int = 32,
        combine: Literal["add", "concat"] = "add",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if combine not in ("add", "concat"):
            raise ValueError(f"combine must be add or concat, got {combine!r}")
        rounds = [(stride // strides[0]).bit_length() - 1 for stride in strides]
        if any(strides[0] << k != stride for k, stride in zip(rounds, strides, strict=True)):
            raise ValueError(f"strides must be powers of two apart, got {list(strides)}")
        self.rounds, self.combine, self.align_corners = tuple(rounds), combine, align_corners
        self.branches = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(channels if k == 0 else width, width, 3, padding=1, bias=False),
                    nn.GroupNorm(groups, width),
                    nn.ReLU(),
                )
                for k in range(max(count, 1))
            )
            for count in rounds
        )
        self.logits = nn.Conv2d(width * (len(rounds) if combine == "concat" else 1), num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.logits(self.features(maps))
        return logits

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """What the classifier reads: (N, width, h, w), or as many times the width as there are maps."""
        found, size = [], maps[0].shape[2:]
        for x, branch, count in zip(maps, self.branches, self.rounds, strict=True):
            layers: Any = branch
            for k, layer in enumerate(layers):
                x = layer(x)
                if k < count - 1:
                    x = self._resize(x, [2 * side for side in x.shape[2:]])
                elif k < count:
                    x = self._resize(x, size)
            found.append(x)
        return torch.stack(found).sum(0) if self.combine == "add" else torch.cat(found, 1)

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)
