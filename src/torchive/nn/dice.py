"""Soft Dice: the overlap of a predicted and a true map as a loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


def mask_dice(scores: Tensor, truth: Tensor, *, eps: float = 1e-5) -> Tensor:
    """1 - 2 sum p g / (sum p^2 + sum g^2 + eps) of each mask: scores and truth (n, ...) to (n,).

    Milletari et al., "V-Net", as for the masks of objects (arXiv:2003.05664, eq. 2).
    """
    scores, truth = scores.flatten(1), truth.flatten(1)
    mass = scores.square().sum(1) + truth.square().sum(1) + eps
    return 1 - 2 * (scores * truth).sum(1) / mass


class SoftDiceLoss(nn.Module):
    r"""One minus the soft Dice score, averaged over classes.

    Milletari et al., "V-Net", 3DV 2016, arXiv:1606.04797, over all classes as in the attention U-Net
    (arXiv:1804.03999): ``1 - mean_c (2 sum p_c t_c + s) / (sum p_c + sum t_c + s)``, p the softmax, t the one-hot
    truth, s ``smooth``; the score of a class that is absent from both is one.

    Args:
        smooth: s, against division by zero.
        over: sums over each "sample" (the default) or over the whole "batch", which steadies rare classes.
        ignore_index: pixels with this class count nowhere.
        reduction: "mean", "sum" or "none" over samples; with ``over="batch"`` there is one value, and "none" is
            refused.

    Raises:
        ValueError: an unknown ``over`` or ``reduction``, a negative ``smooth``; in ``forward``, shapes that do not fit.
    """

    def __init__(
        self,
        *,
        smooth: float = 1e-5,
        over: Literal["sample", "batch"] = "sample",
        ignore_index: int = 255,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if over not in ("sample", "batch") or reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f"expected over in sample, batch and reduction in mean, sum, none; got {over!r} and {reduction!r}"
            )
        if over == "batch" and reduction == "none":
            raise ValueError("a Dice over the batch has one value: reduction must be mean or sum, got 'none'")
        if smooth < 0:
            raise ValueError(f"smooth must be >= 0, got {smooth}")
        self.smooth, self.over, self.ignore_index, self.reduction = smooth, over, ignore_index, reduction

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if target.shape != (prediction.shape[0], *prediction.shape[2:]):
            expected = (prediction.shape[0], *prediction.shape[2:])
            raise ValueError(f"expected a target of shape {tuple(expected)}, got {tuple(target.shape)}")
        classes = torch.arange(prediction.shape[1], device=target.device).view(-1, *[1] * (target.ndim - 1))
        truth = (target[:, None] == classes).to(prediction.dtype).flatten(2)  # (N, K, L); no class where ignored
        valid = (target != self.ignore_index)[:, None].flatten(2)  # (N, 1, L)
        scores = prediction.softmax(1).flatten(2) * valid  # (N, K, L)
        axes = 2 if self.over == "sample" else (0, 2)
        overlap, mass = (scores * truth).sum(axes), scores.sum(axes) + truth.sum(axes)  # (N, K) or (K,)
        loss = 1 - ((2 * overlap + self.smooth) / (mass + self.smooth)).mean(-1)  # (N,) or ()
        if self.reduction == "none":
            return loss
        if loss.numel() == 0:
            return prediction.sum() * 0
        return loss.sum() if self.reduction == "sum" else loss.mean()
