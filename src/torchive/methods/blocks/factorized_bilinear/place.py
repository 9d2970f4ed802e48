"""Where the layer goes in a network of somebody else's: in the place of the classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torchive.methods.blocks.factorized_bilinear.layer import FactorizedBilinear, FactorizedBilinearConv
from torchive.nn.rewriting import Rewriting


def factorize_classifier(
    network: nn.Module,
    *,
    example: Any = None,
    matches: Callable[[str], bool] | None = None,
    rank: int = 20,
    drop: float = 0.5,
    diagonal: bool = True,
    signed: bool = False,
    shared_drop: bool = False,
) -> Rewriting:
    """Put the layer in the place of the last linear layer, in place; its weights stay as the linear part.

    Args:
        network: any network.
        example: not used; its layers need not run.
        matches: which dotted names may change; where it tells layers apart, all linear layers that it names are
            replaced, or convolutions if it names no linear layer.
        rank: k, as the other options see ``FactorizedBilinear``.
        drop: share of the factors that is dropped in training.
        diagonal: whether products of a feature with itself count.
        signed: whether every other factor is subtracted.
        shared_drop: whether one mask serves all outputs and samples.

    Returns:
        What was changed, with ``undo()``.

    Raises:
        ValueError: no such layer, or one that the layer cannot take the place of.
    """
    inside = [n for n, m in network.named_modules() if isinstance(m, FactorizedBilinear | FactorizedBilinearConv)]
    layers = {
        name: module
        for name, module in network.named_modules()
        if name and isinstance(module, nn.Linear | nn.Conv2d) and not any(name.startswith(f"{i}.") for i in inside)
    }
    named = [name for name in layers if matches is None or matches(name)]
    linear = [name for name in named if isinstance(layers[name], nn.Linear)]
    if len(named) == len(layers):  # nothing is told apart: the classifier alone
        linear, named = linear[-1:], []
    chosen = linear or named
    if not chosen:
        raise ValueError(
            f"expected a linear layer, or a convolution that where= names; {type(network).__name__} has none"
        )
    options: dict[str, Any] = {"rank": rank, "drop": drop, "diagonal": diagonal}
    options |= {"signed": signed, "shared_drop": shared_drop}
    result = Rewriting(network)
    try:
        for name in chosen:
            old = layers[name]
            channels = old.in_channels if isinstance(old, nn.Conv2d) else old.in_features
            result.put(name, FactorizedBilinear.from_module(old, channels=channels, **options))
    except ValueError:
        result.undo()
        raise
    return result
