"""How much frozen features know: the linear evaluation and the nearest neighbours of the self-supervised literature."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = Tensor | Callable[[int], Tensor]


def knn_accuracy(
    features: Tensor,
    labels: Tensor,
    train_features: Tensor,
    train_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    chunk: int = 4096,
) -> float:
    """Share of features (N, D) that their k nearest training features (M, D) classify rightly.

    Neighbours by cosine vote with weight exp(cosine / temperature) (Wu et al., CVPR 2018, arXiv:1805.01978). k is at
    most M; ``chunk`` rows are compared at once.

    Raises:
        ValueError: no features, shapes that do not fit, or k below one.
    """
    _check(features, labels, train_features, train_labels)
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    classes = int(torch.cat([labels, train_labels]).max()) + 1
    bank = F.normalize(train_features.float(), dim=1)
    right = 0
    for x, y in zip(features.float().split(chunk), labels.split(chunk), strict=True):
        cosine, index = (F.normalize(x, dim=1) @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = x.new_zeros(len(x), classes)
        votes.scatter_add_(1, train_labels[index], (cosine / temperature).exp())
        right += int((votes.argmax(1) == y).sum())
    return right / len(features)


def linear_evaluation(
    features: Tensor,
    labels: Tensor,
    train_features: Features,
    train_labels: Tensor,
    *,
    epochs: int = 90,
    batch_size: int = 4096,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    standardise: bool = False,
    seed: int = 0,
) -> float:
    """Accuracy on features (N, D) of a linear classifier trained on others, with SimCLR's settings as defaults.

    Nesterov SGD, cosine from ``lr`` to zero, weights from zero, no regularisation.

    Args:
        features, labels: (N, D) and (N,), what is scored.
        train_features: (M, D), or a function of the epoch that gives them, for augmented images.
        train_labels: (M,).
        epochs: passes over the training features.
        batch_size: at most M.
        lr: 0.1 batch_size / 256 if None.
        momentum, weight_decay: of SGD.
        standardise: whether each feature is shifted and scaled by the training features' mean and deviation; for
            encoders whose features have another scale than a ResNet's.
        seed: of the order of samples.

    Raises:
        ValueError: as ``knn_accuracy``, or epochs or batch size below one.
    """
    first = train_features(0) if callable(train_features) else train_features
    _check(features, labels, first, train_labels)
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be >= 1, got {epochs} and {batch_size}")
    shift, scale = first.new_zeros(()).float(), first.new_ones(()).float()
    if standardise:
        shift, scale = first.float().mean(0), first.float().std(0, correction=0).clamp_min(1e-6)
    batch_size = min(batch_size, len(first))
    with torch.enable_grad():
        layer = nn.utils.skip_init(nn.Linear, first.shape[1], int(torch.cat([labels, train_labels]).max()) + 1)
        layer.to(first.device)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        rate = 0.1 * batch_size / 256 if lr is None else lr
        sgd = torch.optim.SGD(layer.parameters(), rate, momentum, weight_decay=weight_decay, nesterov=momentum > 0)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs * -(-len(first) // batch_size))
        order = torch.Generator().manual_seed(seed)
        for epoch in range(epochs):
            x = train_features(epoch) if callable(train_features) and epoch else first
            x = (x.float() - shift) / scale
            for rows in torch.randperm(len(x), generator=order).to(x.device).split(batch_size):
                sgd.zero_grad()
                F.cross_entropy(layer(x[rows]), train_labels[rows]).backward()
                sgd.step()
                decay.step()
    with torch.no_grad():
        logits = layer((features.float() - shift) / scale)
    return float((logits.argmax(1) == labels).double().mean())


def few_labels(labels: Tensor, fraction: float, *, seed: int = 0) -> Tensor:
    """Indices of a share of the samples of each class, at least one: 0.01 and 0.1 in the paper's fine-tuning.

    Raises:
        ValueError: a share outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    drawn = torch.Generator().manual_seed(seed)
    kept = []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0].cpu()
        kept.append(rows[torch.randperm(len(rows), generator=drawn)[: max(round(fraction * len(rows)), 1)]])
    return torch.cat(kept).sort().values.to(labels.device)


def with_linear_head(encoder: nn.Module, feature_dim: int, num_classes: int) -> nn.Sequential:
    """Encoder and a linear layer that starts from zero: the classifier that is fine-tuned on few labels.

    SimCLR fine-tunes it whole with Nesterov SGD, 0.05 batch / 256, no warm-up, no weight decay: 60 epochs on 1 % of the
    labels, 30 on 10 %.
    """
    layer = nn.Linear(feature_dim, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(encoder, layer)


def _check(features: Tensor, labels: Tensor, train_features: Tensor, train_labels: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (features, labels, train_features, train_labels)]
    fits = (
        features.ndim == train_features.ndim == 2
        and features.shape[1] == train_features.shape[1]
        and labels.shape == features.shape[:1]
        and train_labels.shape == train_features.shape[:1]
    )
    if not fits or not len(features) or not len(train_features):
        raise ValueError(f"expected features (N, D), labels (N,), and (M, D), (M,) of training; got {shapes}")
