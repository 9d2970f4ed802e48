"""Guided back-propagation: every ReLU, module or function, stops negative gradients while a context is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _GuidedReLU(torch.autograd.Function):
    """min(max(x, 0), ceiling), whose gradient passes where 0 < x < ceiling and the incoming gradient is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float, inplace: bool) -> Tensor:
        y = x.clamp_(0, ceiling) if inplace else x.clamp(0, ceiling)
        if inplace:
            ctx.mark_dirty(y)
        ctx.save_for_backward((y > 0) & (y < ceiling))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (open_,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * open_, None, None


def guided_relus() -> TorchFunctionMode:
    """A context in which ReLU and ReLU6 are guided."""
    return _Guided()


class _Guided(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if kind is None:
            return func(*args, **kwargs)
        ceiling, always_inplace = kind
        x = args[0] if args else kwargs["input"]
        inplace = always_inplace or bool(args[1] if len(args) > 1 else kwargs.get("inplace", False))
        return _GuidedReLU.apply(x, ceiling, inplace)


def _kind(func: Callable[..., Any]) -> tuple[float, bool] | None:
    """Ceiling and whether it is in place; None for any other function."""
    if func in (F.relu, torch.relu, Tensor.relu):
        return float("inf"), False
    if func in (F.relu_, torch.relu_, Tensor.relu_):
        return float("inf"), True
    if func is F.relu6:
        return 6.0, False
    return None
