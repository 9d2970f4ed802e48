"""The convolution in front of the norm: every filter is used without its mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def centre(weight: Tensor) -> Tensor:
    """(K, C/groups, h, w) filters without their mean over (C/groups, h, w)."""
    return weight - weight.mean((1, 2, 3), keepdim=True)


class _Centre(torch.autograd.Function):
    """``centre`` is its own transpose, so that its gradient is one more centring instead of a chain of copies."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return centre(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Centre.apply(grad)


class CenConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` whose filters are centred at every use; a constant added to a whole filter changes nothing.

    Arguments as of ``torch.nn.Conv2d``, by keyword after the first three, except that ``bias`` is off: the norm behind
    has one. Filters start from Kaiming noise.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Any, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **{"bias": False, **options})

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int | None = None, **options: Any) -> CenConv2d:
        """Take over a convolution's shape, weights and bias. Options are the norm's; none concerns a convolution.

        Raises:
            TypeError: ``old`` is no ``Conv2d``.
        """
        if not isinstance(old, nn.Conv2d):
            raise TypeError(f"expected a torch.nn.Conv2d, got {type(old).__name__}")
        with torch.device("meta"):  # the weights come from the old layer: none are drawn
            new = cls(
                old.in_channels,
                old.out_channels,
                old.kernel_size,
                stride=old.stride,
                padding=old.padding,
                dilation=old.dilation,
                groups=old.groups,
                bias=old.bias is not None,
                padding_mode=old.padding_mode,
            )
        new.weight = nn.Parameter(old.weight.detach().clone(), old.weight.requires_grad)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().clone(), old.bias.requires_grad)
        return new.train(old.training)

    def forward(self, x: Tensor) -> Tensor:
        weight = _Centre.apply(self.weight) if self.training else centre(self.weight)
        return self._conv_forward(x, weight, self.bias)
