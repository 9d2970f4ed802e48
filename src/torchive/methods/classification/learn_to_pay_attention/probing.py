"""What the paper asks of the maps and of the network: attacks, weak segmentation, pointing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def fgsm(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    eps: float,
    *,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Images moved by eps against the model: x + eps sign(dLoss/dx), cut to [low, high] where given.

    Goodfellow et al., ICLR 2015, arXiv:1412.6572. The model's parameters get no gradient.

    Args:
        model: images to (N, K) scores.
        inputs: (N, C, H, W).
        targets: (N,) true classes.
        eps: size of the step, in the images' unit.
        low, high: the images' range.

    Raises:
        ValueError: a negative ``eps``.
    """
    if eps < 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    with torch.enable_grad():
        images = inputs.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(images), targets), images)
    moved = inputs.detach() + eps * slope.sign()
    return moved if low is None and high is None else moved.clamp(low, high)


def foreground(scores: Tensor, size: tuple[int, int], *, threshold: float = 0.5) -> Tensor:
    """A mask from a map: (N, 1, h, w) compatibilities to (N, H, W) booleans.

    The map is resized and stretched to [0, 1] in each image; positions of at least ``threshold`` are foreground. A flat
    map has no foreground.
    """
    grown = F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    low, high = grown.amin((1, 2), keepdim=True), grown.amax((1, 2), keepdim=True)
    return (grown - low >= threshold * (high - low)) & (high > low)


def pointing_hits(scores: Tensor, masks: Tensor) -> Tensor:
    """Whether the largest value of each map lies on the object: (N, 1, h, w) and (N, H, W) to (N,) booleans."""
    grown = F.interpolate(scores.float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    peak = grown.flatten(1).argmax(1, keepdim=True)
    return masks.flatten(1).bool().gather(1, peak).squeeze(1)
