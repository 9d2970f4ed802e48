"""An image network cut down to a feature vector: what representation learning trains and keeps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from torchive.nn.network import build_features, build_network
from torchive.nn.passes import eval_mode


class Encoder(nn.Module):
    """Images (N, C, H, W) to features (N, D); of maps the mean over positions is taken, of several maps the last one.

    Args:
        network: images to (N, D), to (N, D, h, w), or to a list of such maps.
        feature_dim: D.
    """

    def __init__(self, network: nn.Module, *, feature_dim: int) -> None:
        super().__init__()
        self.network, self.feature_dim = network, feature_dim

    def forward(self, inputs: Tensor) -> Tensor:
        return _pooled(self.network(inputs))


def build_encoder(
    backbone: str | nn.Module,
    *,
    in_channels: int = 3,
    stem: Literal["backbone", "small"] = "backbone",
    feature_dim: int | None = None,
) -> Encoder:
    """An encoder from ``timm/NAME``, ``torchvision/NAME`` or a module.

    Args:
        backbone: name or module.
        in_channels: C, for a named backbone.
        stem: "small" gives a ResNet a first convolution of 3 x 3 with stride 1 and takes its max pooling away.
        feature_dim: D; None finds it by a trial pass over one empty image of 64 pixels.

    Raises:
        ValueError: an unknown name or stem, a "small" stem for a network without ``conv1`` and ``maxpool``, or D cannot
            be found.
    """
    if isinstance(backbone, nn.Module):
        network = backbone
    elif backbone.startswith("timm/"):
        network = build_network(backbone, num_classes=0, in_channels=in_channels)
    else:
        network = build_features(backbone, in_channels=in_channels)
    if stem == "small":
        _shrink_stem(network)
    elif stem != "backbone":
        raise ValueError(f"stem must be backbone or small, got {stem!r}")
    return Encoder(network, feature_dim=feature_dim or _feature_dim(network, in_channels))


def _pooled(output: Tensor | list[Tensor]) -> Tensor:
    last = output[-1] if isinstance(output, list | tuple) else output
    return last.flatten(2).mean(2) if last.ndim > 2 else last


def _feature_dim(network: nn.Module, in_channels: int) -> int:
    first = next(network.parameters(), None)
    where = torch.get_default_device() if first is None else first.device
    try:
        with torch.no_grad(), eval_mode(network):
            return int(_pooled(network(torch.zeros(1, in_channels, 64, 64, device=where))).shape[1])
    except (RuntimeError, AssertionError, ValueError) as error:
        known = getattr(network, "num_features", None)
        if isinstance(known, int):
            return known
        raise ValueError(f"the length of the features cannot be found ({error}); give feature_dim") from None


def _shrink_stem(network: nn.Module) -> None:
    owner = next((part for part in network.modules() if hasattr(part, "conv1") and hasattr(part, "maxpool")), None)
    old = getattr(owner, "conv1", None)
    if owner is None or not isinstance(old, nn.Conv2d):
        raise ValueError(f"a small stem needs conv1 and maxpool as a ResNet has them; {type(network).__name__} has not")
    owner.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    owner.maxpool = nn.Identity()
