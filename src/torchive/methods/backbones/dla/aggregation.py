"""Aggregation of any maps and any blocks: the node, the chain and the tree."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AggregationNode(nn.Module):
    """Join maps of one size: [(N, C_1, H, W), ...] to (N, C, H, W) by convolution, batch norm and ReLU (eq. 4, 5).

    Args:
        in_channels: C_1, C_2, ....
        out_channels: C.
        kernel_size: side of the convolution: 1 in trees, 3 in decoders.
        residual: whether the first map, of C channels, is added before the ReLU.

    Raises:
        ValueError: no maps, an even kernel, or a residual of other channels; in ``forward``, another number of maps.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, *, kernel_size: int = 1, residual: bool = False
    ) -> None:
        super().__init__()
        if not in_channels or min(*in_channels, out_channels) < 1:
            raise ValueError(f"expected channels of at least 1, got {tuple(in_channels)} and {out_channels}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if residual and in_channels[0] != out_channels:
            raise ValueError(f"a residual of {in_channels[0]} channels does not fit {out_channels}")
        self.count, self.residual = len(in_channels), residual
        self.conv = nn.Conv2d(sum(in_channels), out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        fan_out_init(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if len(maps) != self.count:
            raise ValueError(f"expected {self.count} maps, got {len(maps)}")
        x = self.norm(self.conv(torch.cat(list(maps), 1)))
        return torch.relu(x + maps[0] if self.residual else x)  # (N, C, H, W)


class IterativeAggregation(nn.Module):
    """Join maps of one size in turn, shallow to deep (eq. 1): [(N, C_1, H, W), ...] to (N, C, H, W).

    One map is returned as it is. Every step is a node of two inputs, so that shallow maps are refined most often.

    Args:
        in_channels: C_1, C_2, ... of any list of maps.
        out_channels: C; that of the first map if None.
        kernel_size: side of the nodes' convolution.

    Raises:
        ValueError: as ``AggregationNode``; in ``forward``, another number of maps.
    """

    def __init__(self, in_channels: Sequence[int], *, out_channels: int | None = None, kernel_size: int = 3) -> None:
        super().__init__()
        if not in_channels:
            raise ValueError(f"expected channels of one map or more, got {tuple(in_channels)}")
        width = in_channels[0] if out_channels is None else out_channels
        before = (in_channels[0], *(width for _ in in_channels[2:]))
        self.nodes = nn.ModuleList(
            AggregationNode((a, b), width, kernel_size=kernel_size)
            for a, b in zip(before, in_channels[1:], strict=False)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if len(maps) != len(self.nodes) + 1:
            raise ValueError(f"expected {len(self.nodes) + 1} maps, got {len(maps)}")
        x = maps[0]
        for node, other in zip(self.nodes, maps[1:], strict=True):
            x = node([x, other])
        return x


class HierarchicalAggregation(nn.Module):
    """Join 2**n blocks in a tree of depth n (eq. 2, 3): (N, C_0, H, W) to (N, C, H', W').

    Blocks run in their order; after each pair a node joins it with the outputs of the subtrees before it, and what it
    gives is the input of the next pair.

    Args:
        blocks: 2, 4, 8, ... modules; all but the first take C channels, and all give C.
        channels: C.
        child_channels: channels of further maps that the last node joins, such as a stage's pooled input.
        residual: whether nodes add their first input, the deepest map.

    Raises:
        ValueError: the number of blocks is not 2, 4, 8, ...; in ``forward``, another number of children.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        channels: int,
        child_channels: Sequence[int] = (),
        residual: bool = False,
    ) -> None:
        super().__init__()
        half = len(blocks) // 2
        if len(blocks) < 2 or len(blocks) & (len(blocks) - 1):
            raise ValueError(f"the number of blocks must be 2, 4, 8, ..., got {len(blocks)}")
        self.children_taken = len(child_channels)
        self.node: AggregationNode | None = None
        if half == 1:
            self.first, self.second = blocks
            self.node = AggregationNode([channels, channels, *child_channels], channels, residual=residual)
        else:
            self.first = HierarchicalAggregation(blocks[:half], channels=channels, residual=residual)
            self.second = HierarchicalAggregation(
                blocks[half:], channels=channels, child_channels=(*child_channels, channels), residual=residual
            )

    def forward(self, x: Tensor, children: Sequence[Tensor] = ()) -> Tensor:
        if len(children) != self.children_taken:
            raise ValueError(f"expected {self.children_taken} children, got {len(children)}")
        left = self.first(x)
        if self.node is None:
            return self.second(left, (*children, left))
        return self.node([self.second(left), left, *children])  # (N, C, H', W')


def fan_out_init(module: nn.Module) -> None:
    """The release's initialisation: normal weights of variance 2 / (k k C_out)."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=math.sqrt(2 / (math.prod(part.kernel_size) * part.out_channels)))
