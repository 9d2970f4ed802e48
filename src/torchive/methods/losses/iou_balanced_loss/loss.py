"""The two losses and their weights."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from torchive.ops.boxes import ONES, code_iou

Variant = Literal["sigmoid", "softmax"]
Reduction = Literal["mean", "sum", "none"]

#: Positives from whose sums w is found, over the first batches, and the largest w that is believed.
CALIBRATING, LARGEST = 64, 10.0


def balance_weights(each: Tensor, positive: Tensor, ious: Tensor, *, eta: float = 1.5) -> Tensor:
    """The weight (R,) of each loss: of positives IoU^eta, so scaled that their sum stays; of others 1. No gradient.

    Args:
        each: (R,), what each entry costs; of others it does not matter.
        positive: (R,) bool.
        ious: (R,), overlap of a positive's regressed box with its object; of others it does not matter.
        eta: 0 gives ones.
    """
    if eta == 0:
        return torch.ones_like(each)
    cost = torch.where(positive, each.detach(), 0)
    power = torch.where(positive, ious.detach().to(each.dtype), 0).clamp(min=0) ** eta
    scale = cost.sum() / ((power * cost).sum() + 1e-6)
    return torch.where(positive, power * scale, 1)


def iou_balanced_classification(
    logits: Tensor,
    targets: Tensor,
    ious: Tensor | None = None,
    *,
    eta: float = 1.5,
    variant: Variant = "sigmoid",
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "sum",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """Classification loss whose positives count by the overlap of their regressed boxes.

    Args:
        logits: (R, K).
        targets: "sigmoid": classes (R,) from 0 to K, K for background, or truths (R, K) in 0 or 1, a row of zeros for
            background. "softmax": classes (R,), 0 for background.
        ious: (R,), overlap of each positive's regressed box with its object; None counts all positives alike.
        eta: power of the overlap.
        variant: focal loss of K sigmoids (with ``gamma`` 0 and ``alpha`` None binary cross-entropy), or cross-entropy.
        alpha, gamma: of focal loss.
        reduction: "sum", "mean" over the entries, or "none": (R, K) of sigmoids, (R,) of a softmax.
        avg_factor: what a sum is divided by, such as the number of positives; at least one.

    Raises:
        ValueError: shapes that do not fit. TypeError: logits that are not floating, or classes that are not integers.
    """
    _check(logits, targets, ious, variant)
    targets = targets.long() if targets.ndim == 1 else targets
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if variant == "softmax":
        each = F.cross_entropy(logits, targets, reduction="none")  # (R,)
        if ious is not None:
            each = each * balance_weights(each, targets > 0, ious, eta=eta)
        return _reduced(each, reduction, avg_factor)
    if targets.ndim == 1:
        truth = logits.new_zeros(logits.shape[0], logits.shape[1] + 1).scatter_(1, targets[:, None], 1)[:, :-1]
    else:
        truth = targets.to(logits.dtype)
    each = sigmoid_focal_loss(logits, truth, alpha=-1 if alpha is None else alpha, gamma=gamma)  # (R, K)
    if ious is not None and eta != 0:
        own = truth > 0
        cost, any_own = torch.where(own, each.detach(), 0).sum(1), own.any(1)  # (R,)
        weight = balance_weights(cost, any_own, ious, eta=eta)
        each = each * torch.where(own, weight[:, None], 1)
    return _reduced(each, reduction, avg_factor)


def iou_balanced_localisation(
    deltas: Tensor,
    targets: Tensor,
    ious: Tensor | None = None,
    *,
    power: float = 1.5,
    beta: float = 0.11,
    loss_weight: float | Tensor = 1.0,
    box_weights: tuple[float, float, float, float] = ONES,
    reduction: Reduction = "sum",
    avg_factor: float | Tensor | None = None,
) -> Tensor:
    """Smooth L1 of positives' box codes (P, 4), each weighted by w IoU^lambda; the weight has no gradient.

    Args:
        deltas, targets: (P, 4).
        ious: (P,); None finds them from the codes, which needs no anchors.
        power: lambda.
        beta: where smooth L1 turns from a square to a line; 0 is L1.
        loss_weight: w, see ``matching_weight``.
        box_weights: of the box code.
        reduction: "sum", "mean" over the numbers, or "none": (P, 4).
        avg_factor: what a sum is divided by, such as the number of positives; at least one.

    Raises:
        ValueError: shapes that do not fit. TypeError: deltas that are not floating.
    """
    if deltas.ndim != 2 or deltas.shape[1] != 4 or targets.shape != deltas.shape:
        raise ValueError(f"expected deltas and targets (P, 4), got {tuple(deltas.shape)} and {tuple(targets.shape)}")
    if not deltas.is_floating_point():
        raise TypeError(f"expected floating deltas, got {deltas.dtype}")
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    targets = targets.to(deltas.dtype)
    if ious is None:
        ious = code_iou(deltas.detach(), targets, box_weights)
    if ious.shape != deltas.shape[:1]:
        raise ValueError(f"expected {len(deltas)} overlaps, got shape {tuple(ious.shape)}")
    weight = loss_weight * ious.detach().to(deltas.dtype).clamp(min=0) ** power  # (P,)
    each = F.smooth_l1_loss(deltas, targets, beta=beta, reduction="none") * weight[:, None]
    return _reduced(each, reduction, avg_factor)


def matching_weight(
    deltas: Tensor,
    targets: Tensor,
    ious: Tensor | None = None,
    *,
    power: float = 1.5,
    beta: float = 0.11,
    box_weights: tuple[float, float, float, float] = ONES,
) -> Tensor:
    """The w with which the weighted sum equals the plain one on this batch: the paper's choice, on the first batch.

    It is 1 where there is nothing to weigh, and large where the overlaps are small.
    """
    return _weight(*_sums(deltas, targets, ious, power, beta, box_weights))


def _sums(
    deltas: Tensor,
    targets: Tensor,
    ious: Tensor | None,
    power: float,
    beta: float,
    box_weights: tuple[float, float, float, float],
) -> tuple[Tensor, Tensor]:
    """The plain sum over the positives, and the weighted one with w = 1."""
    with torch.no_grad():
        plain = iou_balanced_localisation(deltas, targets, torch.ones_like(deltas[:, 0]), power=0, beta=beta)
        found = iou_balanced_localisation(deltas, targets, ious, power=power, beta=beta, box_weights=box_weights)
        return plain, found


def _weight(plain: Tensor, weighted: Tensor) -> Tensor:
    return torch.where(weighted > 0, plain / torch.where(weighted > 0, weighted, 1), 1)


class IoUBalancedLoss(nn.Module):
    """Classification: logits (R, K), truths and overlaps (R,) to a scalar, or to each entry with "none".

    Without overlaps it is the plain loss. See ``iou_balanced_classification`` for the shapes.

    Args:
        eta: power of the overlap; 0 is the plain loss.
        variant: "sigmoid" focal loss or "softmax" cross-entropy.
        alpha, gamma: of focal loss; None and 0 are binary cross-entropy.
        reduction: "mean" over the entries, "sum" or "none".

    Raises:
        ValueError: an unknown ``variant`` or ``reduction``, a number out of range; in ``forward``, shapes that do not
            fit.
        TypeError: in ``forward``, logits that are not floating, or classes that are not integers.
    """

    #: Tells a detector that its third argument is the overlap of each regressed box.
    takes_ious = True

    def __init__(
        self,
        *,
        eta: float = 1.5,
        variant: Variant = "sigmoid",
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if variant not in ("sigmoid", "softmax"):
            raise ValueError(f"variant must be sigmoid or softmax, got {variant!r}")
        _check_reduction(reduction)
        if min(eta, gamma) < 0 or (alpha is not None and not 0 <= alpha <= 1):
            raise ValueError(f"eta and gamma must be >= 0 and alpha None or in [0, 1], got {eta}, {gamma} and {alpha}")
        self.eta, self.variant, self.alpha, self.gamma, self.reduction = eta, variant, alpha, gamma, reduction

    def forward(self, prediction: Tensor, target: Tensor, ious: Tensor | None = None) -> Tensor:
        return iou_balanced_classification(
            prediction,
            target,
            ious,
            eta=self.eta,
            variant=self.variant,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"eta={self.eta}, variant={self.variant}, alpha={self.alpha}, gamma={self.gamma}"


class IoUBalancedLocalisation(nn.Module):
    """Localisation: codes (P, 4), their targets and overlaps (P,) to a scalar, or to each number with "none".

    Args:
        power: lambda; 0 with ``loss_weight`` 1 is smooth L1.
        beta: where smooth L1 turns from a square to a line: 0.11 in RetinaNet, 1/9 in Fast R-CNN, 1 in SSD.
        loss_weight: w; None finds it on the first training batch that has a positive, so that the sum there is the
            plain one. Where that has fewer than 64 positives, it follows the sums over the first batches until so many
            were seen; it is at most 10, with a warning. Both are kept in the state. The paper sets it by hand; the
            release has 2.878 for RetinaNet.
        box_weights: of the box code, where overlaps are not given; ones if None.
        reduction: "mean" over the numbers, "sum" or "none".

    Raises:
        ValueError: a number out of range or an unknown ``reduction``; in ``forward``, shapes that do not fit.
        TypeError: in ``forward``, deltas that are not floating.
    """

    takes_ious = True

    def __init__(
        self,
        *,
        power: float = 1.5,
        beta: float = 0.11,
        loss_weight: float | None = None,
        box_weights: tuple[float, float, float, float] | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        if min(power, beta) < 0 or (loss_weight is not None and loss_weight <= 0):
            raise ValueError(
                f"power and beta must be >= 0 and loss_weight None or > 0, got {power}, {beta} and {loss_weight}"
            )
        self.power, self.beta, self.reduction = power, beta, reduction
        self.box_weights, self.finds_weight = box_weights, loss_weight is None
        self.loss_weight: Tensor
        start = torch.tensor(0.0 if loss_weight is None else loss_weight)
        self.register_buffer("loss_weight", start)  # 0 until it is found
        self.seen: Tensor
        if self.finds_weight:
            self.register_buffer("seen", torch.zeros(3))  # plain sum, weighted sum and number of the positives so far

    def forward(self, prediction: Tensor, target: Tensor, ious: Tensor | None = None) -> Tensor:
        weight = self.loss_weight
        if self.finds_weight and len(prediction) and float(self.seen[2]) < CALIBRATING:
            weight = self.calibrated(prediction, target, ious)
        return iou_balanced_localisation(
            prediction,
            target,
            ious,
            power=self.power,
            beta=self.beta,
            loss_weight=weight,
            box_weights=self.box_weights or ONES,
            reduction=self.reduction,
        )

    def calibrated(self, prediction: Tensor, target: Tensor, ious: Tensor | None = None) -> Tensor:
        """The w that this batch and those before it ask for, at most ``LARGEST``; kept in training.

        A batch in which nothing overlaps tells nothing.
        """
        pair = _sums(prediction, target, ious, self.power, self.beta, self.box_weights or ONES)
        own = torch.stack([*pair, pair[0].new_tensor(len(prediction))])
        sums = self.seen + torch.where(pair[1] > 0, own, 0)
        found = _weight(sums[0], sums[1])
        if self.training:
            if float(found) > LARGEST:
                warnings.warn(
                    f"the first {int(sums[2])} boxes overlap their objects so little that w would be "
                    f"{float(found):.4g}; {LARGEST:g} is taken, see loss_weight",
                    stacklevel=3,
                )
            self.seen.copy_(sums)
            self.loss_weight.copy_(torch.where(sums[1] > 0, found.clamp(max=LARGEST), 0))
        return found.clamp(max=LARGEST)

    def extra_repr(self) -> str:
        said = f"power={self.power}, beta={self.beta}, loss_weight={float(self.loss_weight):.4g}"
        return f"{said} found on {int(self.seen[2])} boxes, at most {LARGEST:g}" if self.finds_weight else said


def _reduced(each: Tensor, reduction: Reduction, avg_factor: float | Tensor | None) -> Tensor:
    _check_reduction(reduction)
    if reduction == "none":
        return each
    if reduction == "mean":
        return each.sum() / max(each.numel(), 1)
    if avg_factor is None:
        return each.sum()
    return each.sum() / torch.as_tensor(avg_factor, dtype=each.dtype, device=each.device).clamp(min=1)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")


def _check(logits: Tensor, targets: Tensor, ious: Tensor | None, variant: str) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"expected floating logits, got {logits.dtype}")
    if logits.ndim != 2 or targets.shape[:1] != logits.shape[:1]:
        raise ValueError(f"expected logits (R, K) and R truths, got {tuple(logits.shape)} and {tuple(targets.shape)}")
    if targets.ndim == 1 and targets.is_floating_point():
        raise TypeError(f"expected integer classes, got {targets.dtype}")
    if targets.ndim != 1 and (variant == "softmax" or targets.shape != logits.shape):
        raise ValueError(f"expected classes (R,) or truths {tuple(logits.shape)}, got {tuple(targets.shape)}")
    if ious is not None and ious.shape != logits.shape[:1]:
        raise ValueError(f"expected {len(logits)} overlaps, got shape {tuple(ious.shape)}")
