"""The balanced classifiers on frozen features: cRT, tau-normalisation, LWS, NCM. Each sees the first stage's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FeatureKind = Literal["un", "l2n", "cl2n"]
#: The grid of the paper.
TAUS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def normalise_weights(weight: Tensor, tau: float | Tensor) -> Tensor:
    """(K, D) rows divided by their length to the power tau: 0 leaves them, 1 makes their lengths one."""
    lengths = weight.norm(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return weight / lengths**tau


def transform_features(features: Tensor, kind: FeatureKind = "cl2n", mean: Tensor | None = None) -> Tensor:
    """(N, D) features as they are ("un"), of unit length ("l2n"), or less a mean (D,) first ("cl2n").

    Raises:
        ValueError: an unknown kind, or "cl2n" without a mean.
    """
    if kind not in ("un", "l2n", "cl2n"):
        raise ValueError(f"kind must be un, l2n or cl2n, got {kind!r}")
    if kind == "un":
        return features
    if kind == "cl2n":
        if mean is None:
            raise ValueError("cl2n features need a mean, got None")
        features = features - mean
    return F.normalize(features, dim=1)


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(K, D) mean feature of each class; zero for a class without samples."""
    counts = labels.bincount(minlength=num_classes).clamp(min=1)
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums / counts[:, None]


def best_tau(features: Tensor, labels: Tensor, weight: Tensor, grid: Sequence[float] = TAUS) -> float:
    """The tau of the grid with the best mean recall on held-out features (N, D); the smallest where several are best.

    Raises:
        ValueError: an empty grid.
    """
    if not len(grid):
        raise ValueError("grid must hold a value, got none")
    recalls = []
    for tau in grid:
        right = (features @ normalise_weights(weight, tau).T).argmax(1) == labels
        recalls.append(torch.stack([right[labels == k].double().mean() for k in labels.unique()]).mean())
    return float(grid[int(torch.stack(recalls).argmax())])


def shot_accuracy(
    predicted: Tensor, labels: Tensor, class_counts: Sequence[int], *, many: int = 100, few: int = 20
) -> dict[str, float]:
    """Accuracy over all samples, and over those of classes with more than ``many`` training samples, with fewer than
    ``few``, and in between ("all", "many", "medium", "few"); parts without samples are left out.
    """
    size = torch.as_tensor(class_counts, device=labels.device)[labels]
    right = (predicted == labels).double()
    parts = {
        "all": torch.ones_like(size, dtype=torch.bool),
        "many": size > many,
        "medium": (size <= many) & (size >= few),
        "few": size < few,
    }
    return {name: float(right[part].mean()) for name, part in parts.items() if part.any()}


class LinearHead(nn.Module):
    """cRT: a linear layer of its own, trained anew."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_channels, num_classes)

    def forward(self, features: Tensor, classifier: nn.Linear) -> Tensor:
        return self.layer(features)  # (N, K)

    def merged(self, classifier: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight (K, D) and bias (K,) of the one linear layer that does the same."""
        return self.layer.weight, self.layer.bias


class TauHead(nn.Module):
    """Rows of the first classifier over their length to the power tau, without bias, times a learned scale.

    Args:
        tau: fixed, or None to learn it from 0.
    """

    def __init__(self, tau: float | None) -> None:
        super().__init__()
        if tau is not None and not 0 <= tau <= 1:
            raise ValueError(f"tau must lie in [0, 1] or be None, got {tau}")
        self.tau: Tensor
        if tau is None:
            self.tau = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("tau", torch.tensor(float(tau)))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor, classifier: nn.Linear) -> Tensor:
        return F.linear(features, self.merged(classifier)[0])  # (N, K)

    def merged(self, classifier: nn.Linear) -> tuple[Tensor, Tensor]:
        """As ``LinearHead.merged``."""
        weight = self.log_scale.exp() * normalise_weights(classifier.weight, self.tau)
        return weight, torch.zeros_like(classifier.bias)


class ScaledHead(nn.Module):
    """LWS: the first classifier's logits, bias included, times a learned scale for each class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(num_classes))

    def forward(self, features: Tensor, classifier: nn.Linear) -> Tensor:
        return classifier(features) * self.scales  # (N, K)

    def merged(self, classifier: nn.Linear) -> tuple[Tensor, Tensor]:
        """As ``LinearHead.merged``."""
        return classifier.weight * self.scales[:, None], classifier.bias * self.scales


class NearestMeanHead(nn.Module):
    """NCM: minus the squared distance to each class mean, or the cosine, times a learned scale.

    Args:
        in_channels: D.
        num_classes: K.
        features: "un", "l2n" or "cl2n"; see ``transform_features``.
        distance: "l2" or "cosine".
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        features: FeatureKind = "cl2n",
        distance: Literal["l2", "cosine"] = "l2",
    ) -> None:
        super().__init__()
        if features not in ("un", "l2n", "cl2n") or distance not in ("l2", "cosine"):
            raise ValueError(
                f"features must be un, l2n or cl2n and distance l2 or cosine, got {features!r} and {distance!r}"
            )
        self.features, self.distance = features, distance
        self.total: Tensor
        self.seen: Tensor
        self.sums: Tensor
        self.counts: Tensor
        self.register_buffer("total", torch.zeros(in_channels))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(num_classes, in_channels))
        self.register_buffer("counts", torch.zeros(num_classes))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def gather(self, features: Tensor, labels: Tensor, *, centre: bool) -> None:
        """Add features (N, D) to the mean for centring, or, afterwards, to the class means."""
        features = features.to(self.sums.dtype)
        if centre:
            self.total += features.sum(0)
            self.seen += len(features)
            return
        self.sums.index_add_(0, labels, transform_features(features, self.features, self.mean))
        self.counts += labels.bincount(minlength=len(self.counts)).to(self.counts)

    @property
    def mean(self) -> Tensor:
        """(D,)"""
        return self.total / self.seen.clamp(min=1)

    @property
    def means(self) -> Tensor:
        """(K, D) of the transformed features."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def forward(self, features: Tensor, classifier: nn.Linear) -> Tensor:
        x, means = transform_features(features, self.features, self.mean), self.means
        if self.distance == "cosine":
            scores = F.linear(F.normalize(x, dim=1), F.normalize(means, dim=1))
        else:
            scores = 2 * F.linear(x, means) - x.square().sum(1, keepdim=True) - means.square().sum(1)
        return self.log_scale.exp() * scores  # (N, K)
