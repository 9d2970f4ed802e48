"""NT-Xent, and the two losses that the paper compares it with. Each sees both views' embeddings, (N, E) and (N, E)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.training.simclr.gather import gather_rows, processes

Reduction = Literal["mean", "sum", "none"]
#: What the authors subtract from an embedding's similarity to itself, so that it is no candidate.
MASKED = 1e9


@dataclass(frozen=True)
class Similarities:
    """Cosines of this process's 2n embeddings with all 2M: first views above second ones, on both axes.

    ``cosine`` (2n, 2M), ``positive`` and ``own`` (2n,) the columns of the other view and of the embedding itself,
    ``share`` what turns a sum over rows into the mean over the rows of all processes, once averaged over these.
    """

    cosine: Tensor
    positive: Tensor
    own: Tensor
    share: float

    def negatives(self) -> Tensor:
        """(2n, 2M) bool: neither the embedding itself nor its other view."""
        columns = torch.arange(self.cosine.shape[1], device=self.cosine.device)
        return (columns != self.own[:, None]) & (columns != self.positive[:, None])

    def of_positives(self) -> Tensor:
        """(2n,) cosines of the positive pairs."""
        return self.cosine.gather(1, self.positive[:, None])[:, 0]


def similarities(first: Tensor, second: Tensor, *, gather: bool = True) -> Similarities:
    """Cosines of two views' embeddings (n, E) with those of all processes, in float32 or better.

    Raises:
        ValueError: the shapes differ or are not (N, E).
    """
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"expected two tensors (N, E), got {tuple(first.shape)} and {tuple(second.shape)}")
    with torch.autocast(first.device.type, enabled=False):
        both = torch.stack([first, second], 1)  # (n, 2, E)
        both = F.normalize(both.double() if both.dtype == torch.float64 else both.float(), dim=-1)
        everyone, start = gather_rows(both) if gather else (both, 0)  # (M, 2, E)
        rows = both.transpose(0, 1).flatten(0, 1)  # (2n, E)
        cosine = rows @ everyone.transpose(0, 1).flatten(0, 1).T  # (2n, 2M)
    n, total = len(first), len(everyone)
    here = torch.arange(start, start + n, device=first.device)
    world = processes()[1] if gather else 1
    share = world / (2 * total) if total else 0.0
    return Similarities(cosine, torch.cat([here + total, here]), torch.cat([here, here + total]), share)


class _PairLoss(nn.Module):
    """Reduction over rows, shared by the losses of this file."""

    def __init__(self, reduction: Reduction, gather: bool) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        self.reduction, self.gather = reduction, gather

    def _reduce(self, rows: Tensor, found: Similarities) -> Tensor:
        if self.reduction == "none":
            return rows
        return rows.sum() * (found.share if self.reduction == "mean" else 1)


class NTXentLoss(_PairLoss):
    """Normalised temperature-scaled cross-entropy (eq. 1): two views (N, E) and (N, E) to their loss.

    All embeddings equal: log(2N - 1). Positives equal and all else orthogonal: log(1 + (2N - 2) exp(-1/tau)). A batch
    of one image has no negatives and gives zero. The scale of embeddings does not matter.

    Args:
        temperature: tau; the paper takes 0.1 on ImageNet and 0.5 on CIFAR-10.
        reduction: "mean" over the 2N rows, "sum", or "none": (2N,), first views' rows first. The authors' code returns
            twice the mean.
        gather: whether the embeddings of all processes are candidates. Then "mean" is scaled so that the average over
            processes, of losses and of gradients, is that of one process with the whole batch.

    Raises:
        ValueError: a temperature that is not positive, an unknown reduction; in ``forward``, shapes that differ.
    """

    def __init__(self, *, temperature: float = 0.1, reduction: Reduction = "mean", gather: bool = True) -> None:
        super().__init__(reduction, gather)
        self.temperature = _positive(temperature)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        found = similarities(first, second, gather=self.gather)
        if not found.cosine.numel():
            return self._reduce(found.cosine.sum(1), found)
        own = F.one_hot(found.own, found.cosine.shape[1]).to(found.cosine.dtype)  # (2n, 2M)
        logits = found.cosine / self.temperature - MASKED * own
        return self._reduce(F.cross_entropy(logits, found.positive, reduction="none"), found)


class NTLogisticLoss(_PairLoss):
    """Logistic loss of each pair (paper, table 2): -log s(u v+ / tau) - mean over negatives of log s(-u v- / tau).

    Args:
        temperature: tau.
        semi_hard: keep one negative for each anchor: the closest one that is farther than the positive; where there is
            none, the farthest.
        reduction, gather: as for ``NTXentLoss``.

    Raises:
        ValueError: as ``NTXentLoss``.
    """

    def __init__(
        self, *, temperature: float = 0.5, semi_hard: bool = False, reduction: Reduction = "mean", gather: bool = True
    ) -> None:
        super().__init__(reduction, gather)
        self.temperature, self.semi_hard = _positive(temperature), semi_hard

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        found = similarities(first, second, gather=self.gather)
        pull = F.softplus(-found.of_positives() / self.temperature)  # (2n,)
        push = _over_negatives(found, lambda cosine: F.softplus(cosine / self.temperature), self.semi_hard)
        return self._reduce(pull + push, found)


class MarginTripletLoss(_PairLoss):
    """Triplets of anchor, positive and negative (paper, table 2): mean over negatives of max(u v- - u v+ + m, 0).

    Args:
        margin: m.
        semi_hard: as for ``NTLogisticLoss``.
        reduction, gather: as for ``NTXentLoss``.

    Raises:
        ValueError: a negative margin, or as ``NTXentLoss``.
    """

    def __init__(
        self, *, margin: float = 0.4, semi_hard: bool = False, reduction: Reduction = "mean", gather: bool = True
    ) -> None:
        super().__init__(reduction, gather)
        if margin < 0:
            raise ValueError(f"margin must be >= 0, got {margin}")
        self.margin, self.semi_hard = margin, semi_hard

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        found = similarities(first, second, gather=self.gather)
        bound = self.margin - found.of_positives()[:, None]  # (2n, 1)
        return self._reduce(_over_negatives(found, lambda cosine: (cosine + bound).clamp(min=0), self.semi_hard), found)


def _over_negatives(found: Similarities, term: Callable[[Tensor], Tensor], semi_hard: bool) -> Tensor:
    """(2n,): the mean of a term over an anchor's negatives, or of the semi-hard one alone; zero without any."""
    negative = found.negatives()
    if not semi_hard:
        return (term(found.cosine) * negative).sum(1) / negative.sum(1).clamp(min=1)
    if not found.cosine.shape[1]:
        return found.cosine.sum(1)
    cosine = found.cosine.detach()
    farther = negative & (cosine < found.of_positives().detach()[:, None])
    closest = cosine.masked_fill(~farther, -2).argmax(1)
    farthest = cosine.masked_fill(~negative, 2).argmin(1)
    chosen = torch.where(farther.any(1), closest, farthest)[:, None]
    picked = term(found.cosine.gather(1, chosen))[:, 0]
    return picked * negative.any(1)


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature
