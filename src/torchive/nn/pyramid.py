"""Feature maps for detectors: one map of stride 16, or a feature pyramid over any backbone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

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
    """torchvision's feature pyramid over a backbone's maps: images (N, C, H, W) to maps of C', finest first.

    Lin et al., "Feature Pyramid Networks", CVPR 2017, arXiv:1612.03144.

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        in_channels: C, for a named backbone.
        channels: of every map.
        finest: stride of the finest map that is taken; 4 for regions, 8 for dense detectors. Of maps of one stride,
            as a vision transformer's are, the last is taken.
        top: what stands on the coarsest map: "pool", one map of every other cell, as for region proposals;
            "convolutions", two maps by convolutions of stride 2, as for dense detectors; or "none".

    Raises:
        ValueError: the backbone has no map of stride ``finest`` or more, or another ``top``.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        in_channels: int = 3,
        channels: int = 256,
        finest: int = 4,
        top: Literal["pool", "convolutions", "none"] = "pool",
    ) -> None:
        super().__init__()
        if top not in ("pool", "convolutions", "none"):
            raise ValueError(f"top must be pool, convolutions or none, got {top!r}")
        self.body = build_features(backbone, in_channels=in_channels)
        levels: Sequence[Level] = self.body.levels  # type: ignore[assignment]
        last = {level.stride: k for k, level in enumerate(levels) if level.stride >= finest}
        self.kept = list(last.values())
        if not self.kept:
            raise ValueError(
                f"a pyramid needs a map of stride {finest} or more, the strides are {[v.stride for v in levels]}"
            )
        extra = {
            "pool": LastLevelMaxPool,
            "convolutions": partial(LastLevelP6P7, channels, channels),
            "none": lambda: None,
        }[top]()
        self.fpn = FeaturePyramidNetwork([levels[k].channels for k in self.kept], channels, extra)
        strides = [levels[k].stride for k in self.kept]
        strides += [strides[-1] * 2 ** (k + 1) for k in range({"pool": 1, "convolutions": 2, "none": 0}[top])]
        self.levels = tuple(Level(channels, stride) for stride in strides)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        return list(self.fpn(OrderedDict((str(k), maps[k]) for k in self.kept)).values())
