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


def cells_inside(grid: Sequence[int], stride: int, sizes: Tensor) -> Tensor:
    """Which cells (N, 1, h, w) of a grid (h, w) lie in images of ``sizes`` (N, 2), height and width, or begin there;
    the others show the batch's padding."""
    rows, columns = (torch.arange(n, device=sizes.device) * stride < sizes[:, k, None] for k, n in enumerate(grid))
    return (rows[:, :, None] & columns[:, None])[:, None]


def mean_inside(cells: Tensor, inside: Tensor) -> Tensor:
    """Means (N, K) of (N, K, h, w) over the cells that ``inside`` (N, 1, h, w) says, at least float32."""
    wide = cells.to(torch.promote_types(cells.dtype, torch.float32))
    return torch.where(inside, wide, 0).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)


def image_loss(
    cams: Sequence[Tensor],
    present: Tensor,
    strides: Sequence[int],
    sizes: Tensor,
    kind: Literal["softmax", "sigmoid"] = "softmax",
) -> Tensor:
    """What the maps' means say of the classes, mean over the images that show any.

    Args:
        cams: (N, K, h, w) of each level; a class's score is the mean over the image's cells, then over levels.
        present: (N, K), 1 for each class that an image shows.
        strides: of the levels.
        sizes: (N, 2), height and width of the images in the batch, whose padding does not count.
        kind: "softmax" against ``present`` over its sum, or a "sigmoid" for each class, over all images.
    """
    means = [mean_inside(cam, cells_inside(cam.shape[2:], s, sizes)) for cam, s in zip(cams, strides, strict=True)]
    score = torch.stack(means).mean(0)  # (N, K)
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
    cams: Sequence[Tensor],
    targets: Sequence[dict[str, Tensor]],
    strides: Sequence[int],
    sizes: Tensor,
    *,
    centre_ratio: float = 1.0,
) -> Tensor:
    """Binary cross-entropy of the maps against the boxes' heat maps, mean over each image's entries, then over images
    and over levels.

    Args:
        cams: (N, K, h, w) of each level.
        targets: of each image, ``boxes`` (L, 4) and ``labels`` (L,).
        strides, sizes: as of ``image_loss``.
        centre_ratio: as of ``heat_map``.
    """
    losses = []
    for cam, stride in zip(cams, strides, strict=True):
        truth = torch.stack([heat_map(t, cam.shape[2:], stride, cam.shape[1], centre_ratio) for t in targets])
        each = F.binary_cross_entropy_with_logits(cam, truth.to(cam), reduction="none")
        losses.append(mean_inside(each, cells_inside(cam.shape[2:], stride, sizes)).mean())
    return torch.stack(losses).mean()


def ranking(
    objectness: Tensor, cams: Sequence[Tensor], per_cell: int, rule: Literal["product", "sum", "none"] = "product"
) -> Tensor:
    """Logits (N, A) in float64 by which proposals are ranked; no gradient flows through them.

    Where the class activation is the same everywhere, they have the objectness's order; float32 would make ties of it.

    Args:
        objectness: (N, A), level by level, cell by cell.
        cams: of the same levels; not read by "none".
        per_cell: anchors of a cell.
        rule: "product" of the objectness and the largest class activation, both as probabilities; "sum", their mean;
            "none", the objectness alone.
    """
    plain = objectness.detach().double()
    if rule == "none":
        return plain
    best = torch.cat([cam.detach().amax(1).flatten(1) for cam in cams], 1).double()  # (N, cells)
    best = best[..., None].expand(-1, -1, per_cell).flatten(1)
    if rule == "sum":
        plain, best = plain.clamp(-500, 500), best.clamp(-500, 500)  # whose probabilities are above zero
        return torch.log(plain.sigmoid() + best.sigmoid()) - torch.log((-plain).sigmoid() + (-best).sigmoid())
    # 1 / (p q) - 1 = exp(-x) + exp(-y) + exp(-x - y)
    return -torch.stack([-plain, -best, -plain - best]).logsumexp(0)
