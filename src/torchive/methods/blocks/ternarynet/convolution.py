"""Convolutions whose weights are ternary in every pass, and the unit of convolution, batch norm and activation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, Self

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


class _TernaryConv(nn.modules.conv._ConvNd):
    """What both ranks share; ``plain`` is PyTorch's convolution of the rank, which stands behind it in the bases."""

    plain: type[nn.Module]

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
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)  # type: ignore[call-arg,arg-type]
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.precision = precision

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int = 0, precision: Precision = "ternary") -> Self:
        """The ternary form of a plain convolution, with its very weights: they are what training goes on changing.

        Raises:
            ValueError: another layer than PyTorch's convolution of this rank, or an unknown ``precision``.
        """
        if type(old) is not cls.plain:
            raise ValueError(f"expected a {cls.plain.__name__}, got {type(old).__name__}")
        given: Any = old
        shape = {key: getattr(old, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
        new = cls(given.in_channels, given.out_channels, **shape, bias=given.bias is not None, precision=precision)
        new.padding_mode = given.padding_mode
        new._reversed_padding_repeated_twice = given._reversed_padding_repeated_twice
        new.weight, new.bias = given.weight, given.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        rank = len(self.kernel_size)
        if x.ndim != rank + 2 or x.shape[1] != self.in_channels:
            axes = "H, W" if rank == 2 else "T, H, W"
            raise ValueError(f"expected (N, {self.in_channels}, {axes}), got shape {tuple(x.shape)}")
        convolve: Callable[..., Tensor] = self._conv_forward
        if self.precision == "full":
            return convolve(x, self.weight, self.bias)
        signs, scale = quantised(self)
        if self.training:
            value = signs * scale.view(-1, *[1] * (rank + 1))
            return convolve(x, StraightThrough.apply(self.weight, value, None), self.bias)
        y = convolve(x, signs.detach(), None) * scale.view(-1, *[1] * rank)
        return y if self.bias is None else y + self.bias.view(-1, *[1] * rank)  # (N, O, *S)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class TernaryConv2d(_TernaryConv, nn.Conv2d):
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

    plain = nn.Conv2d


class TernaryConv3d(_TernaryConv, nn.Conv3d):
    """Convolution (N, I, T, H, W) to (N, O, T', H', W') with ternary weights: ``TernaryConv2d`` for volumes.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of ``torch.nn.Conv3d``.
        precision: as of ``TernaryConv2d``.

    Raises:
        ValueError: an unknown ``precision``; in ``forward``, an input of another rank or with other channels.
    """

    plain = nn.Conv3d


class TernaryUnit(nn.Sequential):
    """Convolution ``conv``, batch norm ``norm``, activation ``act``; ``pack_ternary`` makes it one counting layer."""

    def __init__(
        self, conv: nn.Conv2d | nn.Conv3d, *, variant: Variant = "smooth", slopes: tuple[float, float]
    ) -> None:
        norm = nn.BatchNorm2d if isinstance(conv, nn.Conv2d) else nn.BatchNorm3d
        act = TernaryTanh(variant=variant, slopes=slopes)
        super().__init__(OrderedDict(conv=conv, norm=norm(conv.out_channels), act=act))


def quantised(conv: _TernaryConv) -> tuple[Tensor, Tensor]:
    """The signs (O, I / groups, *k) and the scale (O,) of a convolution's filters."""
    return binary_weights(conv.weight) if conv.precision == "binary" else ternary_weights(conv.weight)
