"""The two steps of expectation-maximisation on features, and what they raise."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def l2_normalised(bases: Tensor) -> Tensor:
    """(N, C, K) with each column divided by 1e-6 plus its length."""
    return bases / (EPS + bases.norm(dim=1, keepdim=True))


def expectation(x: Tensor, bases: Tensor, temperature: float = 1.0) -> Tensor:
    """Responsibilities: (N, C, L) features and (N, C, K) bases to (N, L, K); each row's sum is one."""
    scores = torch.bmm(x.transpose(1, 2), bases)
    return (scores if temperature == 1 else scores / temperature).softmax(2)


def maximisation(x: Tensor, z: Tensor) -> Tensor:
    """Bases of length one: (N, C, L) features and (N, L, K) responsibilities to (N, C, K).

    The division by the pixels' sum is done on the C x K result, not on the L x K weights, which is the same.
    """
    return l2_normalised(torch.bmm(x, z) / (EPS + z.sum(1, keepdim=True)))


def log_likelihood(x: Tensor, bases: Tensor, temperature: float = 1.0) -> Tensor:
    """sum_l log sum_k exp(x_l . mu_k / tau): (N, C, L) and (N, C, K) to (N,).

    With bases of length one these steps are exact EM for a mixture of von Mises-Fisher distributions with equal weights
    and one concentration, so this never falls from one step to the next.
    """
    return (torch.bmm(x.transpose(1, 2), bases) / temperature).logsumexp(2).sum(1)
