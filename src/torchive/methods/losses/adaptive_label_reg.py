r"""Adaptive regularisation of labels: each class learns, while the network trains, which other classes it is like.

Paper    Ding, Wu, Sun, Guo, Xia, "Adaptive Regularization of Labels", 2019, arXiv:1908.05474. A reading of its abstract
         and of the notes: the formulas below are not confirmed by its text, and no code was released.
Formula  r_y = softmax over j != y of R_yj,  q = softmax over j != y of z_j / T
         L = -log p_y + lambda KL( r_y || q ),  R without gradient here
         R learns by -sum_j q_j log r_yj,  q without gradient here
Symbols  z logits (N, K), p = softmax(z), y class, R (K, K) residual correlations, r residual label, q residual
         prediction, T temperature, lambda the weight ``alpha``.
Differs  the abstract says that labels learn online from the erroneous experience of the network and need few numbers
         more; that R and the network teach one another without a gradient through the teacher, the temperature, the
         weight and the masked diagonal are choices made here. ``update`` and ``masked`` name the alternatives.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Update = Literal["gradient", "joint", "ema"]

_NOTHING = -1e30  # the logit of the class that is left out: finite, so that a row of one class has a gradient, zero


def residual_log_softmax(logits: Tensor, classes: Tensor, masked: bool = True) -> Tensor:
    """(N, K) log-probabilities over the classes other than each row's own, (N,); over all classes if not ``masked``."""
    if masked:
        logits = logits.scatter(1, classes[:, None], _NOTHING)
    return logits.log_softmax(1)


class AdaptiveLabelLoss(nn.Module):
    """(N, K) logits and (N,) classes to a scalar, or to one value each with "none".

    ``residual`` starts at zero: the residual label is uniform, and the loss smooths labels over the other classes.
    In a recipe it learns ``rate`` times as fast as the network and does not decay (``parameter_rules``).

    Args:
        num_classes: K.
        alpha: lambda, the weight of the residual loss.
        temperature: T of the residual prediction.
        masked: whether the own class is left out of both residual distributions.
        update: how R learns: "gradient" towards the predictions; "joint": by the gradient of the loss itself; "ema": a
            moving average of the predictions of each class, kept in training passes.
        learn_from: predictions of "all" samples, or of the "correct" ones; not used by "joint".
        momentum: of the moving average.
        rate: multiple of the learning rate.
        warmup_iters: training passes before the residual loss counts; R learns from the first one on.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an unknown ``update``, ``learn_from`` or ``reduction``, a number out of range; in ``forward``,
            shapes that do not fit.
        TypeError: logits that are not floating, or classes that are.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        alpha: float = 0.1,
        temperature: float = 3.0,
        masked: bool = True,
        update: Update = "gradient",
        learn_from: Literal["all", "correct"] = "all",
        momentum: float = 0.9,
        rate: float = 10.0,
        warmup_iters: int = 0,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if update not in ("gradient", "joint", "ema") or learn_from not in ("all", "correct"):
            raise ValueError(
                f"update must be gradient, joint or ema and learn_from all or correct, got {update!r}, {learn_from!r}"
            )
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        if num_classes < 2 or alpha < 0 or temperature <= 0 or not 0 <= momentum < 1 or rate <= 0 or warmup_iters < 0:
            raise ValueError(
                "expected num_classes >= 2, alpha >= 0, temperature > 0, momentum in [0, 1), rate > 0 and "
                "warmup_iters >= 0, "
                f"got {num_classes}, {alpha}, {temperature}, {momentum}, {rate}, {warmup_iters}"
            )
        self.alpha, self.temperature, self.masked, self.update = alpha, temperature, masked, update
        self.learn_from, self.momentum, self.rate = learn_from, momentum, rate
        self.warmup_iters, self.reduction = warmup_iters, reduction
        self.residual: Tensor
        if update == "ema":
            self.register_buffer("residual", torch.zeros(num_classes, num_classes))  # log-probabilities, up to a shift
        else:
            self.residual = nn.Parameter(torch.zeros(num_classes, num_classes))
        self.passes: Tensor
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """How R is optimised in a recipe."""
        return {} if self.update == "ema" else {"residual": {"lr": self.rate, "weight_decay": 0.0}}

    @torch.no_grad()
    def labels(self) -> Tensor:
        """(K, K): row y is the residual label of class y; the diagonal is zero where it is masked."""
        rows = torch.arange(len(self.residual), device=self.residual.device)
        return residual_log_softmax(self.residual, rows, self.masked).exp()

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        size = len(self.residual)
        if prediction.ndim != 2 or prediction.shape[1] != size or target.shape != prediction.shape[:1]:
            raise ValueError(f"expected (N, {size}) and (N,), got {tuple(prediction.shape)} and {tuple(target.shape)}")
        if not prediction.is_floating_point() or target.is_floating_point():
            kinds = f"{prediction.dtype} and {target.dtype}"
            raise TypeError(f"expected floating logits and integer classes, got {kinds}")
        kind = torch.promote_types(torch.promote_types(prediction.dtype, self.residual.dtype), torch.float32)
        logits = prediction.to(kind)
        log_q = residual_log_softmax(logits / self.temperature, target, self.masked)  # (N, K)
        log_r = residual_log_softmax(self.residual.to(kind)[target], target, self.masked)  # (N, K)
        teacher = log_r if self.update == "joint" else log_r.detach()
        divergence = (teacher.exp() * (teacher - log_q)).sum(1)
        divergence = self.alpha * divergence
        if self.warmup_iters:
            divergence = torch.where(self.passes >= self.warmup_iters, divergence, 0.0)
            if self.training:
                self.passes += 1
        each = F.cross_entropy(logits, target, reduction="none") + divergence
        if self.training and self.update != "joint":
            each = each + self._learn(logits.detach(), log_q.detach(), log_r, target)
        if self.reduction == "none":
            return each
        return each.sum() if self.reduction == "sum" else each.sum() / max(len(each), 1)

    def _learn(self, logits: Tensor, log_q: Tensor, log_r: Tensor, target: Tensor) -> Tensor:
        """Zero with the gradient that teaches R, (N,); with a moving average, R is moved here."""
        counted = torch.ones_like(target) if self.learn_from == "all" else (logits.argmax(1) == target).long()
        q = log_q.exp()
        if self.update == "gradient":
            term = -(q * log_r).sum(1) * counted
            return term - term.detach()
        number = torch.zeros(len(self.residual), dtype=q.dtype, device=q.device).index_add_(0, target, counted.to(q))
        total = torch.zeros_like(self.residual, dtype=q.dtype).index_add_(0, target, q * counted[:, None])
        seen = (number > 0)[:, None]
        mean = total / number.clamp(min=1)[:, None]
        moved = self.momentum * self.labels().to(q.dtype) + (1 - self.momentum) * mean
        smallest = torch.finfo(q.dtype).tiny
        self.residual.copy_(torch.where(seen, moved.clamp(min=smallest).log(), self.residual.to(q.dtype)))
        return torch.zeros_like(log_q[:, 0])

    def extra_repr(self) -> str:
        return f"{len(self.residual)} classes, alpha={self.alpha}, temperature={self.temperature}, update={self.update}"
