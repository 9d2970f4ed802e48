"""The ternary hyperbolic tangent, and the schedule that sharpens it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Variant = Literal["smooth", "straight_through", "binary", "relu"]
VARIANTS = ("smooth", "straight_through", "binary", "relu")


def soft_ternary(x: Tensor, slope: float | Tensor) -> Tensor:
    """``tanh(b (2 x - 1)) / 2 + tanh(b (2 x + 1)) / 2``: odd, in (-1, 1), with steps at -1/2 and 1/2 of slope b."""
    wide = 2 * slope * x
    return 0.5 * ((wide - slope).tanh() + (wide + slope).tanh())


class _Soft(torch.autograd.Function):
    """``soft_ternary`` that keeps its slope at each place: one map for the way back, where autograd alone keeps two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        wide = 2 * slope * x
        low, high = (wide - slope).tanh_(), wide.add_(slope).tanh_()
        y = (low + high).mul_(0.5)
        ctx.save_for_backward(low.mul_(low).addcmul_(high, high).sub_(2).mul_(-slope))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None


def hard_ternary(x: Tensor) -> Tensor:
    """``sign(x) [ |x| > 1/2 ]``: -1, 0 or 1, of the type of ``x``."""
    return (x > 0.5).to(x.dtype) - (x < -0.5).to(x.dtype)


class StraightThrough(torch.autograd.Function):
    """A value that is computed from ``x``; its gradient is that of ``x`` where ``passes`` (everywhere if None)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, passes: Tensor | None) -> Tensor:
        if passes is not None:
            ctx.save_for_backward(passes)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad * ctx.saved_tensors[0] if ctx.saved_tensors else grad), None, None


class TernaryTanh(nn.Module):
    """Map of any shape to the same shape, towards -1, 0 and 1: soft in training, hard in evaluation.

    The slope follows ``before_step(progress)`` from the first of ``slopes`` to the last. Torchive's training loop calls
    it before each step; a loop of your own does so for every module that has it.

    Args:
        variant: "smooth" is the paper's; "straight_through" is hard in training, too, and its gradient is that of x
            where |x| <= 1; "binary" gives -1 or 1 instead, with the same gradient; "relu" is a plain ReLU, for weights
            that are ternary alone.
        slopes: of the first and the last step.
        hard: whether evaluation takes the limit; otherwise it takes the slope reached, as the paper's control does.

    Raises:
        ValueError: an unknown ``variant``, or slopes that are not above zero.
    """

    slope: Tensor

    def __init__(
        self, *, variant: Variant = "smooth", slopes: tuple[float, float] = (3.0, 8.0), hard: bool = True
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if not isinstance(slopes, Sequence) or len(slopes) != 2 or min(slopes) <= 0:
            raise ValueError(f"slopes must be two numbers above zero, got {slopes}")
        self.variant, self.slopes, self.hard = variant, (float(slopes[0]), float(slopes[1])), hard
        self.register_buffer("slope", torch.tensor(self.slopes[0]))
        self.register_load_state_dict_pre_hook(_without_slope)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int = 0, **options: Any) -> TernaryTanh:
        """The activation that takes another's place; an activation has no weights to take over."""
        return cls(**options)

    def before_step(self, progress: float) -> None:
        """Set the slope for the share of the run that is done, in [0, 1]."""
        first, last = self.slopes
        self.slope.fill_(first + min(max(progress, 0.0), 1.0) * (last - first))

    def forward(self, x: Tensor) -> Tensor:
        if self.variant == "relu":
            return x.relu()
        if self.variant == "smooth" and (self.training or not self.hard):
            slope = self.slope.to(x.dtype)
            lean = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            return _Soft.apply(x, slope) if lean else soft_ternary(x, slope)
        value = hard_ternary(x) if self.variant != "binary" else torch.where(x < 0, -1.0, 1.0).to(x.dtype)
        if self.training:
            return StraightThrough.apply(x, value, x.abs() <= 1)
        return value

    def extra_repr(self) -> str:
        return f"variant={self.variant}, slopes={self.slopes}"


def _without_slope(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights of a network with other activations load, too; the slope stays."""
    state.setdefault(f"{prefix}slope", module.slope)
