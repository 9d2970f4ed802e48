"""Named backbones keep their promise: maps (N, C, H, W) as ``levels`` says."""

from __future__ import annotations

import pytest
import torch

from torchive.nn.network import build_features


@pytest.mark.parametrize("name", ["timm/swin_tiny_patch4_window7_224", "timm/test_resnet", "torchvision/resnet18"])
def test_maps_have_the_channels_on_axis_one(name: str) -> None:
    """Swin of timm gives maps with the channels last."""
    features = build_features(name, **({"img_size": 64} if "swin" in name else {})).eval()
    with torch.no_grad():
        maps = features(torch.rand(1, 3, 64, 96 if "swin" not in name else 64))
    assert [y.shape[1] for y in maps] == [level.channels for level in features.levels]
    assert [64 // y.shape[2] for y in maps] == [level.stride for level in features.levels]
