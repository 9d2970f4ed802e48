r"""Circle loss: pulls similarities of one class up and of two classes down, each at a pace set by its way still to go.

Paper    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020, arXiv:2002.10857.
Formula  L = log[ 1 + sum_j exp(gamma a_n (s_n - D_n)) sum_i exp(-gamma a_p (s_p - D_p)) ]                   (eq. 6)
         a_p = relu(O_p - s_p),  a_n = relu(s_n - O_n), both without gradient                                 (eq. 5)
         O_p = 1 + m,  O_n = -m,  D_p = 1 - m,  D_n = m                                              (section 3.3)
         unified: a_p = a_n = 1, D_p = 0, D_n = -m                                                            (eq. 1)
         computed as softplus( logsumexp_j(..) + logsumexp_i(..) ) in float32 or better
Symbols  s_p, s_n cosine similarities within and between classes; m margin, gamma scale. The boundary of one pair is the
         circle s_n^2 + (1 - s_p)^2 = 2 m^2; the target is s_p > 1 - m and s_n < m. N samples, D features, K classes.
Differs  nothing known in the formula. The mode "global" is that of a popular port, not of the paper.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The paper's settings for its three tasks.
PRESETS: dict[str, dict[str, Any]] = {
    "face": {"mode": "class", "margin": 0.25, "gamma": 256.0},
    "person": {"mode": "class", "margin": 0.25, "gamma": 128.0},
    "retrieval": {"mode": "anchor", "margin": 0.4, "gamma": 80.0},
}

_NOTHING = -1e30  # the exponent of a pair that does not count: finite, so that a row of them has a gradient, zero


def pair_logits(similarity: Tensor, margin: float, gamma: float, *, weighted: bool = True) -> tuple[Tensor, Tensor]:
    """The exponents that each similarity would have as a positive and as a negative pair; same shape as given."""
    if not weighted:
        return -gamma * similarity, gamma * (similarity + margin)
    fixed = similarity.detach()
    positive = -gamma * (1 + margin - fixed).relu() * (similarity - (1 - margin))
    negative = gamma * (fixed + margin).relu() * (similarity - margin)
    return positive, negative


def boundary(s_n: Tensor, s_p: Tensor, margin: float) -> Tensor:
    """s_n^2 + (1 - s_p)^2 - 2 m^2: below zero inside the circle of one pair's decision."""
    return s_n.square() + (1 - s_p).square() - 2 * margin**2


def cosine_similarity(features: Tensor) -> Tensor:
    """(N, D) features to their (N, N) cosines in float32 or better, also under autocast."""
    features = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    with torch.autocast(features.device.type, enabled=False):
        return features @ features.T


class CircleLoss(nn.Module):
    """(N, D) features, or (N, K) class similarities, and (N,) classes to a scalar, or to the values with "none".

    Args:
        mode: "anchor": a sum for each sample over its batch, itself left out; samples without a positive or without a
            negative give zero and are not counted in the mean. "global": one sum over all pairs of the batch; "none"
            gives (1,). "class": the prediction holds cosines to K class vectors (``torchive.nn.CosineClassifier``), one
            sum for each sample.
        margin: m.
        gamma: the scale.
        weighted: the circle loss; otherwise the unified loss, in which every pair has the pace 1.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an unknown ``mode`` or ``reduction``, ``gamma`` not above zero; in ``forward``, shapes that do not
        fit.
    """

    def __init__(
        self,
        *,
        mode: Literal["anchor", "global", "class"] = "anchor",
        margin: float = 0.4,
        gamma: float = 80.0,
        weighted: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if mode not in ("anchor", "global", "class"):
            raise ValueError(f"mode must be anchor, global or class, got {mode!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        if not gamma > 0:
            raise ValueError(f"gamma must be above zero, got {gamma}")
        self.mode, self.margin, self.gamma = mode, margin, gamma
        self.weighted, self.reduction = weighted, reduction

    @classmethod
    def preset(cls, task: str, **options: Any) -> CircleLoss:
        """The paper's settings for "face", "person" (re-identification) or "retrieval".

        Raises:
            ValueError: another task.
        """
        if task not in PRESETS:
            raise ValueError(f"task must be one of {', '.join(PRESETS)}, got {task!r}")
        return cls(**{**PRESETS[task], **options})

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.ndim != 2 or target.shape != prediction.shape[:1]:
            raise ValueError(f"expected (N, D) and (N,), got {tuple(prediction.shape)} and {tuple(target.shape)}")
        if not prediction.is_floating_point() or target.is_floating_point():
            kinds = f"{prediction.dtype} and {target.dtype}"
            raise TypeError(f"expected floating features and integer classes, got {kinds}")
        if self.mode == "class":
            similarity = prediction.to(torch.promote_types(prediction.dtype, torch.float32))  # (N, K)
            positive = F.one_hot(target, prediction.shape[1]).bool()
            negative = ~positive
        else:
            similarity = cosine_similarity(prediction)  # (N, N)
            same = target[:, None] == target
            positive, negative = same & ~torch.eye(len(target), dtype=torch.bool, device=same.device), ~same
        if self.mode == "global":
            upper = positive.triu(1), negative.triu(1)
            similarity, positive, negative = (t.reshape(1, -1) for t in (similarity, *upper))
        value, counted = self._rows(similarity, positive, negative)  # (N,) each, or (1,)
        if self.reduction == "none":
            return value
        total = value.sum()
        return total if self.reduction == "sum" else total / counted.sum().clamp(min=1)

    def _rows(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row's pairs, and which rows have pairs of both kinds."""
        logit_p, logit_n = pair_logits(similarity, self.margin, self.gamma, weighted=self.weighted)
        pull = logit_p.masked_fill(~positive, _NOTHING).logsumexp(1)
        push = logit_n.masked_fill(~negative, _NOTHING).logsumexp(1)
        value = F.softplus(pull + push, threshold=60.0)  # torch's 20 would drop 2e-9
        return value, positive.any(1) & negative.any(1)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, margin={self.margin}, gamma={self.gamma}, weighted={self.weighted}"
