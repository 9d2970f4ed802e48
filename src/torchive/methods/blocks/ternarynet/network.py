"""The paper's segmenter: a 2.5-D U-Net over a stack of slices, ternary between its first and its last layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.blocks.ternarynet.activation import TernaryTanh, Variant
from torchive.methods.blocks.ternarynet.convolution import Precision, TernaryConv2d, TernaryUnit
from torchive.nn.pixel_cross_entropy import PixelCrossEntropy
from torchive.nn.unet import segmentations
from torchive.structures import Segmentation


class TernaryUNet(nn.Module):
    """A stack of slices (N, C, H, W) to logits (N, K, H, W) of the middle one, H and W of any size.

    Three levels of two 3x3 convolutions, a bottom of two 1x1, three levels back; means of 2 x 2 down, linear upsampling
    up. Without ``padding`` convolutions lose their border: the input is framed by zeros once, so widely that the output
    covers it, and skips are cropped. The first convolution and the classifier keep full precision, and the last hidden
    activation is a ReLU.

    Args:
        num_classes: K, background included.
        in_channels: C, the slices.
        width: channels of the first map; others have 2, 4 and 8 times as many.
        precision: of the weights between first and last layer: "ternary", "binary" or "full".
        variant: of the activations, see ``TernaryTanh``; "relu" with full precision is the plain U-Net.
        slopes: first and last slope of the activations.
        padding: 0 as the paper, or 1: each 3x3 convolution keeps the size.
        reternarise: whether pooled and upsampled maps are made ternary again, in training and in test, so that the
            packed form handles one ternary map instead of three or five.
        align_corners: how linear upsampling treats the borders; True is the release's, and cannot be packed exactly.
        weight: of each class in the loss; 0.5 and 2.5 for two classes if None. ``[1, 1]`` weighs them equally.
        loss: of (N, K, H, W) logits and (N, H, W) classes, instead of the weighted cross-entropy.

    Raises:
        ValueError: ``num_classes`` below two, ``in_channels`` or ``width`` below one, ``padding`` not 0 or 1; in
            ``forward``, an input of another rank or with other channels.
    """

    task = "segmentation"

    def __init__(
        self,
        *,
        num_classes: int = 2,
        in_channels: int = 15,
        width: int = 32,
        precision: Precision = "ternary",
        variant: Variant = "smooth",
        slopes: tuple[float, float] = (3.0, 8.0),
        padding: Literal[0, 1] = 0,
        reternarise: bool = False,
        align_corners: bool = False,
        weight: Sequence[float] | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2 or min(in_channels, width) < 1:
            raise ValueError(
                f"expected num_classes >= 2, in_channels and width >= 1, got {num_classes}, {in_channels} and {width}"
            )
        if padding not in (0, 1):
            raise ValueError(f"padding must be 0 or 1, got {padding}")
        self.in_channels, self.padding, self.align_corners = in_channels, padding, align_corners

        def pair(c: int, middle: int, out: int, *, kernel: int = 3, ends: str = "") -> nn.Sequential:
            border = padding if kernel == 3 else 0
            first = TernaryConv2d(c, middle, kernel, padding=border, precision="full" if ends == "first" else precision)
            second = TernaryConv2d(middle, out, kernel, padding=border, precision=precision)
            return nn.Sequential(
                TernaryUnit(first, variant=variant, slopes=slopes),
                TernaryUnit(second, variant="relu" if ends == "last" else variant, slopes=slopes),
            )

        w = width
        self.down = nn.ModuleList(
            [pair(in_channels, w, 2 * w, ends="first"), pair(2 * w, 2 * w, 4 * w), pair(4 * w, 4 * w, 8 * w)]
        )
        self.bottom = pair(8 * w, 8 * w, 8 * w, kernel=1)
        self.up = nn.ModuleList(
            [pair(16 * w, 8 * w, 4 * w), pair(8 * w, 4 * w, 2 * w), pair(4 * w, 2 * w, 2 * w, ends="last")]
        )
        self.classifier = nn.Conv2d(2 * w, num_classes, 1)
        again = reternarise and variant != "relu"
        self.resampled = TernaryTanh(variant=variant, slopes=slopes) if again else nn.Identity()
        if loss is None:
            balance = (0.5, 2.5) if weight is None and num_classes == 2 else weight
            loss = PixelCrossEntropy(weight=balance)
        self.loss = loss
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain=math.sqrt(2))
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim != 4 or inputs.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(inputs.shape)}")
        height, width = inputs.shape[2:]
        top, bottom, left, right = *self._frame(height), *self._frame(width)
        x, skips = F.pad(inputs, (left, right, top, bottom)), []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
            x = self.resampled(F.avg_pool2d(x, 2))
        x = self.bottom(x)  # (N, 8w, h / 8, w / 8)
        for stage, skip in zip(self.up, reversed(skips), strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=self.align_corners)
            x = stage(torch.cat([self.resampled(x), _middle(skip, x.shape[2], x.shape[3])], 1))
        return _middle(self.classifier(x), height, width)  # (N, K, H, W)

    def _frame(self, size: int) -> tuple[int, int]:
        """Zeros before and behind one axis: 8 m + 28 cells for 8 m - 28 results, or a multiple of 8 with padding."""
        total = (size + 7) // 8 * 8 - size if self.padding else (size + 35) // 8 * 8 + 28 - size
        return total // 2, total - total // 2

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, of (N, C, H, W) slices and (N, H, W) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> list[Segmentation]:
        """The class of each pixel with its scores, one ``Segmentation`` per image."""
        return segmentations(self(inputs))


def _middle(x: Tensor, height: int, width: int) -> Tensor:
    """The middle of a map: (N, C, H, W) to (N, C, height, width)."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def slice_stacks(volume: Tensor, slices: int = 15, step: int = 2) -> tuple[Tensor, Tensor]:
    """A volume (H, W, D) to stacks (M, slices, H, W) of every ``step``-th slice, and the middle slice's index of each.

    Raises:
        ValueError: a volume that is not deep enough for one stack.
    """
    extent = (slices - 1) * step + 1
    if volume.ndim != 3 or volume.shape[2] < extent:
        raise ValueError(f"expected (H, W, D) with D >= {extent}, got shape {tuple(volume.shape)}")
    stacks = volume.unfold(2, extent, 1)[..., ::step]  # (H, W, M, slices)
    middles = torch.arange(stacks.shape[2], device=volume.device) + extent // 2
    return stacks.permute(2, 3, 0, 1), middles
