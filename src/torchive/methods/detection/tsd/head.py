"""The second stage: where the class and the box are looked for, and the two branches that look there."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from torchive.methods.detection.tsd.pooling import Points, pool_bins, pool_box


class TSDHead(nn.Module):
    """Pooled features of R regions, and the maps, to logits (R, K + 1), deltas (R, 4 (K + 1)) and the moved boxes
    (R, 4) that the deltas are relative to.

    Args:
        channels: C of the maps.
        num_classes: K.
        hidden: of the two layers of each branch.
        inter_channels: of the layers that choose the places.
        size: side of the pooled features.
        gamma: a shift of one is this share of the box's side.
        samples: points along each side of a bin.
        points: "centres", as RoIAlign, or "release".
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 1024,
        inter_channels: int = 256,
        size: int = 7,
        gamma: float = 0.1,
        samples: int = 4,
        points: Points = "centres",
    ) -> None:
        super().__init__()
        self.size, self.gamma, self.samples, self.points = size, gamma, samples, points
        self.shared = nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, inter_channels), nn.ReLU())
        self.shift_class = _two_layers(inter_channels, 2 * size**2)
        self.shift_box = _two_layers(inter_channels, 2)
        self.class_branch = TwoMLPHead(channels * size**2, hidden)
        self.box_branch = TwoMLPHead(channels * size**2, hidden)
        self.class_score = nn.Linear(hidden, num_classes + 1)
        self.box_delta = nn.Linear(hidden, 4 * (num_classes + 1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(
        self, pooled: Tensor, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, image: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``pooled`` (R, C, size, size) of the boxes (R, 4), in pixels of the images ``image`` (R,)."""
        of_class, of_box = self.shifts(pooled)
        options = {"size": self.size, "samples": self.samples, "points": self.points}
        seen = pool_bins(maps, strides, boxes, image, of_class, **options)  # type: ignore[arg-type]
        logits = self.class_score(self.class_branch(seen))
        seen = pool_box(maps, strides, boxes, image, of_box, **options)  # type: ignore[arg-type]
        return logits, self.box_delta(self.box_branch(seen)), move(boxes, of_box)

    def shifts(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Of the bins (R, 2, size, size) and of the whole box (R, 2), as shares of the box's width and height."""
        x = self.shared(pooled)
        of_class = self.shift_class(x).unflatten(1, (2, self.size, self.size))
        return self.gamma * of_class, self.gamma * self.shift_box(x)


def move(boxes: Tensor, shift: Tensor) -> Tensor:
    """Boxes (R, 4) moved by ``shift`` (R, 2) as shares of their sides (eq. 3)."""
    return boxes + (shift.to(boxes.dtype) * (boxes[:, 2:] - boxes[:, :2])).repeat(1, 2)


class SeparateHead(nn.Module):
    """Two layers for the class and two for the box of the same features: the paper's baseline of two heads.

    Args:
        channels, num_classes, hidden, size: as of ``TSDHead``.
    """

    def __init__(self, channels: int, num_classes: int, *, hidden: int = 1024, size: int = 7) -> None:
        super().__init__()
        self.class_branch = TwoMLPHead(channels * size**2, hidden)
        self.box_branch = TwoMLPHead(channels * size**2, hidden)
        self.class_score = nn.Linear(hidden, num_classes + 1)
        self.box_delta = nn.Linear(hidden, 4 * (num_classes + 1))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and deltas (R, 4 (K + 1))."""
        return self.class_score(self.class_branch(pooled)), self.box_delta(self.box_branch(pooled))


class SiblingHead(nn.Module):
    """The ordinary head: two layers for both (eq. 1).

    Args:
        channels, num_classes, hidden, size: as of ``TSDHead``.
    """

    def __init__(self, channels: int, num_classes: int, *, hidden: int = 1024, size: int = 7) -> None:
        super().__init__()
        self.branch = TwoMLPHead(channels * size**2, hidden)
        self.class_score = nn.Linear(hidden, num_classes + 1)
        self.box_delta = nn.Linear(hidden, 4 * (num_classes + 1))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and deltas (R, 4 (K + 1))."""
        x = self.branch(pooled)
        return self.class_score(x), self.box_delta(x)


def _two_layers(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, outputs))
