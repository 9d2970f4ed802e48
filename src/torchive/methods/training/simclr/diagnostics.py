"""What a contrastive training does to its embeddings, in figures."""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.training.simclr.loss import MASKED, similarities


def contrastive_accuracy(first: Tensor, second: Tensor, *, candidates: Literal["all", "other"] = "all") -> Tensor:
    """Share of embeddings, (N, E) and (N, E), whose nearest candidate is their other view: a scalar.

    Args:
        first: of one view of each image.
        second: of the other.
        candidates: "all" 2N - 1 as in the loss, or the N of the "other" view, as the authors' code logs it.

    Raises:
        ValueError: shapes that differ, or unknown candidates.
    """
    if candidates not in ("all", "other"):
        raise ValueError(f"candidates must be all or other, got {candidates!r}")
    found = similarities(first, second, gather=False)
    if candidates == "other":
        n = len(first)
        cosine = found.cosine[:n, n:]
        return (cosine.argmax(1) == torch.arange(n, device=cosine.device)).float().mean()
    cosine = found.cosine - MASKED * F.one_hot(found.own, found.cosine.shape[1])
    return (cosine.argmax(1) == found.positive).float().mean()


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of positive pairs on the unit sphere (Wang and Isola, ICML 2020, arXiv:2005.10242)."""
    return (F.normalize(first, dim=-1) - F.normalize(second, dim=-1)).square().sum(-1).mean()


def uniformity(embeddings: Tensor, *, t: float = 2.0) -> Tensor:
    """Log of the mean of exp(-t d^2) over pairs of (N, E) on the unit sphere; lower is more even (arXiv:2005.10242).

    Raises:
        ValueError: fewer than two embeddings.
    """
    if len(embeddings) < 2:
        raise ValueError(f"uniformity is of pairs; expected at least two embeddings, got {len(embeddings)}")
    x = F.normalize(embeddings, dim=-1)
    n = len(x)
    squares = (2 - 2 * x @ x.T).clamp(min=0)
    pairs = torch.triu_indices(n, n, 1, device=x.device)
    return torch.logsumexp(-t * squares[pairs[0], pairs[1]], 0) - torch.tensor(n * (n - 1) / 2).log().to(x)


@torch.no_grad()
def norm_leak(network: nn.Module, views: Tensor, *, group: int) -> dict[str, float]:
    """How much a network finds positives by what its batch norms share, not by what the images show.

    The views pass in training mode in groups, as on separate devices with local statistics: once with both views of an
    image in one group, once with the second views dealt to other groups. The contrastive accuracy that is lost between
    the two is the leak; global statistics, or shuffling as here, close it.

    Args:
        network: images to embeddings (N, E), encoder and head; it is copied, its statistics stay as they are.
        views: (N, 2, C, H, W), or (N, 2, D) for a network of vectors.
        group: images of a group.

    Returns:
        ``together``, ``apart`` and ``leak``, their difference.

    Raises:
        ValueError: fewer than two groups of equal size.
    """
    n = len(views)
    if group < 1 or n % group or n < 2 * group:
        raise ValueError(f"expected at least two groups of equal size, got {n} images in groups of {group}")
    copied = copy.deepcopy(network).train()
    order = torch.arange(n, device=views.device)
    groups, seat = order // group, order % group
    # each seat moves on by another number of groups, none stays in its own
    dealt = (groups + 1 + seat % (n // group - 1)) % (n // group) * group + seat
    found = {}
    for name, second in (("together", order), ("apart", dealt)):
        first_z, second_z = [], []
        for a, b in zip(order.split(group), second.split(group), strict=True):
            z = copied(torch.cat([views[a, 0], views[b, 1]]))
            first_z.append(z[:group])
            second_z.append(z[group:])
        back = torch.cat(second_z)[second.argsort()]
        found[name] = float(contrastive_accuracy(torch.cat(first_z), back))
    return {**found, "leak": found["together"] - found["apart"]}
