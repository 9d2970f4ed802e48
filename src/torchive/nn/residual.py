"""The residual network for small images whose depth is a free number, for sweeps along depth on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """relu(shortcut(x) + branch(x)), the branch two 3x3 convolutions: (N, in, H, W) to (N, out, H / s, W / s).

    The shortcut has no weights: of another size it takes every second position and fills the new channels with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: bool = True) -> None:
        super().__init__()
        self.stride, self.added = stride, out_channels - in_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=not norm)
        self.norm1 = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=not norm)
        self.norm2 = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))  # (N, out, H / s, W / s)
        short = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        if self.added:
            short = F.pad(short, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(short + y)


class ResidualNetwork(nn.Module):
    """(N, C, H, W) to (N, K) by a ResNet of 6 n + 2 layers: a convolution, three stages of n blocks, a linear layer.

    He et al., CVPR 2016, arXiv:1512.03385, section 4.2: 20 layers have 0.27 M parameters, 56 have 0.85 M.

    Args:
        layers: 6 n + 2.
        widths: channels of the three stages.
        norm: whether each convolution has a batch norm behind it; without, it has a bias.
        num_classes: K.
        in_channels: C.

    Raises:
        ValueError: ``layers`` is not 6 n + 2, or ``widths`` are not three growing numbers.
    """

    def __init__(
        self,
        layers: int = 20,
        *,
        widths: Sequence[int] = (16, 32, 64),
        norm: bool = True,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if layers < 8 or layers % 6 != 2:
            raise ValueError(f"layers must be 6 n + 2 with n >= 1 (8, 14, 20, ..), got {layers}")
        if len(widths) != 3 or sorted(widths) != list(widths) or widths[0] < 1:
            raise ValueError(f"widths must be three growing numbers, got {tuple(widths)}")
        before = widths[0]
        stem = [nn.Conv2d(in_channels, before, 3, 1, 1, bias=not norm), nn.BatchNorm2d(before)]
        self.stem = nn.Sequential(*stem[: 1 + norm], nn.ReLU())
        stages = []
        for i, width in enumerate(widths):
            blocks = []
            for j in range((layers - 2) // 6):
                blocks.append(BasicBlock(before, width, stride=2 if i and not j else 1, norm=norm))
                before = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))  # (N, K)
