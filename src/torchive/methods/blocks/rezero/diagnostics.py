"""What a network does at its start: every alpha, and the singular values of its input-output Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchive.methods.blocks.rezero.gate import ReZero
from torchive.methods.blocks.rezero.transformer import ReZeroDecoderLayer, ReZeroEncoderLayer


def residual_weights(model: nn.Module) -> dict[str, Tensor]:
    """Dotted name of every alpha in a network -> its value, in the order of the network."""
    kinds = (ReZero, ReZeroEncoderLayer, ReZeroDecoderLayer)
    places = [(name, m.alpha) for name, m in model.named_modules() if isinstance(m, kinds)]
    return {f"{name}.alpha".lstrip("."): alpha.detach() for name, alpha in places}


def jacobian_singular_values(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Singular values, largest first, of J = d function(x) / dx, both flattened, x one sample with its batch axis.

    Memory grows with (values out) x (values in). Identity at the start means that all are one.
    """
    matrix = torch.func.jacrev(lambda v: function(v.view_as(x)).flatten())(x.flatten())  # (out, in)
    return torch.linalg.svdvals(matrix)


def mean_squared_singular_value(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """chi, the squared Frobenius norm of J over the number of inputs; 1 is what training at any depth wants.

    Args:
        function: of x; a network in eval mode.
        x: one sample with its batch axis.
        probes: random directions with entries of -1 and 1 that estimate it without bias, for what is too large to write
            down; None computes it exactly.
        generator: of the probes.

    Raises:
        ValueError: ``probes`` below one.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be None or >= 1, got {probes}")
    if probes is None:
        return float(jacobian_singular_values(function, x).detach().square().sum() / x.numel())
    total = 0.0
    for _ in range(probes):
        v = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
        total += float(torch.func.jvp(function, (x,), (v,))[1].detach().square().sum())
    return total / (probes * x.numel())
