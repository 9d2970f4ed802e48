"""Which locations learn a mask, the true masks that they see, and what masks and the semantic branch cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from torchive.ops.masks import IGNORED


def sampled_masks(masks: Tensor, rows: Tensor | None, stride: int, canvas: tuple[int, int]) -> Tensor:
    """Where masks (L, H, W), or those of ``rows`` (n,), are not zero, at every ``stride``-th pixel from ``stride // 2``
    on: (n, canvas height / stride, canvas width / stride) bool, false outside the image.
    """
    part = masks[:, stride // 2 :: stride, stride // 2 :: stride]
    if rows is not None and len(rows) < len(masks):
        part, rows = part[rows], None
    full = part.new_zeros(part.shape[0], canvas[0] // stride, canvas[1] // stride, dtype=torch.bool)
    full[:, : part.shape[1], : part.shape[2]] = part != 0  # once for each mask, not for each of its locations
    return full if rows is None else full[rows]


def choose(
    image: Tensor, row: Tensor, score: Tensor, *, most: int | None = 500, per_image: int | None = None
) -> Tensor:
    """Which of P positive locations learn a mask: their indices.

    Args:
        image: (P,), the number of each location's image.
        row: (P,), the object of the batch that it learns.
        score: (P,), class times centerness.
        most: of the batch, drawn at random; None takes all.
        per_image: instead, of each image, the same number for each of its objects, those with the highest scores, one
            at least.
    """
    if per_image is None:
        if most is None or len(row) <= most:
            return torch.arange(len(row), device=row.device)
        return torch.randperm(len(row), device=row.device)[:most].sort().values
    objects, owner, count = torch.unique(row, return_inverse=True, return_counts=True)
    order = score.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]  # object by object, the best first
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=row.device) - (count.cumsum(0) - count)[owner[order]]
    home = torch.zeros_like(objects).scatter(0, owner, image)  # (objects,), the image of each
    rivals = torch.zeros_like(objects).scatter_add(0, home, torch.ones_like(home)) if len(home) else home
    quota = (per_image // rivals[home]).clamp(min=1)
    return torch.nonzero(rank < quota[owner])[:, 0]


def semantic_truth(target: dict[str, Tensor], stride: int, canvas: tuple[int, int]) -> Tensor:
    """The class (h, w) of the smallest object at every ``stride``-th pixel, from 1 to K.

    Elsewhere 0, or 255 where ``ignored`` (H, W), if the target has it, is true.
    """
    masks = target["masks"]
    rest = torch.zeros(canvas[0] // stride, canvas[1] // stride, dtype=torch.int64, device=masks.device)
    if "ignored" in target:
        rest = rest.masked_fill(sampled_masks(target["ignored"][None], None, stride, canvas)[0], IGNORED)
    if not len(masks):
        return rest
    order = torch.stack([mask.count_nonzero() for mask in masks]).argsort(stable=True)  # of all at once is slow
    part = sampled_masks(masks, order, stride, canvas)
    return torch.where(part.any(0), target["labels"][order][part.to(torch.uint8).argmax(0)], rest)


def semantic_loss(logits: Tensor, targets: Sequence[dict[str, Tensor]], stride: int) -> Tensor:
    """Focal loss of the semantic branch's logits (N, K, h, w), over the number of pixels that belong to objects.

    Pixels of crowds, ``ignored`` as in ``semantic_truth``, cost nothing.
    """
    canvas = (logits.shape[2] * stride, logits.shape[3] * stride)
    truth = torch.stack([semantic_truth(target, stride, canvas) for target in targets])  # (N, h, w)
    classes = torch.arange(1, logits.shape[1] + 1, device=logits.device).view(-1, 1, 1)
    hot = (truth[:, None] == classes).to(torch.promote_types(logits.dtype, torch.float32))
    each = sigmoid_focal_loss(logits.to(hot.dtype), hot) * (truth != IGNORED)[:, None]
    return each.sum() / hot.sum().clamp(min=1)
