"""A second classifier on an inner map, which helps deep networks to train and is not kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.network import build_features
from torchive.structures import Classification


class AuxiliaryHead(nn.Module):
    """Pool, 1x1 convolution to 128, one convolution to 768, linear layer: (N, C, H, W) to (N, K).

    The auxiliary head of Inception-v3 (arXiv:1512.00567) and NASNet (arXiv:1707.07012), whose second convolution covers
    what the pool leaves of their maps; here the mean is taken over positions that are left.

    Args:
        in_channels: C.
        num_classes: K.
        pool: side of the mean pool, of stride 3; 1 for small maps, which are not pooled.
        kernel_size: side of the second convolution: 5 for a map of 17 x 17, 4 for 14 x 14, 1 for small ones.
        widths: channels of the two convolutions.

    Raises:
        ValueError: in ``forward``, a map that is too small.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        pool: int = 5,
        kernel_size: int = 5,
        widths: Sequence[int] = (128, 768),
    ) -> None:
        super().__init__()
        first, second = widths
        self.pool, self.smallest = pool, (pool + 3 * (kernel_size - 1) if pool > 1 else kernel_size)
        self.layers = nn.Sequential(
            *(nn.Conv2d(in_channels, first, 1, bias=False), nn.BatchNorm2d(first, eps=1e-3), nn.ReLU(inplace=True)),
            *(nn.Conv2d(first, second, kernel_size, bias=False), nn.BatchNorm2d(second, eps=1e-3)),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(f"each side must be at least {self.smallest}, got {tuple(x.shape[2:])}")
        x = F.avg_pool2d(x, self.pool, 3) if self.pool > 1 else x
        return self.classifier(self.layers(x).mean((2, 3)))  # (N, K)


class AuxiliaryClassifier(nn.Module):
    """A backbone with its classifier and an auxiliary one on the map before the coarsest, as a classification system.

    Args:
        backbone: a module with levels, ``timm/NAME`` or ``torchvision/NAME``.
        num_classes: K.
        in_channels: C, for a named backbone.
        drop: share of the averaged features that is dropped in training.
        weight: of the auxiliary loss, 0.3 to 0.4; zero builds no auxiliary head.
        pool, kernel_size, widths: of ``AuxiliaryHead``.
        loss: of (N, K) logits and (N,) classes, of both heads; cross-entropy if None.

    Raises:
        ValueError: an unknown backbone, a negative weight; in ``losses``, images whose inner map is too small.
    """

    task = "classification"

    def __init__(
        self,
        backbone: str | nn.Module,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop: float = 0.0,
        weight: float = 0.4,
        pool: int = 5,
        kernel_size: int = 5,
        widths: Sequence[int] = (128, 768),
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.backbone = build_features(backbone, in_channels=in_channels)
        levels = self.backbone.levels
        self.drop, self.weight = nn.Dropout(drop), weight
        self.head = nn.Linear(levels[-1].channels, num_classes)  # type: ignore[index,union-attr]
        self.auxiliary: AuxiliaryHead | None = None
        if weight:
            channels = levels[-2].channels  # type: ignore[index,union-attr]
            self.auxiliary = AuxiliaryHead(channels, num_classes, pool=pool, kernel_size=kernel_size, widths=widths)
        self.loss = nn.CrossEntropyLoss() if loss is None else loss

    def forward(self, inputs: Tensor) -> Tensor:
        return self._classify(self.backbone(inputs)[-1])  # (N, K)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``loss``, and ``auxiliary`` times its weight, of (N, C, H, W) images and (N,) classes."""
        *_, inner, last = self.backbone(inputs)
        found = {"loss": self.loss(self._classify(last), targets)}
        if self.auxiliary is not None:
            found["auxiliary"] = self.weight * self.loss(self.auxiliary(inner), targets)
        return found

    def predict(self, inputs: Tensor) -> Sequence[Classification]:
        """Softmax scores of the main classifier, one ``Classification`` per image."""
        return [Classification(scores) for scores in self(inputs).float().softmax(1)]

    def _classify(self, x: Tensor) -> Tensor:
        return self.head(self.drop(x.mean((2, 3))))
