"""The networks: attention bottlenecks between poolings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.backbones.san_self_attention.attention import PairwiseAttention, PatchwiseAttention
from torchive.protocols import Level

#: Blocks of each stage of the paper's networks.
LAYERS: dict[str, tuple[int, ...]] = {"san10": (2, 1, 2, 4, 1), "san15": (3, 2, 3, 5, 2), "san19": (3, 3, 4, 6, 3)}
Kind = Literal["pairwise", "patchwise", "convolution"]


class _Bottleneck(nn.Module):
    """x + conv(relu(bn(mix(relu(bn(x)))))), where mix is attention, or a 3x3 convolution as the comparison."""

    def __init__(self, channels: int, kind: Kind, kernel_size: int, **options: Any) -> None:
        super().__init__()
        middle = channels // 4
        self.norm1 = nn.BatchNorm2d(channels)
        self.attention: nn.Module
        if kind == "convolution":
            self.attention = nn.Conv2d(channels, middle, 3, padding=1)
        else:
            cls = PairwiseAttention if kind == "pairwise" else PatchwiseAttention
            self.attention = cls(channels, middle, kernel_size=kernel_size, **options)
        self.norm2 = nn.BatchNorm2d(middle)
        self.out = nn.Conv2d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm1(x).relu())  # (N, C / 4, H, W)
        return self.out(self.norm2(y).relu()) + x


class _Stage(nn.Module):
    """Pooling by two, a 1x1 convolution to the stage's width, blocks, batch norm and ReLU."""

    def __init__(self, before: int, channels: int, blocks: int, kind: Kind, kernel_size: int, **options: Any) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = nn.Conv2d(before, channels, 1, bias=False)
        self.blocks = nn.Sequential(*(_Bottleneck(channels, kind, kernel_size, **options) for _ in range(blocks)))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(self.conv(self.pool(x)))).relu()


class SAN(nn.Module):
    """Images (N, C, H, W) to a map for each stage, strides 2, 4, 8, ..; SAN10 pairwise by default.

    Args:
        kind: "pairwise", "patchwise", or "convolution": 3x3 in the same blocks, for comparison.
        layers: blocks of each stage.
        widths: channels of each stage, multiples of 32 for the default ``share``.
        kernels: side of the footprint in each stage.
        in_channels: C.
        options: of the attention: ``relation``, ``share``, ``chunk``, ``position``.

    Raises:
        ValueError: lists of different lengths, an unknown ``kind``, or numbers that the attention refuses; in
            ``forward``, an input of other channels, or an image too small for the borders of the footprints.
    """

    def __init__(
        self,
        *,
        kind: Kind = "pairwise",
        layers: Sequence[int] = LAYERS["san10"],
        widths: Sequence[int] = (64, 256, 512, 1024, 2048),
        kernels: Sequence[int] = (3, 7, 7, 7, 7),
        in_channels: int = 3,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("pairwise", "patchwise", "convolution"):
            raise ValueError(f"kind must be pairwise, patchwise or convolution, got {kind!r}")
        if not len(layers) == len(widths) == len(kernels) > 0:
            raise ValueError(
                f"layers, widths and kernels differ in length: {len(layers)}, {len(widths)}, {len(kernels)}"
            )
        given = {} if kind == "convolution" else options or {}
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        before = (widths[0], *widths)
        self.stages = nn.ModuleList(
            _Stage(before[i], width, layers[i], kind, kernels[i], **given) for i, width in enumerate(widths)
        )
        self.levels = tuple(Level(width, 2 ** (i + 1)) for i, width in enumerate(widths))
        borders = [0 if kind == "convolution" or not n else k // 2 for k, n in zip(kernels, layers, strict=True)]
        self.smallest = max(2 ** (i + 1) * (border + 1) for i, border in enumerate(borders))

    def forward(self, x: Tensor) -> list[Tensor]:
        channels = self.stem[0].in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"expected (N, {channels}, H, W), got shape {tuple(x.shape)}")
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(f"expected images of at least {self.smallest} pixels a side, got shape {tuple(x.shape)}")
        y, maps = self.stem(x), []
        for stage in self.stages:
            y = stage(y)
            maps.append(y)
        return maps


class SANClassifier(nn.Module):
    """Images (N, C, H, W) to (N, K) logits: a ``SAN``, the mean over positions and a linear layer.

    Args:
        backbone: the ``SAN``; None builds one from ``options``.
        num_classes: K.
        in_channels: C, where ``backbone`` is None.
        options: arguments of ``SAN``.
    """

    def __init__(
        self,
        backbone: SAN | None = None,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = SAN(in_channels=in_channels, **(options or {})) if backbone is None else backbone
        self.head = nn.Linear(self.backbone.levels[-1].channels, num_classes)

    @classmethod
    def named(cls, name: str, *, num_classes: int = 1000, in_channels: int = 3, **options: Any) -> SANClassifier:
        """A network of the paper: ``san10_pairwise``, ``san15_patchwise`` and so on.

        Raises:
            ValueError: another name.
        """
        size, _, kind = name.partition("_")
        if size not in LAYERS or kind not in ("pairwise", "patchwise"):
            known = ", ".join(f"{size}_{kind}" for size in LAYERS for kind in ("pairwise", "patchwise"))
            raise ValueError(f"name must be one of {known}, got {name!r}")
        given = {"kind": kind, "layers": LAYERS[size], **options}
        return cls(num_classes=num_classes, in_channels=in_channels, options=given)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1].mean((2, 3)))  # (N, K)


_NAMES = (
    (r"^module\.", ""),
    (r"^fc\.", "head."),
    (r"^conv_in\.", "backbone.stem.0."),
    (r"^bn_in\.", "backbone.stem.1."),
    (r"^conv(\d)\.", r"backbone.stages.\1.conv."),
    (r"^bn(\d)\.", r"backbone.stages.\1.norm."),
    (r"^layer(\d)\.(\d+)\.bn1\.", r"backbone.stages.\1.blocks.\2.norm1."),
    (r"^layer(\d)\.(\d+)\.bn2\.", r"backbone.stages.\1.blocks.\2.norm2."),
    (r"^layer(\d)\.(\d+)\.conv\.", r"backbone.stages.\1.blocks.\2.out."),
    (r"^layer(\d)\.(\d+)\.sam\.conv_w\.", r"backbone.stages.\1.blocks.\2.attention.gamma."),
    (r"^layer(\d)\.(\d+)\.sam\.conv_p\.", r"backbone.stages.\1.blocks.\2.attention.place."),
    (r"^layer(\d)\.(\d+)\.sam\.conv1\.", r"backbone.stages.\1.blocks.\2.attention.phi."),
    (r"^layer(\d)\.(\d+)\.sam\.conv2\.", r"backbone.stages.\1.blocks.\2.attention.psi."),
    (r"^layer(\d)\.(\d+)\.sam\.conv3\.", r"backbone.stages.\1.blocks.\2.attention.beta."),
)


def load_release(network: SANClassifier, state: Mapping[str, Tensor]) -> None:
    """Load the weights of the authors' release, as their ``state_dict`` names them, into the same network.

    Raises:
        RuntimeError: the names or shapes do not fit, as ``load_state_dict`` says.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        for pattern, new in _NAMES:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    network.load_state_dict(renamed)
