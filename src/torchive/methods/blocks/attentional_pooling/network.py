"""A backbone with the head in the place of mean pooling and linear layer, for images and clips."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchive.methods.blocks.attentional_pooling.head import AttentionalPooling
from torchive.methods.blocks.attentional_pooling.pose import PoseAttentionalPooling
from torchive.nn.network import build_features


class AttentionalNetwork(nn.Module):
    """Images (N, C, H, W) or clips (N, C, T, H, W) to (N, K) scores; those of a clip are the mean over its frames.

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``; its coarsest map is pooled.
        num_classes: K.
        in_channels: C, for a named backbone.
        keypoints: J of the pose-regularised head; 0 for the plain one.
        options: those of ``AttentionalPooling``, such as ``rank`` and ``drop``.

    Raises:
        ValueError: an unknown backbone; in ``forward``, an input of another number of axes.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "timm/resnet101",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        keypoints: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_features(backbone, in_channels=in_channels)
        channels = self.backbone.levels[-1].channels  # type: ignore[index,union-attr]
        self.head: AttentionalPooling | PoseAttentionalPooling
        if keypoints:
            self.head = PoseAttentionalPooling(channels, num_classes, keypoints=keypoints, **(options or {}))
        else:
            self.head = AttentionalPooling(channels, num_classes, **(options or {}))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (4, 5):
            raise ValueError(f"expected (N, C, H, W) or (N, C, T, H, W), got shape {tuple(x.shape)}")
        if x.ndim == 4:
            return self.head(self.features(x))  # (N, K)
        frames = x.transpose(1, 2)  # (N, T, C, H, W)
        return self.head(self.features(frames.flatten(0, 1))).unflatten(0, frames.shape[:2]).mean(1)

    def features(self, x: Tensor) -> Tensor:
        """The map that the head pools: (N, C, H, W) to (N, D, h, w)."""
        return self.backbone(x)[-1]
