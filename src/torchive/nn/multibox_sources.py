"""The maps under default boxes: VGG-16 with SSD's extra layers, or any backbone with as many as its size needs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import Conv2dNormActivation

from torchive.nn.network import build_features


class VGGSources(SSDFeatureExtractorVGG):
    """torchvision's VGG-16 for SSD, random weights: (N, C, S, S) to six maps (seven for 512 pixels), the first
    normalised.

    conv4_3 with L2 norm and a learnable scale of 20, fc7, then pairs of 1x1 and 3x3 convolutions.
    """

    smallest = 300

    def __init__(self, *, in_channels: int = 3, image_size: int = 300) -> None:
        layers: Any = make_layers(cfgs["D"])
        if in_channels != 3:
            layers[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        super().__init__(layers, highres=image_size >= 512)
        if (
            image_size >= 512
        ):  # Differs from torchvision, whose last maps have 6, 4 and 1 cells: the paper's have 4, 2 and 1
            for block in self.extra[3:5]:
                block[2].stride, block[2].padding = (2, 2), (1, 1)
            self.extra[5][2].padding = (1, 1)
        self.smallest = 512 if image_size >= 512 else 300
        self.channels = (512, 1024, 512, 256, 256, 256, 256)[: 1 + len(self.extra)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(super().forward(x).values())


class PyramidSources(nn.Module):
    """Any backbone's maps from stride 8 on, then 3x3 convolutions of stride two down to one cell at ``image_size``.

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        in_channels: C.
        image_size: side of the image.
        width: of the 1x1 convolutions between; an added map has twice as many channels.
        lite: whether the added 3x3 convolutions are depthwise with a 1x1 one after them, as in SSDLite.

    Raises:
        ValueError: the backbone has no map of stride 8 or more.
    """

    smallest = 1

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        in_channels: int = 3,
        image_size: int = 128,
        width: int = 128,
        lite: bool = False,
    ) -> None:
        super().__init__()
        self.body = build_features(backbone, in_channels=in_channels)
        levels: Sequence[Any] = self.body.levels  # type: ignore[assignment]
        self.kept = [k for k, level in enumerate(levels) if level.stride >= 8]
        if not self.kept:
            raise ValueError(
                f"default boxes need a map of stride 8 or more, the backbone's strides are {[v.stride for v in levels]}"
            )
        channels = [levels[k].channels for k in self.kept]
        cells = -(-image_size // levels[-1].stride)
        self.extra = nn.ModuleList()
        block = _separable if lite else _dense
        while cells > 1 and len(channels) < 6:
            self.extra.append(block(channels[-1], width))
            channels.append(2 * width)
            cells = -(-cells // 2)
        for layer in self.extra.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.channels = tuple(channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = self.body(x)
        maps = [levels[k] for k in self.kept]
        for block in self.extra:
            maps.append(block(maps[-1]))
        return maps


def _dense(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
    )


def _separable(channels: int, width: int) -> nn.Sequential:
    layer = partial(Conv2dNormActivation, activation_layer=nn.ReLU6)
    return nn.Sequential(
        layer(channels, width, 1), layer(width, width, 3, stride=2, groups=width), layer(width, 2 * width, 1)
    )
