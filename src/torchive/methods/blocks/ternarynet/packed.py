"""Inference with packed weights: two bits a weight, sums by counting bits, batch norm as two thresholds a filter."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn

from torchive.methods.blocks.ternarynet.bits import as_map, as_words, ternary_products
from torchive.methods.blocks.ternarynet.convolution import TernaryConv2d, TernaryConv3d, TernaryUnit, quantised
from torchive.nn.passes import as_inputs, trial_pass

GRAIN = 16  # pooled maps are multiples of 1/4, linearly upsampled ones of 1/16


class PackedTernaryConv(nn.Module):
    """A ternary convolution for inference, (N, I, *S) to (N, O, *S'); equals the float form in evaluation exactly.

    Inputs are multiples of 1/16, such as ternary maps, their 2 x 2 means and their linear upsampling by two: each
    bit of their size is one ternary map, and their products are added up. A ternary input has one such bit.

    Args:
        conv: the convolution; it is left as it is.

    Raises:
        ValueError: full precision, or a padding mode that is not zeros; in ``forward``, an input of another rank or
            with other channels, or with a value that is no multiple of 1/16.
    """

    masks: Tensor
    signs: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, conv: TernaryConv2d | TernaryConv3d) -> None:
        super().__init__()
        if conv.precision == "full" or conv.padding_mode != "zeros":
            raise ValueError(f"expected ternary weights and padding by zeros, got {conv}")
        signs, scale = (t.detach() for t in quantised(conv))
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding = _borders(conv)
        array = signs.movedim(1, -1).cpu().numpy()  # (O, *k, I / groups)
        grouped = (conv.groups, conv.out_channels // conv.groups, -1)
        for name, flags in (("masks", array != 0), ("signs", array > 0)):
            words = as_words(np.packbits(flags, axis=-1).reshape(grouped))  # (groups, O / groups, W)
            self.register_buffer(name, torch.from_numpy(words.view(np.int64)))
        self.register_buffer("scale", scale.clone())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    @property
    def span(self) -> int:
        """The largest sum that an input of -1 to 1 can give, in steps of 1/16."""
        taps = int(np.prod(self.kernel_size))
        return GRAIN * taps * (self.in_channels // self.groups)

    def sums(self, x: Tensor) -> NDArray[np.int32]:
        """Sums (N, *S', O) of the weights' signs times the input, in steps of 1/16."""
        rank = len(self.kernel_size)
        if x.ndim != rank + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected {self.in_channels} channels and {rank + 2} axes, got shape {tuple(x.shape)}")
        array = x.detach().movedim(1, -1).cpu().float().numpy()  # (N, *S, I)
        array = np.pad(array, [(0, 0), *self.padding, (0, 0)]) if np.any(self.padding) else array
        scaled = array * np.float32(GRAIN)
        steps = scaled.astype(np.int32)
        if not np.array_equal(steps, scaled):
            raise ValueError(f"expected an input in steps of 1/{GRAIN}, such as a ternary map; got other values")
        sizes, positive = np.abs(steps), steps > 0
        used = int(np.bitwise_or.reduce(sizes, axis=None)) if sizes.size else 0
        total: Any = 0
        for bit in range(used.bit_length()):
            if used >> bit & 1:
                total = total + (self._plane(sizes >> bit & 1 != 0, positive) << bit)
        return total if used else self._plane(sizes != 0, positive)  # (N, *S', O)

    def _plane(self, mask: NDArray[np.bool_], positive: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Sums (N, *S', O) of one ternary map (N, *S, I)."""
        grouped = (*mask.shape[:-1], self.groups, self.in_channels // self.groups)
        windows = [self._windows(np.packbits(m.reshape(grouped), axis=-1)) for m in (mask, positive & mask)]
        place = windows[0].shape[:-2]
        count = int(np.prod(place))
        rows = [as_words(w.reshape(count, *w.shape[-2:])) for w in windows]  # (P, groups, W)
        filters = [t.cpu().numpy().view(np.uint64) for t in (self.masks, self.signs)]
        parts = [
            ternary_products((rows[0][:, g], rows[1][:, g]), (filters[0][g], filters[1][g])) for g in range(self.groups)
        ]
        return np.concatenate(parts, -1).reshape(*place, self.out_channels)

    def _windows(self, octets: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(N, *S, groups, B) to (N, *S', groups, taps B)."""
        rank = len(self.kernel_size)
        axes = tuple(range(1, rank + 1))
        extent = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        if any(size < need for size, need in zip(octets.shape[1:], extent, strict=False)):
            raise ValueError(f"expected padded sides of at least {extent}, got {list(octets.shape[1 : rank + 1])}")
        view: Any = sliding_window_view(octets, extent, axis=axes)  # (N, *S', groups, B, *extent)
        view = view[(slice(None), *(slice(None, None, s) for s in self.stride))]
        view = view[(..., *(slice(None, None, d) for d in self.dilation))]
        taps = octets.shape[-1] * int(np.prod(self.kernel_size))
        return np.moveaxis(view, rank + 2, -1).reshape(*view.shape[: rank + 2], taps)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * len(self.kernel_size))
        y = as_map(self.sums(x), x) / GRAIN * self.scale.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)  # (N, O, *S')


class PackedTernaryUnit(nn.Module):
    """A packed convolution with batch norm and hard activation folded into two whole thresholds for each filter.

    Args:
        unit: convolution, batch norm and ternary or binary activation; it is left as it is.
    """

    upper: Tensor
    lower: Tensor
    turn: Tensor

    def __init__(self, unit: nn.Sequential) -> None:
        super().__init__()
        parts: Any = deepcopy(unit).eval()
        conv, norm, act = parts
        self.conv, self.binary = PackedTernaryConv(conv), act.variant == "binary"
        falls = norm.weight is not None and norm.weight < 0
        turn = torch.where(torch.as_tensor(falls), -1, 1) * torch.ones(conv.out_channels, dtype=torch.int64)

        def activated(sums: Tensor) -> Tensor:
            """-1, 0 or 1 for one whole sum of each filter, by the float form's own steps."""
            y = (sums * turn).to(self.conv.scale.dtype) / GRAIN * self.conv.scale
            y = y if self.conv.bias is None else y + self.conv.bias
            active: Tensor = act(norm(y.view(1, -1, *[1] * len(conv.kernel_size)))).view(-1)
            return active

        with torch.no_grad():
            self.register_buffer("upper", _first(lambda sums: activated(sums) > 0, self.conv))
            self.register_buffer("lower", _first(lambda sums: activated(sums) > -1, self.conv))
        self.register_buffer("turn", turn.to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        sums = self.conv.sums(x) * self.turn.cpu().numpy()
        high = sums >= self.upper.cpu().numpy()
        y = high.astype(np.int8) - (~high if self.binary else sums < self.lower.cpu().numpy())
        return as_map(y, x)  # (N, O, *S')


def _first(holds: Any, conv: PackedTernaryConv) -> Tensor:
    """For each filter the smallest sum from which on a rising condition holds: by bisection."""
    low = torch.full((conv.out_channels,), -conv.span - 1)
    high = torch.full((conv.out_channels,), conv.span + 1)
    while bool((high - low > 1).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        found = holds(middle)
        low, high = torch.where(found, low, middle), torch.where(found, middle, high)
    return high.to(torch.int32)


def _borders(conv: nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Rows that are added before and behind on each axis."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in total]
    return [(int(p), int(p)) for p in conv.padding]


def _is_unit(module: nn.Module) -> bool:
    """Whether batch norm and activation behind a ternary convolution can be folded."""
    if not isinstance(module, TernaryUnit):
        return False
    conv: Any = module.conv
    act: Any = module.act
    return conv.precision != "full" and act.variant != "relu" and act.hard


def pack_ternary(model: nn.Module) -> nn.Module:
    """A copy for inference on the processor, in which ternary convolutions count bits.

    Units become one layer with whole thresholds; other ternary convolutions are packed as they stand, batch norm and
    activation behind them staying. Results equal those of the model in evaluation, where its maps are ternary.

    Raises:
        ValueError: nothing to pack.
    """
    copy = deepcopy(model).eval()
    count, copy = _packed(copy)
    if not count:
        raise ValueError(f"{type(model).__name__} has no ternary convolution to pack")
    return copy


def _packed(module: nn.Module) -> tuple[int, nn.Module]:
    if _is_unit(module):
        return 1, PackedTernaryUnit(module)  # type: ignore[arg-type]
    if isinstance(module, TernaryConv2d | TernaryConv3d) and module.precision != "full":
        return 1, PackedTernaryConv(module)
    count = 0
    for name, child in module.named_children():
        found, new = _packed(child)
        if found and new is not child:
            module._modules[name] = new
        count += found
    return count, module


@dataclass(frozen=True)
class TernaryCost:
    """What a network weighs and does, before and after packing.

    Attributes:
        float_bytes: all parameters and running statistics as they are.
        packed_bytes: the same with two bits for each ternary weight, and a scale for each filter.
        multiply_adds: of all convolutions, in float.
        kept_multiply_adds: of those that stay in float.
        word_operations: products of 64 pairs at once that take the others' place, for ternary inputs.
    """

    float_bytes: int
    packed_bytes: int
    multiply_adds: int
    kept_multiply_adds: int
    word_operations: int


def ternary_cost(model: nn.Module, inputs: Any) -> TernaryCost:
    """Memory and operations of a network with ternary convolutions, for one input (or a tuple of them)."""
    totals = {"all": 0, "kept": 0, "words": 0}

    def count(conv: Any, _: Any, y: Tensor) -> None:
        positions, length = y.numel() // conv.out_channels, conv.weight[0].numel()
        done = positions * conv.out_channels * length
        totals["all"] += done
        if _packs(conv):
            octets = -(-(conv.in_channels // conv.groups) // 8) * int(np.prod(conv.kernel_size))
            totals["words"] += positions * conv.out_channels * -(-octets // 8)
        else:
            totals["kept"] += done

    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    handles = (conv.register_forward_hook(count) for conv in convs)
    trial_pass(model, as_inputs(model, inputs, dims=(2, 3)), handles)
    tensors = [*model.parameters(), *model.buffers()]
    plain = sum(t.numel() * t.element_size() for t in tensors)
    weights = [m.weight for m in convs if _packs(m)]
    saved = sum(w.numel() * w.element_size() - -(-w.numel() // 4) - len(w) * w.element_size() for w in weights)
    return TernaryCost(plain, plain - saved, totals["all"], totals["kept"], totals["words"])


def _packs(conv: nn.Module) -> bool:
    return isinstance(conv, TernaryConv2d | TernaryConv3d) and conv.precision != "full"
