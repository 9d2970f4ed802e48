"""The network: backbone, pyramid, decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.segmentation.pan_pyramid_attention.fpa import FeaturePyramidAttention
from torchive.methods.segmentation.pan_pyramid_attention.gau import GlobalAttentionUpsample
from torchive.nn.fcn import Norm
from torchive.nn.network import build_features
from torchive.nn.pixel_cross_entropy import PixelCrossEntropy
from torchive.nn.unet import resize, segmentations
from torchive.structures import Segmentation


class PyramidAttentionNetwork(nn.Module):
    """Images (N, C, H, W) to logits (N, K, H, W), any size, as a segmentation system.

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``; its last four maps are used.
        num_classes: K, background included.
        in_channels: C, for a named backbone.
        width: channels of the decoder; K as in the paper if None, 32 in the common library.
        pyramid_channels, kernels, pool, global_branch: of the ``FeaturePyramidAttention``.
        gate, act, fusion: of each ``GlobalAttentionUpsample``.
        norm: normalisation in both: a function of the number of channels.
        align_corners: how linear resizing treats the borders.
        loss: of (N, K, H, W) logits and (N, H, W) classes; cross-entropy that ignores 255 if None.
        options: further arguments of a named backbone; None is output stride 16 for one of timm.

    Raises:
        ValueError: ``num_classes`` below two, a backbone that is unknown or has fewer than two maps, or a bad option of
            a part.
    """

    task = "segmentation"

    def __init__(
        self,
        backbone: str | nn.Module = "timm/resnet101",
        *,
        num_classes: int = 2,
        in_channels: int = 3,
        width: int | None = None,
        pyramid_channels: int = 1,
        kernels: Sequence[int] = (7, 5, 3),
        pool: Literal["max", "average", "stride"] = "max",
        global_branch: bool = True,
        gate: Literal["channel", "spatial", "none"] = "channel",
        act: Callable[[], nn.Module] = nn.ReLU,
        fusion: Literal["add", "concat"] = "add",
        norm: Norm = nn.BatchNorm2d,
        align_corners: bool = True,
        loss: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and must be >= 2, got {num_classes}")
        if options is None:
            options = {"output_stride": 16} if isinstance(backbone, str) and backbone.startswith("timm/") else {}
        self.backbone = build_features(backbone, in_channels=in_channels, **options)
        *finer, deepest = self.backbone.levels[-4:]  # type: ignore[index]
        if not finer:
            raise ValueError("the decoder needs a backbone with two or more maps, got 1")
        channels = num_classes if width is None else width
        self.pyramid = FeaturePyramidAttention(
            deepest.channels,
            channels,
            pyramid_channels=pyramid_channels,
            kernels=kernels,
            pool=pool,
            global_branch=global_branch,
            norm=norm,
            align_corners=align_corners,
        )
        self.decoder = nn.ModuleList(  # coarsest first
            GlobalAttentionUpsample(
                level.channels, channels, gate=gate, act=act, fusion=fusion, norm=norm, align_corners=align_corners
            )
            for level in reversed(finer)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)
        self.align_corners = align_corners
        self.loss = PixelCrossEntropy() if loss is None else loss

    def forward(self, inputs: Tensor) -> Tensor:
        *finer, deepest = self.backbone(inputs)[-len(self.decoder) - 1 :]
        y = self.pyramid(deepest)
        for step, low in zip(self.decoder, reversed(finer), strict=True):
            y = step(low, y)
        return resize(self.classifier(y), inputs.shape[2:], self.align_corners)  # (N, K, H, W)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, of (N, C, H, W) images and (N, H, W) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor, *, scales: Sequence[float] = (1.0,), flip: bool = False) -> list[Segmentation]:
        """The class of each pixel with its scores, one ``Segmentation`` per image.

        Args:
            inputs: (N, C, H, W).
            scales: sizes, as shares of H and W, whose logits are averaged.
            flip: whether mirrored images are averaged in, too.

        Raises:
            ValueError: no scale, or one that is not above zero.
        """
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be numbers above zero, got {tuple(scales)}")
        size = inputs.shape[2:]
        logits = []
        for scale in scales:
            images = inputs
            if scale != 1:
                new = [max(round(side * scale), 1) for side in size]
                images = F.interpolate(inputs, size=new, mode="bilinear", align_corners=self.align_corners)
            logits.append(resize(self(images), size, self.align_corners))
            if flip:
                logits.append(resize(self(images.flip(3)).flip(3), size, self.align_corners))
        total = logits[0]
        for other in logits[1:]:
            total = total + other
        return segmentations(total / len(logits))
