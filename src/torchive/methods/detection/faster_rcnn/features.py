"""Feature maps for Faster R-CNN: one map of stride 16, or a feature pyramid over any backbone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from torchive.nn.network import build_features
from torchive.protocols import Level


class VGGFeatures(nn.Module):
    """VGG-16 up to conv5_3, random weights: (N, C, H, W) to one map of 512 channels and stride 16."""

    levels = (Level(512, 16),)

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        layers: Any = make_layers(cfgs["D"])[:-1]  # without the last pooling
        if in_channels != 3:
            layers[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.body = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x)]


class SingleMap(nn.Module):
    """The map of stride 16 of any backbone, as a list of one.

    Raises:
        ValueError: the backbone has no map of stride 16.
    """

    def __init__(self, backbone: str | nn.Module, in_channels: int = 3) -> None:
        super().__init__()
        self.body = build_features(backbone, in_channels=in_channels)
        levels: Sequence[Level] = self.body.levels  # type: ignore[assignment]
        fitting = [k for k, level in enumerate(levels) if level.stride == 16]
        if not fitting:
            raise ValueError(
                f"expected a backbone with a map of stride 16, its strides are {[v.stride for v in levels]}"
            )
        self.index = fitting[-1]
        self.levels = (levels[self.index],)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x)[self.index]]


class Pyramid(nn.Module):
    """torchvision's feature pyramid over a backbone's maps of stride 4 and more, with one pooled map on top.

    Raises:
        ValueError: the backbone has no map of stride 4 or more.
    """

    def __init__(self, backbone: str | nn.Module, *, in_channels: int = 3, channels: int = 256) -> None:
        super().__init__()
        self.body = build_features(backbone, in_channels=in_channels)
        levels: Sequence[Level] = self.body.levels  # type: ignore[assignment]
        self.kept = [k for k, level in enumerate(levels) if level.stride >= 4]
        if not self.kept:
            raise ValueError(f"a pyramid needs a map of stride 4 or more, the strides are {[v.stride for v in levels]}")
        self.fpn = FeaturePyramidNetwork([levels[k].channels for k in self.kept], channels, LastLevelMaxPool())
        strides = [levels[k].stride for k in self.kept]
        self.levels = tuple(Level(channels, stride) for stride in [*strides, 2 * strides[-1]])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        return list(self.fpn(OrderedDict((str(k), maps[k]) for k in self.kept)).values())
