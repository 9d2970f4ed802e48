"""The convolution whose taps are moved, position by position, by a second convolution."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from torchive.ops.sampling import corners, rows_of, weighted_rows

Mode = Literal["auto", "operator", "plain"]
Pair = tuple[int, int]


def tap_positions(
    offset: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """p0 + pn + dpn of eq. 2: offsets (N, 2 G K, H', W') to rows and columns (N, H', W', K, G), in cells of the input.

    Offsets come as (dy, dx) for each tap of each group, the groups outermost.
    """
    taps = kernel_size[0] * kernel_size[1]
    height, width = offset.shape[2:]
    moved = offset.unflatten(1, (-1, taps, 2)).permute(3, 0, 4, 5, 2, 1)  # (2, N, H', W', K, G)
    kind: dict[str, Any] = {"device": offset.device, "dtype": offset.dtype}
    start_y = torch.arange(height, **kind) * stride[0] - padding[0]
    start_x = torch.arange(width, **kind) * stride[1] - padding[1]
    tap_y = (torch.arange(kernel_size[0], **kind) * dilation[0]).repeat_interleave(kernel_size[1])
    tap_x = (torch.arange(kernel_size[1], **kind) * dilation[1]).repeat(kernel_size[0])
    grid_y = start_y.view(-1, 1, 1, 1) + tap_y.view(-1, 1)  # (H', 1, K, 1)
    grid_x = start_x.view(-1, 1, 1) + tap_x.view(-1, 1)  # (W', K, 1)
    return (moved[0] + grid_y).contiguous(), (moved[1] + grid_x).contiguous()


def deform_conv(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mode: Mode = "auto",
) -> Tensor:
    """y(p0) = sum_n w(pn) m_n x(p0 + pn + dpn): (N, C, H, W) and (N, 2 G K, H', W') to (N, O, H', W').

    Args:
        offset: dpn in cells, (dy, dx) for each of the K taps of each of G offset groups.
        weight: (O, C / groups, kh, kw); bias: (O,).
        mask: m_n, (N, G K, H', W'); ones if None.
        mode: "operator" is torchvision's, "plain" is made of tensor operations; "auto" is plain on the CPU, where it
            is the faster one, and in graphs.
    """
    if mode == "auto":
        mode = "operator" if x.device.type == "cuda" and not torch.compiler.is_compiling() else "plain"
    kind = torch.promote_types(x.dtype, torch.float32)  # positions need more digits than half precision has
    offset, mask = offset.to(kind), None if mask is None else mask.to(kind)
    if mode == "operator":
        y = deform_conv2d(
            x.to(kind),
            offset,
            weight.to(kind),
            None if bias is None else bias.to(kind),
            stride,
            padding,
            dilation,
            mask,
        )
        return y.to(x.dtype, memory_format=_format(x))
    columns = _columns(x.to(kind), offset, mask, weight.shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
    y = _product(columns.to(x.dtype), weight, bias)  # (N, H', W', O)
    y = y.permute(0, 3, 1, 2)
    return y if torch.compiler.is_compiling() else y.contiguous(memory_format=_format(x))


def _columns(
    x: Tensor, offset: Tensor, mask: Tensor | None, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """The sampled taps, (N, H', W', K, C)."""
    batch, channels, height, width = x.shape
    taps = kernel[0] * kernel[1]
    groups = offset.shape[1] // (2 * taps)
    y_at, x_at = tap_positions(offset, kernel, stride, padding, dilation)  # (N, H', W', K, G)
    index, share = corners(y_at, x_at, height, width)  # (N, H', W', K, G, 4)
    if mask is not None:
        share = share * mask.unflatten(1, (groups, taps)).permute(0, 3, 4, 2, 1).unsqueeze(-1)
    image = torch.arange(batch, device=x.device, dtype=index.dtype).view(-1, 1, 1, 1, 1, 1) * (height * width)
    index = index + image
    if groups > 1:
        index = index * groups + torch.arange(groups, device=x.device, dtype=index.dtype).view(-1, 1)
    sampled = weighted_rows(rows_of(x, groups), index.flatten(0, 4), share.flatten(0, 4))  # (N H' W' K G, C / G)
    return sampled.reshape(batch, *offset.shape[2:], taps, channels)


def _product(columns: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Taps (N, H', W', K, C) times (O, C / groups, kh, kw) to (N, H', W', O)."""
    out_channels, width = weight.shape[:2]
    groups = columns.shape[-1] // width
    if groups == 1:
        rows, flat = columns.flatten(3), weight.permute(0, 2, 3, 1).reshape(out_channels, -1)
        if not rows.is_cpu or torch.compiler.is_compiling() or rows.shape[0] * rows.shape[1] < 16:
            return F.linear(rows, flat, bias)
        # on one core a convolution of many rows is up to twice as fast as the matrix product that it is
        y = F.conv2d(rows.flatten(0, 1).permute(0, 2, 1).unsqueeze(2), flat[:, :, None, None], bias)
        return y.squeeze(2).permute(0, 2, 1).unflatten(0, rows.shape[:2])
    matrix = weight.flatten(2)  # (O, C / groups, K)
    if width == 1 and out_channels == groups:  # depthwise
        y = (columns * matrix[:, 0].T).sum(3)
    else:
        y = torch.einsum("nhwkgc,gock->nhwgo", columns.unflatten(4, (groups, width)), matrix.unflatten(0, (groups, -1)))
        y = y.flatten(3)
    return y if bias is None else y + bias


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class DeformConv2d(nn.Module):
    """(N, C, H, W) to (N, O, H', W') as ``torch.nn.Conv2d``, with taps that a convolution of the same input moves.

    A new layer is a plain convolution: offsets start at zero, and a mask at 1/2.

    Args:
        in_channels, out_channels: C and O.
        kernel_size, stride, padding, dilation, groups: as of ``torch.nn.Conv2d``, numbers or pairs.
        offset_groups: G groups of channels with offsets of their own; 1 and 4 in the releases.
        bias: whether there is an offset of the output.
        modulated: version 2: each tap is also weighted by a sigmoid of the second convolution.
        rate: multiple of the learning rate for the second convolution (``parameter_rules``); version 2 takes 0.1.
        mode: "operator" is torchvision's, "plain" is made of tensor operations; "auto" is plain on the CPU, where it
            is the faster one, and in graphs.

    Raises:
        ValueError: sizes below one, groups that do not divide the channels, an unknown ``mode``; in ``forward``, other
            channels or a map smaller than the window.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        modulated: bool = False,
        rate: float = 1.0,
        mode: Mode = "auto",
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding, self.dilation = map(
            _pair, (kernel_size, stride, padding, dilation)
        )
        if min(in_channels, out_channels, groups, offset_groups, *self.kernel_size, *self.stride, *self.dilation) < 1:
            raise ValueError(
                f"channels, groups, kernel_size, stride and dilation must be >= 1, got {in_channels}, {out_channels}, "
                f"{groups}, {offset_groups}, {kernel_size}, {stride} and {dilation}"
            )
        if min(self.padding) < 0 or in_channels % groups or out_channels % groups or in_channels % offset_groups:
            raise ValueError(
                f"padding must be >= 0, groups divide the channels and offset_groups in_channels; got {padding}, "
                f"{groups} and {offset_groups} for {in_channels} -> {out_channels} channels"
            )
        if mode not in ("auto", "operator", "plain"):
            raise ValueError(f"mode must be auto, operator or plain, got {mode!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.offset_groups, self.modulated, self.rate, self.mode = offset_groups, modulated, rate, mode
        self.taps = self.kernel_size[0] * self.kernel_size[1]
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as torch.nn.Conv2d
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)
        self.offset = nn.Conv2d(
            in_channels,
            (3 if modulated else 2) * offset_groups * self.taps,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int | None = None, **options: Any) -> DeformConv2d:
        """Take over a convolution's shape, weights and bias; the new layer computes what the old one did.

        With ``modulated`` the weights are doubled, since the mask starts at 1/2.

        Raises:
            TypeError: ``old`` is no ``Conv2d``. ValueError: it pads by other than zeros, or unevenly.
        """
        if not isinstance(old, nn.Conv2d):
            raise TypeError(f"expected a torch.nn.Conv2d, got {type(old).__name__}")
        if old.padding_mode != "zeros":
            raise ValueError(f"expected padding_mode 'zeros', got {old.padding_mode!r}")
        with torch.device("meta"):  # the weights come from the old layer: none are drawn
            new = cls(
                old.in_channels,
                old.out_channels,
                old.kernel_size,  # type: ignore[arg-type]
                stride=old.stride,  # type: ignore[arg-type]
                padding=_padding(old),
                dilation=old.dilation,  # type: ignore[arg-type]
                groups=old.groups,
                bias=old.bias is not None,
                **options,
            )
        factor = 2 if new.modulated else 1
        new.weight = nn.Parameter(old.weight.detach() * factor, old.weight.requires_grad)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.detach().clone(), old.bias.requires_grad)
        new.offset.to_empty(device=old.weight.device).to(old.weight.dtype)
        nn.init.zeros_(new.offset.weight)
        nn.init.zeros_(new.offset.bias)  # type: ignore[arg-type]
        return new.train(old.training)

    def offsets(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """dpn (N, 2 G K, H', W') in cells, and m_n (N, G K, H', W') in (0, 1) or None."""
        self._check(x)
        found = self.offset(x)
        if not self.modulated:
            return found, None
        count = 2 * self.offset_groups * self.taps
        return found[:, :count], found[:, count:].sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.offsets(x)
        return deform_conv(
            x,
            offset,
            self.weight,
            self.bias,
            mask,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mode=self.mode,
        )

    def positions(self, x: Tensor) -> Tensor:
        """Where the taps are taken: (N, H', W', K, G, 2), row and column in cells of the input."""
        offset, _ = self.offsets(x)
        found = tap_positions(offset, self.kernel_size, self.stride, self.padding, self.dilation)
        return torch.stack(found, -1)

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """The learning rate of the second convolution."""
        if self.rate == 1:
            return {}
        return {"offset.weight": {"lr": self.rate}, "offset.bias": {"lr": self.rate}}

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        for size, kernel, padding, dilation in zip(
            x.shape[2:], self.kernel_size, self.padding, self.dilation, strict=True
        ):
            if size + 2 * padding < dilation * (kernel - 1) + 1:
                raise ValueError(
                    f"a window of {dilation * (kernel - 1) + 1} does not fit on {size} cells with a border of {padding}"
                )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        return f"{text}, offset_groups={self.offset_groups}, modulated={self.modulated}"


def _pair(value: int | Pair) -> Pair:
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def _padding(old: nn.Conv2d) -> Pair:
    if old.padding == "valid":
        return 0, 0
    if old.padding == "same":
        total = [d * (k - 1) for k, d in zip(old.kernel_size, old.dilation, strict=True)]
        if any(t % 2 for t in total):
            raise ValueError(f"padding 'same' is uneven for kernel_size {old.kernel_size}")
        return total[0] // 2, total[1] // 2
    return old.padding  # type: ignore[return-value]
