"""Any backbone with iterative aggregation over its maps, as a dense network."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from torchive.methods.backbones.dla.aggregation import fan_out_init
from torchive.methods.backbones.dla.network import DLA
from torchive.methods.backbones.dla.upsampling import BilinearUp, DLAUp, NestedUp, SumUp, cropped
from torchive.nn.network import build_features

DECODERS = ("ida", "sum", "nested", "none")


class DLASegmenter(nn.Module):
    """A backbone and a decoder as a dense network: (N, C, H, W) to logits (N, K, H, W), of any H and W.

    The maps of stride ``stride`` and above are joined at that stride, a 1x1 convolution gives the logits, and fixed
    bilinear upsampling brings them to the size of the image. ``torchive.nn.Segmenter`` makes a system of it.

    Args:
        backbone: a module with levels, ``timm/NAME`` or ``torchvision/NAME``; DLA-34 if None.
        num_classes: K.
        in_channels: C, for a named backbone or none.
        stride: pixels per cell where the maps are joined, the paper's 2 or 4.
        decoder: "ida" is the paper's; "sum" adds long skips as a feature pyramid does; "nested" is that of UNet++;
            "none" takes the coarsest map alone.

    Raises:
        ValueError: an unknown backbone or decoder, or a backbone without that stride or without a coarser map.
    """

    def __init__(
        self,
        backbone: str | nn.Module | None = None,
        *,
        num_classes: int = 19,
        in_channels: int = 3,
        stride: int = 4,
        decoder: Literal["ida", "sum", "nested", "none"] = "ida",
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        self.backbone = (
            DLA(in_channels=in_channels) if backbone is None else build_features(backbone, in_channels=in_channels)
        )
        levels = self.backbone.levels
        taken = [level for level in levels if level.stride >= stride]  # type: ignore[union-attr]
        if len(taken) < 2 or taken[0].stride != stride:
            raise ValueError(f"no map of stride {stride} below a coarser one; the backbone has {levels}")
        self.skipped = len(levels) - len(taken)  # type: ignore[arg-type]
        channels, strides = [level.channels for level in taken], [level.stride for level in taken]
        self.decoder: nn.Module
        if decoder == "ida":
            self.decoder = DLAUp(channels, strides=strides)
        elif decoder == "nested":
            self.decoder = NestedUp(channels, strides=strides)
        else:
            self.decoder = SumUp(channels, strides=strides, skips=decoder == "sum")
        self.head = nn.Conv2d(channels[0], num_classes, 1)
        fan_out_init(self.head)
        self.up = BilinearUp(num_classes, factor=stride, fixed=True)

    def forward(self, x: Tensor) -> Tensor:
        joined = self.decoder(self.backbone(x)[self.skipped :])  # (N, C_1, H / stride, W / stride)
        return cropped(self.up(self.head(joined)), x)  # (N, K, H, W)
