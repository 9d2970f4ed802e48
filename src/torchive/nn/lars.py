"""LARS: a learning rate for each layer, after the ratio of its weights' and its gradient's length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg, 2017, arXiv:1708.03888), as SimCLR uses it.

    g + wd w is scaled by ``trust_coefficient |w| / |g + wd w|``, where both lengths are positive, then momentum:
    ``v = m v + lr ratio (g + wd w)``, ``w = w - v``. Parameters of at most one axis (biases, norms) get neither weight
    decay nor ratio.

    Args:
        params: parameters or groups; a group with ``adapt=False`` is left out as biases are.
        lr: learning rate; SimCLR takes 0.3 batch / 256.
        momentum: m.
        weight_decay: wd; SimCLR takes 1e-6.
        trust_coefficient: eta.
        nesterov: look one step of momentum ahead.

    Raises:
        ValueError: a negative argument.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.3,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
        nesterov: bool = False,
    ) -> None:
        if min(lr, momentum, weight_decay, trust_coefficient) < 0:
            raise ValueError(
                f"arguments must be >= 0, got {lr}, momentum {momentum}, weight_decay {weight_decay}, "
                f"trust_coefficient {trust_coefficient}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "nesterov": nesterov,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; with a closure, its value is returned."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            adapted = [p for p in weights if group["adapt"] and p.ndim > 1]
            plain = [p for p in weights if not group["adapt"] or p.ndim <= 1]
            self._update(adapted, group, adapt=True)
            self._update(plain, group, adapt=False)
        return value

    def _update(self, weights: list[Tensor], group: dict[str, Any], *, adapt: bool) -> None:
        if not weights:
            return
        gradients: list[Tensor] = [p.grad for p in weights if p.grad is not None]
        velocities = [self._velocity(p) for p in weights]
        if adapt:
            # weight decay first: the ratio is of the whole step's length
            gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
            lengths = torch.stack(torch._foreach_norm(weights))
            steps = torch.stack(torch._foreach_norm(gradients))
            both = (lengths > 0) & (steps > 0)
            ratios = torch.where(both, group["trust_coefficient"] * lengths / steps, 1.0)
            updates = list(torch._foreach_mul(gradients, list((group["lr"] * ratios).unbind())))
        else:
            updates = list(torch._foreach_mul(gradients, group["lr"]))
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        if group["nesterov"]:
            torch._foreach_add_(updates, velocities, alpha=group["momentum"])
            torch._foreach_sub_(weights, updates)
        else:
            torch._foreach_sub_(weights, velocities)

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        velocity: Tensor = state["velocity"]
        return velocity
