"""How a sigmoid classifier starts where nearly all is background: at a small probability everywhere."""

from __future__ import annotations

import math

from torch import Tensor, nn


def prior_bias(prior: float = 0.01) -> float:
    """The bias -log((1 - prior) / prior) at which a sigmoid gives ``prior``. Raises ValueError outside (0, 1)."""
    if not 0 < prior < 1:
        raise ValueError(f"prior must lie in (0, 1), got {prior}")
    return -math.log((1 - prior) / prior)


def init_classifier(layer: nn.Module, *, prior: float = 0.01, std: float | None = 0.01) -> None:
    """Start a sigmoid classifier's last layer, linear or convolution, at a probability of ``prior`` everywhere.

    Focal loss starts at 0.01 (arXiv:1708.02002, section 4.1), the equalization loss at 0.001.

    Args:
        layer: with ``weight`` and ``bias``.
        prior: pi.
        std: of the normal weights; None leaves them.

    Raises:
        ValueError: a layer without bias, or a prior outside (0, 1).
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(bias, Tensor) or not isinstance(weight, Tensor):
        raise ValueError(f"expected a layer with weight and bias, got {type(layer).__name__}")
    nn.init.constant_(bias, prior_bias(prior))
    if std is not None:
        nn.init.normal_(weight, std=std)
