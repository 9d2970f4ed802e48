r"""Focal loss: cross-entropy that fades for what is classified well, so that hard examples decide among many easy ones.

Paper    Lin, Goyal, Girshick, He, Dollár, "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002.
Formula  FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t)                                                          (eq. 5)
         p_t = p where y = 1, else 1 - p; alpha_t = alpha where y = 1, else 1 - alpha               (eqs. 2 and 3)
         soft truths: cross-entropy with y, 1 - p_t = y (1 - p) + (1 - y) p, alpha_t = y alpha + (1 - y)(1 - alpha)
         softmax: -w_y (1 - p_y)^gamma log p_y
         dFL/dx = s alpha_t (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1), s = 1 where y = 1, else -1   (appendix B)
         bias of the classifier's last layer at the start: -log((1 - pi) / pi), pi = 0.01             (section 4.1)
         (``torchive.nn.prior.init_classifier``)
         the sum is divided by the number of positives, at least one                                  (section 4)
Symbols  x logits, p = sigmoid(x) or softmax(x), y truth, w class weights, gamma focus, alpha weight of positives.
Differs  the sigmoid form is torchvision's, which has no finite gradient at saturated logits where 0 < gamma < 1; there
         (1 - p_t)^gamma is computed from logarithms. The softmax form and its class weights are the common extension,
         not the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

_NOTHING = -1e30  # a logit that is left out: finite, so that nothing but it has a gradient of zero


def focal_sigmoid(logits: Tensor, truth: Tensor, *, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """The loss of each logit, for truths of the same shape in 0 to 1; ``alpha`` None weighs both sides alike."""
    if gamma == 0 or gamma >= 1:
        return sigmoid_focal_loss(logits, truth, alpha=-1 if alpha is None else alpha, gamma=gamma)
    # log(1 - p_t) = log( y (1 - p) + (1 - y) p ), without the root of a number that rounds to zero
    tiny = torch.finfo(logits.dtype).tiny
    wrong = torch.logaddexp(
        truth.clamp(min=tiny).log() + F.logsigmoid(-logits), (1 - truth).clamp(min=tiny).log() + F.logsigmoid(logits)
    )
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * (gamma * wrong).exp()
    return each if alpha is None else each * (alpha * truth + (1 - alpha) * (1 - truth))


def focal_softmax(logits: Tensor, labels: Tensor, *, gamma: float = 2.0) -> Tensor:
    """The loss of each position, for logits (N, K, ...) and labels (N, ...) from 0 to K - 1, without class weights."""
    own = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)  # log p_y
    if gamma == 0:
        return -own
    if gamma >= 1:
        return -own * (-torch.expm1(own)).clamp(min=0) ** gamma
    others = logits.scatter(1, labels[:, None], _NOTHING).logsumexp(1)
    return -own * (gamma * (others - logits.logsumexp(1))).exp()


class FocalLoss(nn.Module):
    """Logits and truth to a scalar, or to the value of each entry with "none".

    Args:
        variant: "sigmoid": logits of any shape and truths of the same shape in 0 to 1; or logits (N, K, ...) and
            integer classes (N, ...), which become one-hot. "softmax": logits (N, K, ...) and integer classes (N, ...).
        alpha: weight of positives in the sigmoid form, negatives have 1 - alpha; None weighs both alike.
        gamma: the focus; 0 is (weighted) cross-entropy.
        weight: of each class, (K,), in the softmax form.
        ignore_index: class of entries that do not count.
        reduction: "none", "sum", "mean" (over the entries that count; with class weights over their sum, as in
            ``torch.nn.functional.cross_entropy``), or "num_pos": the sum over the number of positives, at least one.
            Positive are truths above one half, and in the softmax form classes above 0.

    Raises:
        ValueError: an unknown ``variant`` or ``reduction``, a number out of range; in ``forward``, shapes that do not
            fit.
        TypeError: logits that are not floating, or classes that are not integers.
    """

    def __init__(
        self,
        *,
        variant: Literal["sigmoid", "softmax"] = "sigmoid",
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        weight: Sequence[float] | Tensor | None = None,
        ignore_index: int = -100,
        reduction: Literal["mean", "sum", "none", "num_pos"] = "mean",
    ) -> None:
        super().__init__()
        if variant not in ("sigmoid", "softmax"):
            raise ValueError(f"variant must be sigmoid or softmax, got {variant!r}")
        if reduction not in ("mean", "sum", "none", "num_pos"):
            raise ValueError(f"reduction must be mean, sum, none or num_pos, got {reduction!r}")
        if gamma < 0 or (alpha is not None and not 0 <= alpha <= 1):
            raise ValueError(f"gamma must be >= 0 and alpha None or in [0, 1], got {gamma} and {alpha}")
        if weight is not None and variant == "sigmoid":
            raise ValueError("weight is of the softmax form; the sigmoid form has alpha")
        self.variant, self.alpha, self.gamma = variant, alpha, gamma
        self.ignore_index, self.reduction = ignore_index, reduction
        self.weight: Tensor | None
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight, dtype=torch.float32))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if not prediction.is_floating_point():
            raise TypeError(f"expected floating logits, got {prediction.dtype}")
        logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if target.is_floating_point() and self.variant == "sigmoid":
            if target.shape != prediction.shape:
                raise ValueError(f"expected equal shapes, got {tuple(prediction.shape)} and {tuple(target.shape)}")
            truth = target.to(logits.dtype)
            each = focal_sigmoid(logits, truth, alpha=self.alpha, gamma=self.gamma)
            return self._reduced(each, None, truth > 0.5 if self.reduction == "num_pos" else None)
        return self._of_classes(logits, target)

    def _of_classes(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            raise TypeError(f"the softmax form expects integer classes, got {target.dtype}")
        if logits.ndim < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
            raise ValueError(f"expected (N, K, ...) and (N, ...), got {tuple(logits.shape)} and {tuple(target.shape)}")
        if self.weight is not None and self.weight.shape != logits.shape[1:2]:
            raise ValueError(f"expected {logits.shape[1]} class weights, got {tuple(self.weight.shape)}")
        counted = target != self.ignore_index
        labels = torch.where(counted, target, 0)
        if self.variant == "softmax":
            weights = counted.to(logits.dtype)
            if self.weight is not None:
                weights = weights * self.weight.to(logits)[labels]
            return self._reduced(
                focal_softmax(logits, labels, gamma=self.gamma) * weights, weights, counted & (labels > 0)
            )
        truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype)
        weights = counted[:, None].expand_as(truth).to(logits.dtype)
        each = focal_sigmoid(logits, truth, alpha=self.alpha, gamma=self.gamma)
        return self._reduced(each * weights, weights, (truth > 0.5) & counted[:, None])

    def _reduced(self, each: Tensor, weights: Tensor | None, positive: Tensor | None) -> Tensor:
        """Without weights all entries count alike; ``positive`` is needed for "num_pos" alone."""
        if self.reduction == "none":
            return each
        total = each.sum()
        if self.reduction == "sum":
            return total
        if self.reduction == "num_pos" and positive is not None:
            return total / positive.sum().clamp(min=1)
        if weights is None:
            return total / max(each.numel(), 1)
        count = weights.sum()
        return total / torch.where(count > 0, count, 1)

    def extra_repr(self) -> str:
        return f"variant={self.variant}, alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction}"
