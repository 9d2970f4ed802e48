"""U-Net in two and three dimensions: its encoder, its decoder step, its heads, and the plain network as a system."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.dice import SoftDiceLoss
from torchive.structures import Segmentation

WIDTHS = (16, 32, 64, 128, 256)


def conv_nd(ndim: int) -> Callable[..., nn.Module]:
    """``nn.Conv2d`` or ``nn.Conv3d``.

    Raises:
        ValueError: ``ndim`` is neither 2 nor 3.
    """
    if ndim not in (2, 3):
        raise ValueError(f"ndim must be 2 or 3, got {ndim}")
    return nn.Conv2d if ndim == 2 else nn.Conv3d


def norm_nd(ndim: int) -> Callable[..., nn.Module]:
    """``nn.BatchNorm2d`` or ``nn.BatchNorm3d``."""
    return nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """(N, C, *S) to (N, C, *size), bilinear or trilinear; the tensor itself where the size is right already."""
    if x.shape[2:] == torch.Size(size):
        return x
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=align_corners)


def init_kaiming(module: nn.Module) -> None:
    """Kaiming's normal initialisation (fan in) of each convolution inside; biases at zero."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class DoubleConv(nn.Sequential):
    """Two times 3x3(x3) convolution, batch norm and ReLU: (N, in, *S) to (N, out, *S)."""

    def __init__(self, in_channels: int, out_channels: int, *, ndim: int = 2) -> None:
        conv, norm = conv_nd(ndim), norm_nd(ndim)
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [conv(channels, out_channels, 3, padding=1), norm(out_channels), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNetEncoder(nn.Module):
    """(N, C, *S) to one map per width, finest first, each half the size of the one before (rounded down).

    Raises:
        ValueError: fewer than two widths; in ``forward``, an input of another rank, with other channels, or with a
            side below ``2 ** (len(widths) - 1)``.
    """

    def __init__(self, in_channels: int, widths: Sequence[int] = WIDTHS, *, ndim: int = 2) -> None:
        super().__init__()
        conv_nd(ndim)
        if len(widths) < 2 or min(widths) < 1 or in_channels < 1:
            raise ValueError(
                f"expected in_channels >= 1 and two or more widths >= 1, got {in_channels} and {tuple(widths)}"
            )
        self.in_channels, self.ndim, self.smallest = in_channels, ndim, 2 ** (len(widths) - 1)
        pairs = zip((in_channels, *widths), widths, strict=False)
        self.blocks = nn.ModuleList(DoubleConv(a, b, ndim=ndim) for a, b in pairs)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != self.ndim + 2 or x.shape[1] != self.in_channels:
            axes = "H, W" if self.ndim == 2 else "D, H, W"
            raise ValueError(f"expected (N, {self.in_channels}, {axes}), got shape {tuple(x.shape)}")
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(f"each side must be at least {self.smallest}, got {tuple(x.shape[2:])}")
        pool = F.max_pool2d if self.ndim == 2 else F.max_pool3d
        maps: list[Tensor] = []
        for block in self.blocks:
            x = block(pool(x, 2) if maps else x)
            maps.append(x)
        return maps


class UpStep(nn.Module):
    """One decoder level: the map below, resized to the skip's size and joined to it, goes through two convolutions."""

    def __init__(self, skip_channels: int, below_channels: int, *, ndim: int = 2, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.conv = DoubleConv(skip_channels + below_channels, skip_channels, ndim=ndim)

    def forward(self, skip: Tensor, below: Tensor) -> Tensor:
        below = resize(below, skip.shape[2:], self.align_corners)
        return self.conv(torch.cat([skip, below], 1))  # (N, skip_channels, *S)


class SupervisedHead(nn.Module):
    """Decoder maps, finest first, to logits (N, K, *S) at the finest size.

    With ``deep_supervision`` each map gets a 1x1 head; the logit maps are resized, concatenated and fused by a 1x1
    convolution, so that one loss on the result reaches each level directly. Otherwise one 1x1 head on the finest map.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        ndim: int = 2,
        deep_supervision: bool = True,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        conv = conv_nd(ndim)
        self.align_corners = align_corners
        heads = widths if deep_supervision else widths[:1]
        self.heads = nn.ModuleList(conv(width, num_classes, 1) for width in heads)
        self.fuse = conv(num_classes * len(heads), num_classes, 1) if deep_supervision else None

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        logits = [resize(head(x), size, self.align_corners) for head, x in zip(self.heads, maps, strict=False)]
        return logits[0] if self.fuse is None else self.fuse(torch.cat(logits, 1))  # (N, K, *S)


class UNet(nn.Module):
    """Plain U-Net as a segmentation system: (N, C, *S) to logits (N, K, *S), S any size of at least 16 a side by
    default.

    Ronneberger et al., MICCAI 2015, arXiv:1505.04597, in the form that the attention U-Net is measured against: padded
    convolutions, batch norm, linear upsampling and fused deep supervision.

    Args:
        num_classes: K, background included.
        in_channels: C.
        widths: channels of each level, finest first; the last is the bottleneck.
        ndim: 2 or 3.
        deep_supervision: fuse the logits of all decoder levels.
        align_corners: how linear resizing treats the borders.
        loss: of (N, K, *S) logits and (N, *S) classes; soft Dice if None.

    Raises:
        ValueError: ``num_classes`` below two, ``ndim`` not 2 or 3, or unusable ``widths``.
    """

    task = "segmentation"

    def __init__(
        self,
        *,
        num_classes: int = 2,
        in_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        ndim: int = 2,
        deep_supervision: bool = True,
        align_corners: bool = False,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and must be >= 2, got {num_classes}")
        self.encoder = UNetEncoder(in_channels, widths, ndim=ndim)
        pairs = itertools.pairwise(widths)
        self.decoder = nn.ModuleList(UpStep(a, b, ndim=ndim, align_corners=align_corners) for a, b in pairs)
        self.head = SupervisedHead(
            widths[:-1], num_classes, ndim=ndim, deep_supervision=deep_supervision, align_corners=align_corners
        )
        self.loss = SoftDiceLoss() if loss is None else loss
        init_kaiming(self)

    def forward(self, inputs: Tensor) -> Tensor:
        *skips, x = self.encoder(inputs)
        maps: list[Tensor] = []
        for step, skip in zip(reversed(self.decoder), reversed(skips), strict=True):
            x = step(skip, x)
            maps.insert(0, x)
        return self.head(maps)  # (N, K, *S)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, of (N, C, *S) images and (N, *S) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> list[Segmentation]:
        """The class of each pixel with its scores, one ``Segmentation`` per image."""
        return segmentations(self(inputs))


def segmentations(logits: Tensor) -> list[Segmentation]:
    """(N, K, *S) logits to one ``Segmentation`` per image."""
    scores = logits.float().softmax(1)
    return [Segmentation(labels, s) for labels, s in zip(scores.argmax(1), scores, strict=True)]


def unet_of_size(parameters: int, *, widths: Sequence[int] = WIDTHS, **options: Any) -> UNet:
    """The plain U-Net whose parameter count is nearest to ``parameters``: ``widths`` scaled by one factor.

    The baseline that separates what a gate does from what more parameters do. ``options`` go to ``UNet``.

    Raises:
        ValueError: ``parameters`` below one.
    """
    if parameters < 1:
        raise ValueError(f"parameters must be >= 1, got {parameters}")

    def scaled(bottom: int) -> tuple[int, ...]:
        return tuple(max(round(width * bottom / widths[-1]), 1) for width in widths)

    def count(bottom: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in UNet(widths=scaled(bottom), **options).parameters())

    low, high = 1, 1
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    best = min((low, high), key=lambda bottom: abs(count(bottom) - parameters))
    return UNet(widths=scaled(best), **options)
