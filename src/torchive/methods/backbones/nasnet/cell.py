"""A cell from its plan, and the layers that bring its two inputs to one size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.backbones.nasnet.drop_path import ScheduledDropPath
from torchive.methods.backbones.nasnet.genotype import CellPlan
from torchive.methods.backbones.nasnet.operations import SameConv, build_operation, norm, relu_conv


class FactorisedReduction(nn.Module):
    """Halve a map without loss of every second pixel alone: (N, C, H, W) to (N, F, ceil(H / 2), ceil(W / 2)).

    A 1x1 convolution of stride 2 on the map and another on the map shifted by one pixel give half of the channels each;
    a batch norm follows.

    Args:
        in_channels: C.
        out_channels: F.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = SameConv(in_channels, out_channels // 2, 1, stride=2)
        self.second = SameConv(in_channels, out_channels - out_channels // 2, 1, stride=2)
        self.norm = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.first(x), self.second(F.pad(x, (-1, 1, -1, 1)))], 1))


class SearchedCell(nn.Module):
    """A cell of a plan: two maps to (N, M F, H', W'), M the number of states that go out.

    Args:
        plan: the blocks.
        channels: F.
        in_channels: channels of the last cell's output and of the one before it.
        stride: 1, or 2 for a reduction.
        shrink: whether the output before the last is twice as large as the last, and is halved first.
        drop, place, scheduled: of ``ScheduledDropPath``.
        first: whether there is no output before the last, which then is read twice, without a projection.
    """

    def __init__(
        self,
        plan: CellPlan,
        channels: int,
        *,
        in_channels: tuple[int, int],
        stride: int = 1,
        shrink: bool = False,
        drop: float = 0.0,
        place: float = 1.0,
        scheduled: bool = True,
        first: bool = False,
    ) -> None:
        super().__init__()
        self.plan, self.out_channels = plan, plan.multiple * channels
        last, before = in_channels
        widths = [channels, channels]
        self.before: nn.Module = nn.Identity()
        if first:
            widths[1] = last
        elif shrink:
            self.before = nn.Sequential(nn.ReLU(), FactorisedReduction(before, channels))
        elif before != channels:
            self.before = relu_conv(before, channels)
        self.last = relu_conv(last, channels)
        self.left, self.right, self.paths = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for number, block in enumerate(plan.blocks):
            for side, (state, name) in ((self.left, block.left), (self.right, block.right)):
                side.append(build_operation(name, widths[state], channels, stride=stride if state < 2 else 1))
                dropped = drop and name != "identity"
                self.paths.append(
                    ScheduledDropPath(drop=drop, place=place, scheduled=scheduled) if dropped else nn.Identity()
                )
            widths.append(plan.width(number + 2) * channels)
        self.out = nn.ModuleList(nn.Identity() for _ in plan.output)
        for i, state in enumerate(plan.output):
            if state < 2 and stride == 2:
                self.out[i] = FactorisedReduction(widths[state], channels)
            elif state < 2 and widths[state] != channels:
                self.out[i] = nn.Sequential(SameConv(widths[state], channels, 1), norm(channels))

    def forward(self, last: Tensor, before: Tensor) -> Tensor:
        states = [self.last(last), self.before(before)]
        paths = iter(self.paths)
        for left, right, block in zip(self.left, self.right, self.plan.blocks, strict=True):
            a = next(paths)(left(states[block.left[0]]))
            b = next(paths)(right(states[block.right[0]]))
            states.append(a + b if block.combine == "add" else torch.cat([a, b], 1))
        return torch.cat([out(states[state]) for out, state in zip(self.out, self.plan.output, strict=True)], 1)
