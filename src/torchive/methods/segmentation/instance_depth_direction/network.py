"""FCN-8s over VGG-16 or any other backbone: three groups of logits for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from torchive.nn.network import build_features
from torchive.protocols import Level


class VGGTrunk(nn.Module):
    """VGG-16 as FCN-8s reads it, random weights: (N, C, H, W) to pool3, pool4 and fc7, of strides 8, 16 and 32.

    The fully connected layers are convolutions of 7 x 7 and 1 x 1 (Long et al., CVPR 2015, arXiv:1411.4038).
    """

    levels = (Level(256, 8), Level(512, 16), Level(4096, 32))

    def __init__(self, in_channels: int = 3, *, drop: float = 0.5) -> None:
        super().__init__()
        layers: Any = list(make_layers(cfgs["D"]))
        if in_channels != 3:
            layers[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
        ends = [k + 1 for k, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        self.first = nn.Sequential(*layers[: ends[2]])
        self.second = nn.Sequential(*layers[ends[2] : ends[3]])
        self.third = nn.Sequential(
            *layers[ends[3] :],
            nn.Conv2d(512, 4096, 7, padding=3),
            nn.ReLU(inplace=True),
            nn.Dropout(drop),
            nn.Conv2d(4096, 4096, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(drop),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> list[Tensor]:
        pool3 = self.first(x)
        pool4 = self.second(pool3)
        return [pool3, pool4, self.third(pool4)]


class FCN8s(nn.Module):
    """Images (N, C, H, W) to groups of logits (N, k, H, W), one for each entry of ``outputs``.

    The maps are brought to one width, the coarsest is doubled in size and the next one added until the finest stride is
    reached; only then are the groups read, by 1 x 1 convolutions, and upsampled bilinearly. So another number of
    classes leaves the upsampling layers as they are.

    Args:
        backbone: "vgg16", ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        outputs: name and number of channels of each group.
        in_channels: C.
        width: channels between the backbone and the groups.
        finest: stride of the finest map that is read.
        drop: share of the activations of VGG-16's last layers that are dropped in training.

    Raises:
        ValueError: the backbone has no such map, or its strides do not double.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        outputs: dict[str, int],
        *,
        in_channels: int = 3,
        width: int = 100,
        finest: int = 8,
        drop: float = 0.5,
    ) -> None:
        super().__init__()
        if backbone == "vgg16":
            self.body: nn.Module = VGGTrunk(in_channels, drop=drop)
        else:
            self.body = build_features(backbone, in_channels=in_channels)
        levels: Sequence[Level] = self.body.levels  # type: ignore[assignment]
        self.kept = [k for k, level in enumerate(levels) if level.stride >= finest]
        strides = [levels[k].stride for k in self.kept]
        if not strides:
            raise ValueError(f"expected a map of stride {finest} or more, the strides are {[v.stride for v in levels]}")
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(f"the backbone's strides must double from map to map, got {strides}")
        self.stride, self.divisor = strides[0], strides[-1]
        self.scores = nn.ModuleList(nn.Conv2d(levels[k].channels, width, 1) for k in self.kept)
        self.doubled = nn.ModuleList(nn.ConvTranspose2d(width, width, 4, 2, 1) for _ in strides[1:])
        self.heads = nn.ModuleDict({name: nn.Conv2d(width, channels, 1) for name, channels in outputs.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        y = self.scores[-1](maps[self.kept[-1]])
        for k in range(len(self.doubled) - 1, -1, -1):
            y = self.doubled[k](y) + self.scores[k](maps[self.kept[k]])
        raw = {name: head(y) for name, head in self.heads.items()}
        return {name: F.interpolate(v, scale_factor=self.stride, mode="bilinear") for name, v in raw.items()}
