"""The convolution between two pairs of maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.blocks.octconv.pair import Octave, enlarge, join, pool, split

Size = int | tuple[int, ...]


def relative_operations(alpha_in: float, alpha_out: float) -> float:
    """Operations of the four paths over those of a plain convolution; 1 - 3/4 a (2 - a) where both shares are a."""
    return 1 - 0.75 * (alpha_in + alpha_out - alpha_in * alpha_out)


def relative_memory(alpha: float) -> float:
    """Numbers in a pair of maps over those in one map of as many channels."""
    return 1 - 0.75 * alpha


class OctaveConv(nn.Module):
    """A pair of maps to a pair of maps; a plain map (N, C, H, W) stands where a share is zero.

    With ``alpha_in = alpha_out = 0`` and a stride of 1 it is a plain convolution. Weights of a plain convolution of the
    same arguments load into it.

    Args:
        in_channels, out_channels: of both parts together.
        kernel_size: odd side of the window, or one number for each axis.
        alpha_in, alpha_out: shares of the channels at half resolution, in [0, 1]; the paper's a_in and a_out.
        stride: 1 or 2 for height and width; clips may have any for the frames.
        padding: None keeps the size; another is allowed for the frames, and for plain maps at both ends.
        dilation: distance of the window's taps.
        groups: groups of each path; as many as channels is depthwise, which has no exchange.
        bias: whether there is an offset; it is added once to each part.
        downsampling: "pool" averages before the convolution; "strided" skips positions instead, which shifts the low
            map by half a pixel (the paper's ablation).
        exchange: whether the parts are told of each other.
        plain: whether a plain map is taken and given in the place of a pair: split before, joined after.
        ndim: 2 for images, 3 for clips.

    Raises:
        ValueError: shares outside [0, 1], an even window, padding that changes the size of a pair, a stride other than
            1 or 2, or channels that do not divide into the groups; in ``forward``, other channels or a plain map where
            a pair is expected.
    """

    high_to_high: nn.Parameter | None
    low_to_high: nn.Parameter | None
    high_to_low: nn.Parameter | None
    low_to_low: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        alpha_in: float = 0.5,
        alpha_out: float = 0.5,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        downsampling: Literal["pool", "strided"] = "pool",
        exchange: bool = True,
        plain: bool = False,
        ndim: Literal[2, 3] = 2,
    ) -> None:
        super().__init__()
        if not (0 <= alpha_in <= 1 and 0 <= alpha_out <= 1):
            raise ValueError(f"alpha_in and alpha_out must be in [0, 1], got {alpha_in} and {alpha_out}")
        if downsampling not in ("pool", "strided") or ndim not in (2, 3):
            raise ValueError(f"downsampling must be pool or strided and ndim 2 or 3, got {downsampling!r} and {ndim}")
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"{groups} groups do not divide {in_channels} and {out_channels} channels")
        self.in_channels, self.out_channels, self.groups, self.ndim = in_channels, out_channels, groups, ndim
        self.kernel_size, self.dilation = _tuple(kernel_size, ndim), _tuple(dilation, ndim)
        same = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        self.padding = same if padding is None else _tuple(padding, ndim)
        *frames, height, width = _tuple(stride, ndim)
        if height != width or height not in (1, 2):
            raise ValueError(f"stride must be 1 or 2 for height and width, got {stride}")
        self.stride, self.frame_stride = height, tuple(frames)
        self.downsampling, self.exchange, self.plain = downsampling, exchange, plain
        self.low_in, self.low_out = (int(a * c + 1e-6) for a, c in ((alpha_in, in_channels), (alpha_out, out_channels)))
        if (self.low_in or self.low_out) and (
            self.padding[-2:] != same[-2:] or any(k % 2 == 0 for k in self.kernel_size[-2:])
        ):
            raise ValueError(
                f"a pair needs odd windows and a padding of {same[-2:]}, got {self.kernel_size[-2:]} and {self.padding}"
            )
        self.depthwise = groups > 1 and groups == in_channels
        self._require_groups()
        self._draw(bias)
        self.register_load_state_dict_pre_hook(_accept_plain_weight)

    def _require_groups(self) -> None:
        low_in, low_out = self.low_in, self.low_out
        if self.depthwise:
            if low_out * self.in_channels != low_in * self.out_channels:
                raise ValueError(
                    f"a depthwise convolution needs one share at both ends, got {low_in} of {self.in_channels} "
                    f"and {low_out} of {self.out_channels} channels"
                )
        elif low_in % self.groups or low_out % self.groups:
            raise ValueError(f"{self.groups} groups do not divide {low_in} and {low_out} low channels")

    def _draw(self, bias: bool) -> None:
        """The four parts of one plain kernel, drawn as ``torch.nn.Conv2d`` draws it."""
        cls: Any = nn.Conv2d if self.ndim == 2 else nn.Conv3d
        whole = cls(self.in_channels, self.out_channels, self.kernel_size, groups=self.groups, bias=bias)
        for name, weight in self._parts(whole.weight.detach()).items():
            self.register_parameter(name, None if weight is None else nn.Parameter(weight.contiguous()))
        self.register_parameter("bias", whole.bias)

    def _parts(self, weight: Tensor) -> dict[str, Tensor | None]:
        """Name -> part of a plain kernel (C_out, C_in / groups, ...); None where the path does not exist."""
        high_in, high_out = self.in_channels - self.low_in, self.out_channels - self.low_out
        if self.depthwise:
            found: dict[str, Tensor | None] = {"high_to_high": weight[:high_out], "low_to_low": weight[high_out:]}
            found |= {"low_to_high": None, "high_to_low": None}
        else:
            at = high_in // self.groups
            found = {"high_to_high": weight[:high_out, :at], "low_to_high": weight[:high_out, at:]}
            found |= {"high_to_low": weight[high_out:, :at], "low_to_low": weight[high_out:, at:]}
        if not self.exchange and self.low_in and self.low_out and high_in and high_out:
            found |= {"low_to_high": None, "high_to_low": None}
        return {name: part if part is not None and part.numel() else None for name, part in found.items()}

    @classmethod
    def from_module(
        cls,
        old: nn.Module,
        *,
        channels: int | None = None,
        alpha_in: float = 0.5,
        alpha_out: float = 0.5,
        **options: Any,
    ) -> OctaveConv:
        """Take over a convolution's shape, weights and bias.

        Raises:
            TypeError: ``old`` is no ``Conv2d`` or ``Conv3d``. ValueError: it pads by reflection, or as the class says.
        """
        if not isinstance(old, nn.Conv2d | nn.Conv3d):
            raise TypeError(f"expected a torch.nn.Conv2d or Conv3d, got {type(old).__name__}")
        if old.padding_mode != "zeros":
            raise ValueError(f"expected padding_mode 'zeros', got {old.padding_mode!r}")
        with torch.device("meta"):  # the weights come from the old layer: none are drawn
            new = cls(
                old.in_channels,
                old.out_channels,
                old.kernel_size,
                alpha_in=alpha_in,
                alpha_out=alpha_out,
                stride=old.stride,
                padding=None
                if old.padding == "same"
                else (0,) * len(old.stride)
                if old.padding == "valid"
                else old.padding,  # type: ignore[arg-type]
                dilation=old.dilation,
                groups=old.groups,
                bias=old.bias is not None,
                ndim=old.weight.ndim - 2,  # type: ignore[arg-type]
                **options,
            )
        for name, weight in new._parts(old.weight.detach()).items():
            if weight is not None:
                setattr(new, name, nn.Parameter(weight.clone(), old.weight.requires_grad))
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().clone(), old.bias.requires_grad)
        return new.train(old.training)

    def forward(self, x: Tensor | Octave) -> Any:
        high, low = self._taken(x)
        high_bias, low_bias = self._biases()
        height, width = high.shape[-2:]
        y_high = y_low = None
        if self.high_to_high is not None:
            y_high = self._convolved(high, self.high_to_high, high_bias, self.stride)
        if self.low_to_high is not None and low is not None:
            y = self._convolved(low, self.low_to_high, high_bias if y_high is None else None, 1)
            y = enlarge(y, height, width) if self.stride == 1 else y
            y_high = y if y_high is None else y_high.add_(y)  # (N, C_h, H, W)
        if self.high_to_low is not None:
            y_low = self._convolved(high, self.high_to_low, low_bias, 2 * self.stride)
        if self.low_to_low is not None and low is not None:
            y = self._convolved(low, self.low_to_low, low_bias if y_low is None else None, self.stride)
            y_low = y if y_low is None else y_low.add_(y)  # (N, C_l, H / 2, W / 2)
        if y_low is None:
            return y_high
        if y_high is None:  # all is low: no channels keep the size
            s = self.stride
            y_high = y_low.new_empty(
                *y_low.shape[:1], 0, *y_low.shape[2:-2], (height + s - 1) // s, (width + s - 1) // s
            )
        pair = Octave(y_high, y_low)
        return join(pair) if self.plain else pair

    def _taken(self, x: Tensor | Octave) -> tuple[Tensor, Tensor | None]:
        wanted = (self.in_channels - self.low_in, self.low_in)
        if isinstance(x, Tensor):
            if x.ndim != self.ndim + 2 or x.shape[1] != self.in_channels:
                axes = "N, C, H, W" if self.ndim == 2 else "N, C, T, H, W"
                raise ValueError(f"expected ({axes}) with C = {self.in_channels}, got shape {tuple(x.shape)}")
            if not self.low_in:
                return x, None
            if not self.plain:
                raise ValueError(f"expected an Octave of {wanted} channels, got a map of shape {tuple(x.shape)}")
            x = split(x, self.low_in)
        if (x.high.shape[1], x.low.shape[1]) != wanted:
            raise ValueError(f"expected an Octave of {wanted} channels, got {x!r}")
        return x.high, x.low

    def _biases(self) -> tuple[Tensor | None, Tensor | None]:
        if self.bias is None:
            return None, None
        at = self.out_channels - self.low_out
        return self.bias[:at], self.bias[at:]

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
        """A path that makes the map ``step`` times smaller."""
        if step > 1 and self.downsampling == "pool":
            x, step = pool(x, step), 1
        groups = x.shape[1] if self.depthwise else self.groups
        convolve = F.conv2d if self.ndim == 2 else F.conv3d
        return convolve(x, weight, bias, (*self.frame_stride, step, step), self.padding, self.dilation, groups)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return f"{text}, low {self.low_in} -> {self.low_out}, groups={self.groups}, bias={self.bias is not None}"


def _tuple(value: Size, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _accept_plain_weight(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Weights of a plain convolution are cut into the parts."""
    assert isinstance(module, OctaveConv)
    weight = state.pop(f"{prefix}weight", None)
    if weight is not None:
        for name, part in module._parts(weight).items():
            if part is not None:
                state[prefix + name] = part
