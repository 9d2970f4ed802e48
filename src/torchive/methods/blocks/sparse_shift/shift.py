"""The layer that moves channels, and how it is done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: Copying a run of channels costs a few calls; an index costs time for each number. So many numbers weigh one run.
_NUMBERS_A_RUN = 60_000


def round_half_away(x: Tensor) -> Tensor:
    """The nearest whole number; of two the one further from zero."""
    whole = x.trunc()
    return whole + x.sign() * ((x - whole).abs() >= 0.5)


def runs_of(offset: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(first channel, one behind the last, rows, columns) of channels that move together; ``offset`` is (C, 2)."""
    values, counts = torch.unique_consecutive(offset, dim=0, return_counts=True)
    start = 0
    for (rows, columns), count in zip(values.tolist(), counts.tolist(), strict=True):
        yield start, start + count, rows, columns
        start += count


def reach(offset: int, side: int, size: int, step: int) -> tuple[int, int]:
    """The positions i of ``size`` with 0 <= step i + offset < side, as first and one behind the last."""
    first = max(0, -(offset // step))
    return first, max(first, min(size, -((offset - side) // step)))


def translate(x: Tensor, offset: Tensor, size: tuple[int, int] | None = None, step: int = 1) -> Tensor:
    """y_c(i, j) = x_c(step i + offset_c0, step j + offset_c1), zero outside; gradients do not pass.

    Args:
        x: (N, C, H, W).
        offset: (C, 2), int64.
        size: rows and columns of y; every ``step``-th of H and W if None.
        step: distance of the positions that are read.
    """
    size = size or _size(x, step)
    return _follow(x, _plan(x, offset, size, step), size, step)


@dataclass(frozen=True)
class _Plan:
    """How a translation is made: by runs of channels, or by the place of each number and those beyond the border."""

    runs: list[tuple[int, int, int, int]] | None = None
    index: Tensor | None = None
    beyond: Tensor | None = None  # places on a CPU, where writing few of them is faster, else a mask


def _size(x: Tensor, step: int) -> tuple[int, int]:
    return -(-x.shape[2] // step), -(-x.shape[3] // step)


def _plan(x: Tensor, offset: Tensor, size: tuple[int, int], step: int) -> _Plan:
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        runs = list(runs_of(offset))
        if len(runs) * _NUMBERS_A_RUN < x.numel():
            return _Plan(runs)
    return _index(x, offset, size, step)


def _index(x: Tensor, offset: Tensor, size: tuple[int, int], step: int) -> _Plan:
    """Where each number of an image is in the memory of the input's image."""
    channels, height, width = x.shape[1:]
    rows = step * torch.arange(size[0], device=x.device) + offset[:, :1]  # (C, H')
    columns = step * torch.arange(size[1], device=x.device) + offset[:, 1:]  # (C, W')
    above, aside = (rows < 0) | (rows >= height), (columns < 0) | (columns >= width)
    rows, columns = rows.clamp(0, height - 1) * width, columns.clamp(0, width - 1)
    channel = torch.arange(channels, device=x.device)[:, None]
    if _layout(x) is torch.channels_last:
        rows, columns = (rows * channels + channel).t()[:, None], (columns * channels).t()[None]
        beyond = above.t()[:, None] | aside.t()[None]  # (H', W', C)
    else:
        rows, columns = (rows + channel * (height * width))[:, :, None], columns[:, None]
        beyond = above[:, :, None] | aside[:, None]  # (C, H', W')
    places = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return _Plan(None, rows + columns, beyond.flatten().nonzero().squeeze(1) if places else beyond.flatten())


def _follow(x: Tensor, plan: _Plan, size: tuple[int, int], step: int) -> Tensor:
    if plan.runs is not None:
        return _by_runs(x, plan.runs, size, step)
    assert plan.index is not None
    assert plan.beyond is not None
    last = _layout(x) is torch.channels_last
    flat = (x.permute(0, 2, 3, 1) if last else x).flatten(1)  # (N, C H W), no copy where the memory is dense
    y = flat.index_select(1, plan.index.flatten())
    y = y.masked_fill_(plan.beyond, 0) if plan.beyond.dtype == torch.bool else y.index_fill_(1, plan.beyond, 0)
    y = y.unflatten(1, plan.index.shape)
    return y.permute(0, 3, 1, 2) if last else y  # (N, C, H', W')


def _by_runs(x: Tensor, runs: list[tuple[int, int, int, int]], size: tuple[int, int], step: int) -> Tensor:
    y = torch.empty(*x.shape[:2], *size, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    for first, last, rows, columns in runs:
        old, new = x[:, first:last], y[:, first:last]
        (i0, i1), (j0, j1) = (
            reach(by, side, out, step) for by, side, out in zip((rows, columns), x.shape[2:], size, strict=True)
        )
        if (i1 - i0, j1 - j0) != size:
            new.zero_()
        if i1 > i0 and j1 > j0:
            i, j = step * i0 + rows, step * j0 + columns
            there = old[:, :, i : step * (i1 - 1) + rows + 1 : step, j : step * (j1 - 1) + columns + 1 : step]
            new[:, :, i0:i1, j0:j1].copy_(there)
    return y


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _corners(x: Tensor, floor: Tensor, size: tuple[int, int], step: int) -> list[Tensor]:
    """x_00, x_01, x_10 and x_11 of ``size``: one translation, of which each is a part."""
    whole = (step * (size[0] - 1) + 2, step * (size[1] - 1) + 2)
    plain = torch.compiler.is_exporting() or not torch.is_grad_enabled()
    window = translate(x, floor, whole) if plain else _Translated.apply(x, floor, whole, 1)
    parts = (slice(0, -1, step), slice(1, None, step))
    return [window[:, :, i, j] for i in parts for j in parts]


class _Translated(torch.autograd.Function):
    """``translate`` with the gradient of x, which is moved back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, size: tuple[int, int], step: int) -> Tensor:
        ctx.save_for_backward(offset)
        ctx.shape, ctx.step = x.shape, step
        return translate(x, offset, size, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _moved_back(grad, ctx.saved_tensors[0], ctx.shape, ctx.step), None, None, None


class _Sparse(torch.autograd.Function):
    """Whole steps forward; backward, displacements have the gradient of the interpolation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, step: int) -> Tensor:
        offset = round_half_away(shift).long()
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, shift, offset)
        ctx.shape, ctx.step = x.shape, step
        return translate(x, offset, None, step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, shift, offset = ctx.saved_tensors
        dx = _moved_back(grad, offset, ctx.shape, ctx.step) if ctx.needs_input_grad[0] else None
        dshift = None
        if ctx.needs_input_grad[1]:
            floor = shift.floor()
            u, v = (shift - floor).unbind(1)
            size = (grad.shape[2], grad.shape[3])
            dots = [(grad * corner).sum((0, 2, 3)) for corner in _corners(x, floor.long(), size, ctx.step)]
            s00, s01, s10, s11 = dots
            da = (1 - v) * (s10 - s00) + v * (s11 - s01)
            db = (1 - u) * (s01 - s00) + u * (s11 - s10)
            dshift = torch.stack([da, db], 1)
        return dx, dshift, None


def _moved_back(grad: Tensor, offset: Tensor, shape: torch.Size, step: int) -> Tensor:
    size = (shape[2], shape[3])
    if step > 1:  # the positions that were read, with zeros between
        sides = [step * (side - 1) + 1 for side in grad.shape[2:]]
        spread = torch.zeros(*grad.shape[:2], *sides, dtype=grad.dtype, device=grad.device)
        spread[:, :, ::step, ::step] = grad
        grad = spread
    return translate(grad, -offset, size)


def grid(channels: int, kernel_size: int = 3) -> Tensor:
    """(C, 2) displacements: each position of a window for a run of channels of one length, what is left over stays."""
    length = channels // kernel_size**2
    cell = torch.arange(length * kernel_size**2) // max(length, 1)
    found = torch.stack([cell // kernel_size, cell % kernel_size], 1) - kernel_size // 2
    return torch.cat([found, found.new_zeros(channels - len(found), 2)]).float()


#: The last plan of each layer that was asked without gradients; not the layer's state.
_KEPT: WeakKeyDictionary[nn.Module, tuple[Any, Tensor, _Plan]] = WeakKeyDictionary()


class SparseShift(nn.Module):
    """Map (N, C, H, W) to (N, C, ceil(H / s), ceil(W / s)), each channel moved by its own displacement.

    Args:
        channels: C.
        variant: "sparse" moves by whole pixels and learns as if it interpolated; "active" interpolates; "grouped" has
            fixed displacements and no parameters.
        stride: s; every s-th position is read.
        start: "grid" gives each position of a window to as many channels, "uniform" draws from the window, "zero" does
            not move.
        kernel_size: side of that window, odd.
        rate: multiple of the learning rate for the displacements (``parameter_rules``).
        decay: their weight decay; the release has 4e-5, where the paper has a penalty (see ``ShiftClassifier``).

    Attributes:
        shift: (C, 2), rows and columns, in pixels.
        frozen: whether displacements stay as they are; without a gradient no optimiser moves them.

    Raises:
        ValueError: numbers below one, an even window, an unknown ``variant`` or ``start``, or a grouped shift that does
            not start on its grid; in ``forward``, an input of other channels.
    """

    shift: Tensor

    def __init__(
        self,
        channels: int,
        *,
        variant: Literal["sparse", "active", "grouped"] = "sparse",
        stride: int = 1,
        start: Literal["grid", "uniform", "zero"] = "grid",
        kernel_size: int = 3,
        rate: float = 1.0,
        decay: float = 0.0,
    ) -> None:
        super().__init__()
        if min(channels, stride, kernel_size) < 1 or kernel_size % 2 == 0:
            given = (channels, stride, kernel_size)
            raise ValueError(f"channels and stride must be >= 1 and kernel_size odd, got {given}")
        if variant not in ("sparse", "active", "grouped"):
            raise ValueError(f"variant must be sparse, active or grouped, got {variant!r}")
        if start not in ("grid", "uniform", "zero") or (variant == "grouped" and start != "grid"):
            raise ValueError(f"start must be grid, uniform or zero, and grid for a grouped shift, got {start!r}")
        self.channels, self.variant, self.stride = channels, variant, stride
        self.rate, self.decay, self.frozen = rate, decay, False
        shift = grid(channels, kernel_size).to(torch.get_default_dtype())
        if start != "grid":
            reaches = kernel_size // 2 if start == "uniform" else 0
            shift = torch.empty_like(shift).uniform_(-1, 1) * reaches
        if variant == "grouped":
            self.register_buffer("shift", shift)
        else:
            self.shift = nn.Parameter(shift)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int | None = None, **options: Any) -> SparseShift:
        """A shift with a depthwise convolution's stride and window; its weights and its bias go.

        Raises:
            TypeError: ``old`` is no ``Conv2d``. ValueError: it is not depthwise, or its padding changes the sides.
        """
        if not isinstance(old, nn.Conv2d):
            raise TypeError(f"expected a torch.nn.Conv2d, got {type(old).__name__}")
        side, stride = old.kernel_size[0], old.stride[0]
        same = tuple(d * (k - 1) // 2 for d, k in zip(old.dilation, old.kernel_size, strict=True))
        if (
            not old.groups == old.in_channels == old.out_channels
            or old.kernel_size != (side, side)
            or side % 2 == 0
            or old.stride != (stride, stride)
            or (old.padding != "same" and tuple(old.padding) != same)
        ):
            raise ValueError(f"expected a depthwise convolution of an odd window with equal padding, got {old}")
        return cls(old.in_channels, stride=stride, **{"kernel_size": side, **options})

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected (N, {self.channels}, H, W), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point map, got {x.dtype}")
        shift = self.shift.detach() if self.frozen else self.shift
        plain = torch.compiler.is_exporting() or not torch.is_grad_enabled()
        if self.variant == "active":
            return self._interpolated(x, shift)
        if plain:
            return self._still(x, round_half_away(shift).long())
        return _Sparse.apply(x, shift, self.stride)

    def _still(self, x: Tensor, offset: Tensor) -> Tensor:
        """Without gradients; on a CPU the plan is kept while displacements and sides are the same."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return translate(x, offset, None, self.stride)
        if self.stride == 1 and not offset.any():
            return x  # nothing moves, so nothing is copied
        size, key, kept = _size(x, self.stride), (x.shape, _layout(x)), _KEPT.get(self)
        if kept is None or kept[0] != key or not torch.equal(kept[1], offset):
            kept = _KEPT[self] = (key, offset, _plan(x, offset, size, self.stride))
        return _follow(x, kept[2], size, self.stride)

    def _interpolated(self, x: Tensor, shift: Tensor) -> Tensor:
        floor = shift.detach().floor()
        u, v = (shift - floor)[:, :, None, None].to(x.dtype).unbind(1)  # (C, 1, 1)
        x00, x01, x10, x11 = _corners(x, floor.long(), _size(x, self.stride), self.stride)
        upper, lower = torch.lerp(x00, x01, v), torch.lerp(x10, x11, v)
        return torch.lerp(upper, lower, u)

    @torch.no_grad()
    def offsets(self) -> Tensor:
        """(C, 2) whole pixels that the channels move by, int64."""
        return round_half_away(self.shift).long()

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """The displacements' own learning rate and weight decay in a recipe."""
        return {} if self.variant == "grouped" else {"shift": {"lr": self.rate, "weight_decay": self.decay}}

    def extra_repr(self) -> str:
        return f"{self.channels}, variant={self.variant}, stride={self.stride}"
