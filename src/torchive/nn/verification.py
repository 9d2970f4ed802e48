"""Are two images of one class? The figures of open-set verification, on embeddings of classes never trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Same and different pairs in each fold, as the 6,000 pairs of LFW.
_FOLDS, _PAIRS = 10, 300


def verification(features: Tensor, labels: Tensor, *, false_accepts: float = 0.01) -> dict[str, float]:
    """Four figures, all in 0 to 1, of features (N, D) with classes (N,), compared by cosine.

    - ``verification_accuracy``: right answers at the best threshold of nine folds, on the tenth, over all ten folds of
      300 same and 300 different pairs, drawn from a fixed seed.
    - ``verification_auc``: the chance that a same pair is closer than a different one, over all pairs; ties count half.
    - ``true_accepts``: the share of same pairs over the lowest threshold that lets at most ``false_accepts`` of the
      different pairs pass.
    - ``rank_1``: the share of samples whose nearest other sample is of their class, of the classes with two or more.

    Raises:
        ValueError: shapes that do not fit, or not both a same and a different pair.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"expected features (N, D) and labels (N,), got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    if not 0 < false_accepts < 1:
        raise ValueError(f"false_accepts must lie in (0, 1), got {false_accepts}")
    x = F.normalize(features.float(), dim=1)
    cosine = x @ x.T
    same = labels[:, None] == labels
    upper = torch.ones_like(same).triu(1)
    positive, negative = cosine[same & upper], cosine[~same & upper]
    if not len(positive) or not len(negative):
        raise ValueError(f"expected same and different pairs, got {len(positive)} and {len(negative)}")
    ordered = negative.sort().values
    return {
        "verification_accuracy": best_threshold_accuracy(*drawn_pairs(positive, negative)),
        "verification_auc": _area(positive, ordered),
        "true_accepts": _true_accepts(positive, ordered, false_accepts),
        "rank_1": _rank_1(cosine, same),
    }


def drawn_pairs(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """(10, 300) same and (10, 300) different similarities, without replacement as far as there are enough."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for values in (positive, negative):
        wanted = _FOLDS * _PAIRS
        order = torch.randperm(len(values), generator=generator)
        while len(order) < wanted:
            order = torch.cat([order, torch.randperm(len(values), generator=generator)])
        found.append(values[order[:wanted].to(values.device)].view(_FOLDS, _PAIRS))
    return found[0], found[1]


def best_threshold_accuracy(positive: Tensor, negative: Tensor) -> float:
    """Accuracy over folds (F, P) of same and (F, Q) of different pairs, each at the threshold that serves the others
    best; the lowest such threshold where several do.
    """
    right = 0
    for fold in range(len(positive)):
        rest = torch.arange(len(positive), device=positive.device) != fold
        threshold = _best_threshold(positive[rest].flatten(), negative[rest].flatten())
        right += int((positive[fold] >= threshold).sum() + (negative[fold] < threshold).sum())
    return right / (positive.numel() + negative.numel())


def _best_threshold(positive: Tensor, negative: Tensor) -> Tensor:
    thresholds = torch.cat([positive, negative]).unique()  # sorted
    accepted = len(positive) - torch.searchsorted(positive.sort().values, thresholds)
    rejected = torch.searchsorted(negative.sort().values, thresholds)
    return thresholds[(accepted + rejected).argmax()]


def _area(positive: Tensor, ordered: Tensor) -> float:
    below = torch.searchsorted(ordered, positive)
    up_to = torch.searchsorted(ordered, positive, right=True)
    return float((below + up_to).double().mean() / (2 * len(ordered)))


def _true_accepts(positive: Tensor, ordered: Tensor, false_accepts: float) -> float:
    allowed = int(false_accepts * len(ordered))
    threshold = ordered[len(ordered) - allowed - 1]  # passing means to lie above
    return float((positive > threshold).double().mean())


def _rank_1(cosine: Tensor, same: Tensor) -> float:
    nearest = cosine.clone().fill_diagonal_(-torch.inf).argmax(1)
    counted = same.sum(1) > 1
    hit = same.gather(1, nearest[:, None])[:, 0]
    return float(hit[counted].double().mean())
