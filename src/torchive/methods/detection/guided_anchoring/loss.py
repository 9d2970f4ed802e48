"""The losses of locations, shapes and angles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


def location_loss(logits: Tensor, labels: Tensor, *, negative_weight: float = 0.1, balance: float = 200.0) -> Tensor:
    """Focal loss (alpha 1/4, gamma 2) of logits (N, A) over the positions' number / ``balance``.

    Labels (N, A) as of ``location_targets``; a negative position weighs ``negative_weight``.
    """
    each = sigmoid_focal_loss(logits, (labels == 1).to(logits.dtype))
    weight = torch.where(labels == 1, 1.0, torch.where(labels == 0, negative_weight, 0.0)).to(logits.dtype)
    return (each * weight).sum() * balance / max(labels.numel(), 1)


def bounded_iou_loss(sides: Tensor, truth: Tensor, *, beta: float = 0.2, eps: float = 0.0) -> Tensor:
    """Smooth L1 of 1 - min(w / w_g, w_g / w), and so for h: sides (P, 2) and their targets to (P, 2) (eq. 6).

    Tychsen-Smith and Petersson, CVPR 2018, arXiv:1711.00164. ``eps``, in pixels, is added to each denominator.
    """
    miss = 1 - torch.minimum(truth / (sides + eps), sides / (truth + eps))
    return F.smooth_l1_loss(miss, torch.zeros_like(miss), beta=beta, reduction="none")


def angle_loss(doubled: Tensor, truth: Tensor, sides: Tensor) -> Tensor:
    """(1 - cos 2 (a - a_g)) |w_g - h_g| / (w_g + h_g), (P,): a square has no angle.

    ``doubled`` (P, 2) is (cos 2a, sin 2a) of any length, ``truth`` (P,) a_g, and ``sides`` (P, 2) w_g and h_g.
    """
    wanted = torch.stack([(2 * truth).cos(), (2 * truth).sin()], -1)
    agree = (F.normalize(doubled, dim=-1) * wanted).sum(-1)
    w, h = sides.unbind(-1)
    return (1 - agree) * (w - h).abs() / (w + h)
