"""The paper's last classifier: a linear machine for each class, on fixed descriptors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fit_svm(descriptors: Tensor, labels: Tensor, *, cost: float = 1.0, iterations: int = 200) -> nn.Linear:
    """One-vs-rest linear SVMs: |w|^2 / 2 + cost sum max(0, 1 - t (w . z + b))^2 for each class, t being 1 or -1.

    Afterwards each is scaled so that the median score of its own class is 1 and that of the others -1, as in the
    paper, which makes the scores of the classes comparable.

    Args:
        descriptors: (N, F).
        labels: (N,) classes; the largest is K - 1.
        cost: C, the weight of the margin's violations.
        iterations: steps of L-BFGS at most.

    Returns:
        A linear layer to (N, K) scores.

    Raises:
        ValueError: shapes that do not fit, or a class that all or no samples have.
    """
    if descriptors.ndim != 2 or labels.shape != descriptors.shape[:1] or not len(labels):
        raise ValueError(f"expected (N, F) and (N,), got {tuple(descriptors.shape)} and {tuple(labels.shape)}")
    counts = labels.bincount()
    if counts.min() < 1 or len(counts) < 2:
        raise ValueError(f"expected samples of at least two classes and of each, got counts {counts.tolist()}")
    z = descriptors.detach()
    own = torch.nn.functional.one_hot(labels).bool()  # (N, K)
    sign = torch.where(own, 1.0, -1.0).to(z.dtype)
    machine = nn.Linear(z.shape[1], own.shape[1], device=z.device, dtype=z.dtype)
    nn.init.zeros_(machine.weight)
    nn.init.zeros_(machine.bias)
    search = torch.optim.LBFGS(
        machine.parameters(), max_iter=iterations, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        loss = machine.weight.square().sum() / 2 + cost * (1 - sign * machine(z)).clamp_min(0).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(closure)
    with torch.no_grad():
        scores = machine(z)
        nan = torch.full_like(scores, float("nan"))
        above = torch.where(own, scores, nan).nanmedian(0).values
        below = torch.where(own, nan, scores).nanmedian(0).values
        scale = 2 / (above - below).clamp_min(1e-12)
        machine.weight.mul_(scale[:, None])
        machine.bias.copy_((machine.bias - (above + below) / 2) * scale)
    return machine.requires_grad_(False)
