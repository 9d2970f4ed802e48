"""Class activation maps beside the region proposals: their losses, and how they rank the proposals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CamBranch(nn.Module):
    """Maps (N, C, h, w) to class activation maps (N, K, h, w), with the same layers at every level."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, num_classes, 1)
        for layer in (self.conv, self.out):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.out(self.conv(x).relu()) for x in maps]


def image_loss(cams: Sequence[Tensor], present: Tensor, kind: Literal["softmax", "sigmoid"] = "softmax") -> Tensor:
    """What the maps' means say of the classes, mean over the images that show any.

    Args:
        cams: (N, K, h, w) of each level; a class's score is the mean over positions, then over levels.
        present: (N, K), 1 for each class that an image shows.
        kind: "softmax" against ``present`` over its sum, or a "sigmoid" for each class, over all images.
    """
    score = torch.stack([cam.mean((2, 3)) for cam in cams]).mean(0)  # (N, K)
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(score, present.to(score))
    total = present.sum(1)
    each = -(score.log_softmax(1) * (present / total.clamp(min=1)[:, None]).to(score)).sum(1)  # 0 where total is 0
    return each.sum() / (total > 0).sum().clamp(min=1)


def heat_map(
    target: dict[str, Tensor], grid: Sequence[int], stride: int, num_classes: int, centre_ratio: float
) -> Tensor:
    """Which cells (K, h, w) have their centre in a box of the class; of its sides ``centre_ratio`` counts."""
    boxes = target["boxes"]
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) * centre_ratio / 2
    low, high = centre - half, centre + half
    inside = []
    for axis, length in ((1, grid[0]), (0, grid[1])):
        at = (torch.arange(length, device=boxes.device) + 0.5) * stride
        inside.append(((at >= low[:, axis, None]) & (at < high[:, axis, None])).float())  # (L, h), (L, w)
    of_class = F.one_hot(target["labels"] - 1, num_classes).float()  # (L, K)
    return (torch.einsum("lk,lh,lw->khw", of_class, *inside) > 0).float()


def box_loss(
    cams: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], strides: Sequence[int], *, centre_ratio: float = 1.0
) -> Tensor:
    """Binary cross-entropy of the maps against the boxes' heat maps, mean over entries, then over levels."""
    losses = []
    for cam, stride in zip(cams, strides, strict=True):
        truth = torch.stack([heat_map(t, cam.shape[2:], stride, cam.shape[1], centre_ratio) for t in targets])
        losses.append(F.binary_cross_entropy_with_logits(cam, truth.to(cam)))
    return torch.stack(losses).mean()


def ranking(
    objectness: Tensor, cams: Sequence[Tensor], per_cell: int, rule: Literal["product", "sum", "none"] = "product"
) -> Tensor:
    """Logits (N, A) by which proposals are ranked; no gradient flows through them.

    Args:
        objectness: (N, A), level by level, cell by cell.
        cams: of the same levels.
        per_cell: anchors of a cell.
        rule: "product" of the objectness and the largest class activation, both as probabilities; "sum", their mean;
            "none", the objectness alone.
    """
    if rule == "none":
        return objectness.detach()
    best = torch.cat([cam.detach().amax(1).flatten(1) for cam in cams], 1)  # (N, cells)
    best = best[..., None].expand(-1, -1, per_cell).flatten(1).to(objectness)
    plain = objectness.detach()
    if rule == "sum":
        return torch.logit((plain.sigmoid() + best.sigmoid()) / 2)
    log_product = F.logsigmoid(plain) + F.logsigmoid(best)
    return log_product - torch.log(-torch.expm1(log_product.clamp(max=-1e-7)))
