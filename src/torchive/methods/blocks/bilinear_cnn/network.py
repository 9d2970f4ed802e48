"""One or two networks under the head, for images and clips; VGG-M, the paper's smaller one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchive.methods.blocks.bilinear_cnn.head import BilinearHead
from torchive.nn.network import build_features
from torchive.protocols import Level


class VGGM(nn.Module):
    """The features of VGG-M up to relu5: (N, C, H, W) to [(N, 512, h, w)], 27 x 27 positions of 448 x 448 pixels.

    From Chatfield et al., "Return of the Devil in the Details", BMVC 2014, arXiv:1405.3531.

    Args:
        in_channels: C.
    """

    levels = (Level(512, 16),)

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 96, 7, 2),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(96, 256, 5, 2, 1),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(256, 512, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(512, 512, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(512, 512, 3, 1, 1),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.body(x)]


class BilinearNetwork(nn.Module):
    """Images (N, C, H, W) or clips (N, C, T, H, W) to (N, K) scores; the frames of a clip are pooled together.

    The defaults are the paper's B-CNN [D, D] with shared weights: VGG-D up to relu5_3, for images of 448 pixels. Its
    training has two stages: the classifier alone on frozen features (``freeze_features``), rate 1, then the whole with
    SGD, rate 0.001, momentum 0.9, weight decay 0.0005. The release takes Adam with 0.0001, and 0.01 for the classifier.

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        second: the second stream, likewise; None shares the first.
        num_classes: K.
        in_channels: C, for named backbones.
        level: which of a backbone's maps is pooled; -2 is relu5_3 of VGG-D.
        second_level: the same of the second stream; None takes ``level``.
        pooling: "bilinear", or "average" for the paper's baseline: mean over positions and a linear layer.
        options: those of ``BilinearHead``.
        backbone_options: further arguments of named timm backbones, such as ``output_stride``.

    Raises:
        ValueError: an unknown backbone or pooling, two streams to average; in ``forward``, an input of other axes.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "torchvision/vgg16",
        *,
        second: str | nn.Module | None = None,
        num_classes: int = 200,
        in_channels: int = 3,
        level: int = -2,
        second_level: int | None = None,
        pooling: str = "bilinear",
        options: dict[str, Any] | None = None,
        backbone_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("bilinear", "average") or (pooling == "average" and second is not None):
            raise ValueError(f"pooling must be bilinear, or average with one stream, got {pooling!r}")
        self.backbone = build_features(backbone, in_channels=in_channels, **(backbone_options or {}))
        self.level = level
        self.second: nn.Module | None = None
        self.second_level = level if second_level is None else second_level
        channels = _channels(self.backbone, level)
        if pooling == "average":
            self.head: nn.Module = nn.Linear(channels, num_classes)
            return
        head_options = dict(options or {})
        if second is not None:
            self.second = build_features(second, in_channels=in_channels)
            head_options["second_channels"] = _channels(self.second, self.second_level)
        self.head = BilinearHead(channels, num_classes, **head_options)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        if isinstance(self.head, nn.Linear):
            return self.head(maps[0].flatten(2).mean(2))
        return self.head(*maps)  # (N, K)

    def features(self, x: Tensor) -> list[Tensor]:
        """The one or two maps that are pooled, (N, D, h, w), or (N, D, T, h, w) of clips."""
        if x.ndim not in (4, 5):
            raise ValueError(f"expected (N, C, H, W) or (N, C, T, H, W), got shape {tuple(x.shape)}")
        frames = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x  # (N T, C, H, W)
        maps = [self.backbone(frames)[self.level]]
        if self.second is not None:
            maps.append(self.second(frames)[self.second_level])
        if x.ndim == 4:
            return maps
        return [m.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2) for m in maps]

    def descriptor(self, x: Tensor) -> Tensor:
        """The head's descriptors (N, F), each the mean over an image and its mirror image, as in the paper."""
        if not isinstance(self.head, BilinearHead):
            raise ValueError("expected pooling='bilinear', got 'average'")
        return (self.head.descriptor(*self.features(x)) + self.head.descriptor(*self.features(x.flip(-1)))) / 2

    def freeze_features(self, frozen: bool = True) -> None:
        """Train the head alone, the first of the paper's two stages; or, with False, the whole again."""
        for name, parameter in self.named_parameters():
            if not name.startswith("head."):
                parameter.requires_grad_(not frozen)


def _channels(backbone: nn.Module, level: int) -> int:
    levels: Any = backbone.levels
    if not -len(levels) <= level < len(levels):
        raise ValueError(f"level must be one of {len(levels)} levels, got {level}")
    return int(levels[level].channels)
