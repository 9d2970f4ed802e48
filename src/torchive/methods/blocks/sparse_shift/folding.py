"""Deployment: a shift and the 1x1 convolution behind it in one, without a copy of the moved channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.blocks.sparse_shift.network import ShiftUnit
from torchive.methods.blocks.sparse_shift.shift import SparseShift, reach, runs_of


class FoldedShift(nn.Module):
    """(N, C_in, H, W) to (N, C_out, ceil(H / s), ceil(W / s)): products with each run of channels, added where it goes.

    Channels that move together are one run; the sums of a run move, which are fewer numbers than its channels.

    Args:
        weight: (C_out, C_in) of the 1x1 convolution.
        offset: (C_in, 2) whole displacements, equal ones beside each other.
        stride: s.
    """

    def __init__(self, weight: Tensor, offset: Tensor, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.stride = stride
        self.runs = tuple(runs_of(offset))

    def forward(self, x: Tensor) -> Tensor:
        step = self.stride
        size = tuple(-(-side // step) for side in x.shape[2:])
        y: Tensor | None = None
        for first, last, rows, columns in sorted(self.runs, key=lambda run: run[2:] != (0, 0)):
            kernel = self.weight[:, first:last, None, None]
            (i0, i1), (j0, j1) = (
                reach(by, side, out, step) for by, side, out in zip((rows, columns), x.shape[2:], size, strict=True)
            )
            if y is None and (rows, columns) != (0, 0):
                y = x.new_zeros(x.shape[0], len(self.weight), *size)
            if i1 <= i0 or j1 <= j0:
                continue
            i, j = step * i0 + rows, step * j0 + columns
            there = x[:, first:last, i : step * (i1 - 1) + rows + 1 : step, j : step * (j1 - 1) + columns + 1 : step]
            found = F.conv2d(there, kernel)
            if y is None:
                y = found
            else:
                y[:, :, i0:i1, j0:j1] += found
        assert y is not None
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, stride={self.stride}, runs={len(self.runs)}"


@torch.no_grad()
def fold_shifts(network: nn.Module) -> nn.Module:
    """Fold the shift of each ``ShiftUnit`` into the convolution behind it; in place, for evaluation.

    The channels between are sorted by their displacement, those that do not move first.

    Raises:
        ValueError: a network in training, or without a unit whose shift moves by whole pixels.
    """
    if network.training:
        raise ValueError(f"folding is for evaluation, got {type(network).__name__} in training")
    folded = False
    for unit in network.modules():
        if not isinstance(unit, ShiftUnit) or not isinstance(unit.mix, SparseShift) or unit.mix.variant == "active":
            continue
        offset = unit.mix.offsets()
        unique, kind = torch.unique(offset, dim=0, return_inverse=True)
        moves = unique.ne(0).any(1)
        order = (kind + moves[kind] * len(unique)).argsort(stable=True)
        unit.expand.weight.copy_(unit.expand.weight[order].clone())
        norm = unit.expand_norm
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert tensor is not None
            tensor.copy_(tensor[order].clone())
        weight = unit.project.weight[:, order, 0, 0]
        unit.project = FoldedShift(weight, offset[order], stride=unit.mix.stride)  # type: ignore[assignment]
        unit.mix = nn.Identity()
        folded = True
    if not folded:
        raise ValueError(f"{type(network).__name__} has no unit whose shift moves by whole pixels")
    return network
