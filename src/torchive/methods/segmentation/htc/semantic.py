"""The semantic branch: all maps of a pyramid to the class of each cell, and to an embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation


class FusedSemanticBranch(nn.Module):
    """Maps of C channels to logits (N, S, h, w) and an embedding (N, C, h, w), both as large as one of the maps.

    A 1x1 convolution on each map, bilinear resizing, the sum, 3x3 convolutions; then a 1x1 convolution for each output
    (section 3.3). ReLU follows all but the logits.

    Args:
        channels: C.
        num_classes: S.
        levels: number of maps.
        level: the map whose size the outputs have.
        depth: number of 3x3 convolutions.
        resize_first: the order of the release: the maps are resized before the 1x1 convolution.
        embedding: whether there is an embedding; None stands in its place otherwise.

    Raises:
        ValueError: ``level`` is none of the maps.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        levels: int = 5,
        level: int = 1,
        depth: int = 4,
        resize_first: bool = False,
        embedding: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= level < levels:
            raise ValueError(f"level must lie in 0 to {levels - 1}, got {level}")
        self.level, self.resize_first = level, resize_first

        def layer(size: int) -> nn.Module:
            return Conv2dNormActivation(channels, channels, size, norm_layer=None, inplace=False)

        self.lateral = nn.ModuleList(layer(1) for _ in range(levels))
        self.convs = nn.Sequential(*(layer(3) for _ in range(depth)))
        self.embedding = layer(1) if embedding else None
        self.logits = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        size = maps[self.level].shape[2:]
        total = None
        for k, (x, lateral) in enumerate(zip(maps, self.lateral, strict=True)):
            if self.resize_first:
                x = lateral(_resize(x, size) if k != self.level else x)
            else:
                x = _resize(lateral(x), size) if k != self.level else lateral(x)
            total = x if total is None else total + x
        x = self.convs(total)
        return self.logits(x), None if self.embedding is None else self.embedding(x)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)
