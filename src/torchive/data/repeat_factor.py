"""Images of rare classes are taken more often: repeat-factor sampling.

Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019, arXiv:1908.03195, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchive.data.drawing import epoch_order, key_seed


def repeat_factors(classes: Sequence[Sequence[int]], threshold: float) -> Tensor:
    """(N,) how many times as often each image is taken: the largest max(1, sqrt(t / f_c)) of the classes it shows.

    f_c is the share of the images that show class c. An image without objects has 1.

    Args:
        classes: of each image, from 0.
        threshold: t; LVIS takes 0.001, the equalization loss 0.0005.

    Raises:
        ValueError: no image, or a threshold outside [0, 1].
    """
    if not len(classes) or not 0 <= threshold <= 1:
        raise ValueError(f"expected images and a threshold in [0, 1], got {len(classes)} and {threshold}")
    shown = [torch.tensor(sorted(set(image)), dtype=torch.long) for image in classes]
    image = torch.repeat_interleave(torch.arange(len(shown)), torch.tensor([len(found) for found in shown]))
    found = torch.cat(shown)
    share = found.bincount() / len(shown)
    factors = torch.ones(len(shown))
    return factors.scatter_reduce(0, image, (threshold / share[found]).sqrt(), "amax")


class RepeatFactorSampler:
    """The order of an epoch, a function of (seed, epoch): as many indices as there are images, each as often as its
    share of all factors says, rounded up or down by one draw for the epoch.

    With factors of 1 this is the plain shuffled order. An image that is taken twice in an epoch is augmented alike.

    Args:
        factors: (N,), as of ``repeat_factors``.
        seed: of the order.
    """

    def __init__(self, factors: Tensor, *, seed: int) -> None:
        self.ends = factors.double().cumsum(0) * (len(factors) / float(factors.double().sum()))
        self.seed = seed

    def order(self, epoch: int) -> list[int]:
        """The indices of an epoch."""
        count = len(self.ends)
        draws = torch.Generator().manual_seed(key_seed("repeat", self.seed, epoch))
        first = float(torch.rand((), generator=draws, dtype=torch.float64).clamp(1e-6, 1 - 1e-6))
        taken = torch.searchsorted(self.ends, torch.arange(count, dtype=torch.float64) + first).clamp(max=count - 1)
        return taken[torch.tensor(epoch_order(count, self.seed, epoch))].tolist()
