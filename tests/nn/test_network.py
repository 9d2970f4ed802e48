"""Named backbones keep their promise: maps (N, C, H, W) as ``levels`` says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchive.engine.export import keeps_size
from torchive.nn.network import build_features
from torchive.nn.pyramid import Pyramid
from torchive.protocols import Level


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm/swin_tiny_patch4_window7_224", (64, 96)), ("timm/vit_tiny_patch16_224.augreg_in21k", (50, 70))],
)
def test_transformers_take_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    features = build_features(name).eval()
    assert keeps_size(features) == ("swin" in name)
    with torch.no_grad():
        maps = features(torch.rand(2, 3, *size))
    for y, level in zip(maps, features.levels, strict=True):
        assert y.shape == (2, level.channels, *(-(-side // level.stride) for side in size))


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/resnet18"])
def test_maps_are_as_levels_says(name: str) -> None:
    features = build_features(name).eval()
    with torch.no_grad():
        maps = features(torch.rand(1, 3, 64, 96))
    assert [y.shape[1] for y in maps] == [level.channels for level in features.levels]
    assert [64 // y.shape[2] for y in maps] == [level.stride for level in features.levels]


class TwoAlike(nn.Module):
    """Maps of strides 8, 16 and 16."""

    levels = (Level(2, 8), Level(3, 16), Level(4, 16))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x.new_full((len(x), v.channels, 64 // v.stride, 64 // v.stride), v.channels) for v in self.levels]


def test_of_maps_of_one_stride_a_pyramid_takes_the_last() -> None:
    pyramid = Pyramid(TwoAlike(), channels=8, top="none")
    assert [level.stride for level in pyramid.levels] == [8, 16]
    assert [block[0].in_channels for block in pyramid.fpn.inner_blocks] == [2, 4]
    assert [m.shape[2] for m in pyramid(torch.zeros(1, 3, 64, 64))] == [8, 4]
