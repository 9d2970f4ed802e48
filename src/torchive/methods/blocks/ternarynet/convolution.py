"""Convolutions whose weights are ternary in every pass, and the unit of convolution, batch norm and activation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.blocks.ternarynet.activation import StraightThrough, TernaryTanh, Variant

Precision = Literal["ternary", "binary", "full"]
PRECISIONS = ("ternary", "binary", "full")


def ternary_weights(weight: Tensor, threshold: float = 0.7) -> tuple[Tensor, Tensor]:
    """Signs in {-1, 0, 1} of the weight's shape (O, ...), and the scale a of each filter (O,).

    d = ``threshold`` mean |W|; a, the mean of |W| over |W| > d, is the least-squares scale of these signs.
    """
    sizes = weight.flatten(1).abs()  # (O, K)
    kept = sizes > threshold * sizes.mean(1, keepdim=True)
    scale = (sizes * kept).sum(1) / kept.sum(1).clamp(min=1)  # (O,)
    return weight.sign() * kept.view_as(weight), scale


def binary_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signs in {-1, 1} and the scale mean |W| of each filter: XNOR-Net (Rastegari et al., arXiv:1603.05279)."""
    return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype), weight.flatten(1).abs().mean(1)


class TernaryConv2d(nn.Conv2d):
    """Convolution (N, I, H, W) to (N, O, H', W') whose weights are -1, 0 or 1 times one scale for each filter.

    The stored weights are real numbers; each pass makes the ternary ones anew, and their gradient is the stored ones'.
    In evaluation the signs alone are convolved and the sums scaled, so that ternary inputs give exact whole sums: what
    ``pack_ternary`` counts bit by bit. Gradients in evaluation are those of that function, with the signs held.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``torch.nn.Conv2d``.
        precision: "ternary", "binary" (signs times the mean size, as XNOR-Net) or "full", a plain convolution.

    Raises:
        ValueError: an unknown ``precision``; in ``forward``, an input of another rank or with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        precision: Precision = "ternary",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.precision = _checked(precision)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int = 0, precision: Precision = "ternary") -> TernaryConv2d:
        """The ternary form of a plain convolution, with its very weights: they are what training goes on changing.

        Raises:
            ValueError: another layer than ``torch.nn.Conv2d``, or an unknown ``precision``.
        """
        return _taken_over(cls, nn.Conv2d, old, precision)

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class TernaryConv3d(nn.Conv3d):
    """Convolution (N, I, T, H, W) to (N, O, T', H', W') with ternary weights: ``TernaryConv2d`` for volumes.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``torch.nn.Conv3d``.
        precision: as of ``TernaryConv2d``.

    Raises:
        ValueError: an unknown ``precision``; in ``forward``, an input of another rank or with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        *,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        precision: Precision = "ternary",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.precision = _checked(precision)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int = 0, precision: Precision = "ternary") -> TernaryConv3d:
        """As of ``TernaryConv2d``, of a ``torch.nn.Conv3d``."""
        return _taken_over(cls, nn.Conv3d, old, precision)

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(self, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class TernaryUnit(nn.Sequential):
    """Convolution ``conv``, batch norm ``norm``, activation ``act``; ``pack_ternary`` makes it one counting layer."""

    def __init__(
        self, conv: nn.Conv2d | nn.Conv3d, *, variant: Variant = "smooth", slopes: tuple[float, float]
    ) -> None:
        norm = nn.BatchNorm2d if isinstance(conv, nn.Conv2d) else nn.BatchNorm3d
        act = TernaryTanh(variant=variant, slopes=slopes)
        super().__init__(OrderedDict(conv=conv, norm=norm(conv.out_channels), act=act))


def quantised(conv: TernaryConv2d | TernaryConv3d) -> tuple[Tensor, Tensor]:
    """The signs (O, I / groups, *k) and the scale (O,) of a convolution's filters."""
    return binary_weights(conv.weight) if conv.precision == "binary" else ternary_weights(conv.weight)


def _checked(precision: Precision) -> Precision:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def _convolve(conv: Any, x: Tensor) -> Tensor:
    rank = len(conv.kernel_size)
    if x.ndim != rank + 2 or x.shape[1] != conv.in_channels:
        axes = "H, W" if rank == 2 else "T, H, W"
        raise ValueError(f"expected (N, {conv.in_channels}, {axes}), got shape {tuple(x.shape)}")
    convolve: Callable[..., Tensor] = conv._conv_forward
    if conv.precision == "full":
        return convolve(x, conv.weight, conv.bias)
    signs, scale = quantised(conv)
    if conv.training:
        value = signs * scale.view(-1, *[1] * (rank + 1))
        weight = StraightThrough.apply(conv.weight, value, None)
        return convolve(x, weight, conv.bias)
    y = convolve(x, signs.detach(), None) * scale.view(-1, *[1] * rank)
    return y if conv.bias is None else y + conv.bias.view(-1, *[1] * rank)  # (N, O, *S)


def _taken_over(cls: Any, plain: type[nn.Module], old: Any, precision: Precision) -> Any:
    if type(old) is not plain:
        raise ValueError(f"expected a {plain.__name__}, got {type(old).__name__}")
    shape = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
    new = cls(old.in_channels, old.out_channels, **shape, bias=old.bias is not None, precision=precision)
    new.padding_mode, new._reversed_padding_repeated_twice = old.padding_mode, old._reversed_padding_repeated_twice
    new.weight, new.bias = old.weight, old.bias
    return new
