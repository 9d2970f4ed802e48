"""The paper's VGG: its maps before each pooling, and the last map, from which the global features come."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.fcn import conv_norm_act
from torchive.protocols import Level


class VGGMaps(nn.Module):
    """Images (N, C, H, W), any size, to the maps of blocks three to five, before their pooling, and of the last block.

    The first two blocks have no pooling, so the first map has the image's size; sizes are rounded up. The last block
    pools after each convolution: at 32 pixels its map has one position.

    Args:
        widths: channels of the six blocks.
        layers: convolutions of each.
        in_channels: C.

    Raises:
        ValueError: not six of each, or one below one; in ``forward``, an input with other channels.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 512, 512),
        *,
        layers: Sequence[int] = (2, 2, 3, 3, 3, 2),
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(widths) != 6 or len(layers) != 6 or min(*widths, *layers, in_channels) < 1:
            raise ValueError(
                f"expected six widths, six layers and in_channels, all >= 1, got {tuple(widths)}, {tuple(layers)} and "
                f"{in_channels}"
            )
        self.in_channels = in_channels
        self.blocks = nn.ModuleList()
        before = in_channels
        for width, count in zip(widths, layers, strict=True):
            steps = [conv_norm_act(before if i == 0 else width, width, 3) for i in range(count)]
            self.blocks.append(nn.Sequential(*steps))
            before = width
        strides = (1, 2, 4, 8 * 2 ** layers[5])
        self.levels = tuple(Level(c, s) for c, s in zip(widths[2:], strides, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        *body, last = self.blocks
        maps: list[Tensor] = []
        for place, block in enumerate(body):
            x = block(x)
            if place >= 2:
                maps.append(x)
                x = F.max_pool2d(x, 2, ceil_mode=True)
        for step in last:  # type: ignore[attr-defined]
            x = F.max_pool2d(step(x), 2, ceil_mode=True)
        return [*maps, x]
