"""The features that all masks are read from, and the auxiliary semantic branch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from torchive.methods.segmentation.condinst.upsampling import aligned_bilinear
from torchive.nn.prior import init_classifier


def _conv(in_channels: int, out_channels: int) -> nn.Module:
    block = Conv2dNormActivation(in_channels, out_channels, 3)  # without bias, batch norm, ReLU
    nn.init.kaiming_uniform_(block[0].weight, a=1)
    return block


class MaskBranch(nn.Module):
    """Maps (N, C, H, W), finest first, each of half the size of the one before, to (N, C', H, W) of the first.

    Args:
        in_channels: C of every map.
        channels: of the convolutions inside.
        out_channels: C', which the mask heads read.
        levels: number of maps that are added up.
        depth: convolutions after the sum.
    """

    def __init__(
        self, in_channels: int, *, channels: int = 128, out_channels: int = 8, levels: int = 3, depth: int = 4
    ) -> None:
        super().__init__()
        self.refine = nn.ModuleList(_conv(in_channels, channels) for _ in range(levels))
        tower = [_conv(channels, channels) for _ in range(depth)]
        self.tower = nn.Sequential(*tower, nn.Conv2d(channels, out_channels, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.refine[0](maps[0])
        for k in range(1, len(self.refine)):
            x = x + aligned_bilinear(self.refine[k](maps[k]), 2**k)
        return self.tower(x)


class SemanticBranch(nn.Module):
    """The finest map (N, C, H, W) to logits of each class (N, K, H, W); for training alone.

    Args:
        in_channels: C.
        num_classes: K.
        channels: of the two convolutions.
        prior: score of every class at the start.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 128, prior: float = 0.01) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(in_channels, channels), _conv(channels, channels))
        self.logits = nn.Conv2d(channels, num_classes, 1)
        init_classifier(self.logits, prior=prior, std=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.body(x))
