"""A fully convolutional network for segmentation: a backbone, one convolution, a classifier, bilinear upsampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchive.nn.network import build_features
from torchive.nn.pixel_cross_entropy import PixelCrossEntropy
from torchive.nn.unet import resize, segmentations
from torchive.structures import Segmentation

Norm = Callable[[int], nn.Module]  # a normalisation layer for so many channels


class FCN(nn.Module):
    """Images (N, C, H, W) to logits (N, K, H, W), from the coarsest map of a backbone, as a segmentation system.

    Long et al., CVPR 2015, arXiv:1411.4038, in the one-level form that context modules are measured against: what one
    gathers goes in after ``neck``, on a map (N, width, h, w).

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        num_classes: K, background included.
        in_channels: C, for a named backbone.
        width: channels after the first convolution; the second has half of them.
        drop: share of the channels that are dropped before the classifier in training.
        align_corners: how linear resizing treats the borders.
        loss: of (N, K, H, W) logits and (N, H, W) classes; cross-entropy that ignores 255 if None.
        options: further arguments of a named backbone, such as ``output_stride``.

    Raises:
        ValueError: ``num_classes`` below two, ``width`` below one, or an unknown backbone.
    """

    task = "segmentation"

    def __init__(
        self,
        backbone: str | nn.Module = "timm/resnet101",
        *,
        num_classes: int = 2,
        in_channels: int = 3,
        width: int = 512,
        drop: float = 0.1,
        align_corners: bool = True,
        loss: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2 or width < 1:
            raise ValueError(f"num_classes must be >= 2 and width >= 1, got {num_classes} and {width}")
        self.backbone = build_features(backbone, in_channels=in_channels, **(options or {}))
        channels = self.backbone.levels[-1].channels  # type: ignore[index,union-attr]
        half = max(width // 2, 1)
        self.align_corners = align_corners
        self.neck = conv_norm_act(channels, width, 3)
        self.head = nn.Sequential(conv_norm_act(width, half, 3), nn.Dropout2d(drop), nn.Conv2d(half, num_classes, 1))
        self.loss = PixelCrossEntropy() if loss is None else loss

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.head(self.neck(self.backbone(inputs)[-1]))
        return resize(logits, inputs.shape[2:], self.align_corners)  # (N, K, H, W)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, of (N, C, H, W) images and (N, H, W) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> list[Segmentation]:
        """The class of each pixel with its scores, one ``Segmentation`` per image."""
        return segmentations(self(inputs))


def conv_norm_act(
    in_channels: int, out_channels: int, kernel_size: int, norm: Norm = nn.BatchNorm2d, *, stride: int = 1
) -> nn.Sequential:
    """Convolution without bias, norm and ReLU; the size is kept, or halved (rounded up) by a stride of two."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU(inplace=True))
