"""The block in three steps: context modelling, transform, fusion."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.blocks.gcnet.pooling import attention_map, attention_pool

#: Settings under which the block is a known one.
NAMED: dict[str, dict[str, Any]] = {
    "global_context": {},
    "simplified_non_local": {"transform": "linear"},
    "squeeze_excitation": {"pool": "average", "fusion": "scale", "norm": False},
}


class GlobalContext(nn.Module):
    """Map (N, C, *S) to the same shape; a new block with ``fusion="add"`` is exactly the identity.

    Args:
        channels: C.
        reduction: r; the bottleneck has max(C // r, 1) channels.
        pool: "attention", or "average" over the positions.
        fusion: "add", "scale" (a new block then halves its input), or "both" with a transform for each, scaled first.
        transform: "bottleneck", or "linear": one C x C layer without bias, which makes the simplified non-local block.
        norm: whether the bottleneck has its LayerNorm.
        axes: over which positions of a clip (N, C, T, H, W) the soft-max runs: "joint" over all,
            "spatial_then_temporal" in each frame and then over frames, "temporal" over frame means.
        channel_dim: 1, or -1 for tokens (N, L, C).

    Raises:
        ValueError: ``channels`` or ``reduction`` below one, or an unknown option; in ``forward``, an input whose
            channel axis is not C, or one without frames where ``axes`` needs them.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        pool: Literal["attention", "average"] = "attention",
        fusion: Literal["add", "scale", "both"] = "add",
        transform: Literal["bottleneck", "linear"] = "bottleneck",
        norm: bool = True,
        axes: Literal["joint", "spatial_then_temporal", "temporal"] = "joint",
        channel_dim: Literal[1, -1] = 1,
    ) -> None:
        super().__init__()
        if min(channels, reduction) < 1:
            raise ValueError(f"channels and reduction must be >= 1, got {channels} and {reduction}")
        for key, value, allowed in (
            ("pool", pool, ("attention", "average")),
            ("fusion", fusion, ("add", "scale", "both")),
            ("transform", transform, ("bottleneck", "linear")),
            ("axes", axes, ("joint", "spatial_then_temporal", "temporal")),
            ("channel_dim", channel_dim, (1, -1)),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        self.channels, self.pool, self.fusion, self.axes, self.channel_dim = channels, pool, fusion, axes, channel_dim
        self.query = nn.Parameter(torch.empty(channels)) if pool == "attention" else None
        frames = pool == "attention" and axes == "spatial_then_temporal"
        self.frame_query = nn.Parameter(torch.empty(channels)) if frames else None
        for query in (self.query, self.frame_query):
            if query is not None:
                nn.init.normal_(query, std=(2 / channels) ** 0.5)  # Kaiming, fan in
        hidden = max(channels // reduction, 1)
        self.scale = None if fusion == "add" else _transform(channels, hidden, transform, norm)
        self.add = None if fusion == "scale" else _transform(channels, hidden, transform, norm)

    @classmethod
    def from_channels(cls, channels: int, **options: Any) -> GlobalContext:
        """The block for C channels, to be put behind another part."""
        return cls(channels, **options)

    @classmethod
    def named(cls, name: str, channels: int, **options: Any) -> GlobalContext:
        """A known block: "global_context", "simplified_non_local" or "squeeze_excitation".

        Raises:
            ValueError: another name.
        """
        if name not in NAMED:
            raise ValueError(f"name must be one of {', '.join(NAMED)}, got {name!r}")
        return cls(channels, **{**NAMED[name], **options})

    def forward(self, x: Tensor) -> Tensor:
        y = self._first(x)
        context = self._context(y)  # (N, C)
        shape = (*context.shape, *[1] * (y.ndim - 2))
        if self.scale is not None:
            y = y * self.scale(context).sigmoid().view(shape)
        if self.add is not None:
            y = y + self.add(context).view(shape)
        return y if self.channel_dim == 1 else y.movedim(1, -1)

    def context(self, x: Tensor) -> Tensor:
        """The (N, C) context of (N, C, *S) features, before its transform."""
        return self._context(self._first(x))

    def attention(self, x: Tensor) -> Tensor:
        """The weights of the positions: (N, C, *S) to (N, *S), each sample's sum is one."""
        y = self._first(x)
        flat = y.flatten(2)
        if self.query is None:
            weights = torch.full_like(flat[:, :1], 1 / flat.shape[2])
        elif self.axes == "joint":
            weights = attention_map(flat, self.query)
        else:
            spatial, frames = self._frames(y)  # (N, 1, T, HW), (N, C, T)
            query = self.query if self.frame_query is None else self.frame_query
            weights = (spatial * attention_map(frames, query).unsqueeze(-1)).flatten(2)
        return weights.view(len(y), *y.shape[2:])

    def _first(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[self.channel_dim] != self.channels:
            raise ValueError(
                f"expected {self.channels} channels on axis {self.channel_dim}, got shape {tuple(x.shape)}"
            )
        if self.axes != "joint" and x.ndim != 5:
            raise ValueError(f"axes={self.axes!r} needs (N, C, T, H, W), got shape {tuple(x.shape)}")
        return x if self.channel_dim == 1 else x.movedim(-1, 1)

    def _context(self, x: Tensor) -> Tensor:
        if self.query is None:
            return x.flatten(2).mean(2)
        if self.axes == "joint":
            return attention_pool(x, self.query)
        _, frames = self._frames(x)
        return attention_pool(frames, self.query if self.frame_query is None else self.frame_query)

    def _frames(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights inside each frame, (N, 1, T, HW), and the frames' own contexts, (N, C, T)."""
        flat = x.flatten(3)  # (N, C, T, HW)
        if self.axes == "temporal":
            return torch.full_like(flat[:, :1], 1 / flat.shape[3]), flat.mean(3)
        assert self.query is not None
        weights = (flat * self.query.to(x.dtype).view(1, -1, 1, 1)).sum(1, keepdim=True).softmax(3)
        return weights, (flat * weights).sum(3)

    def extra_repr(self) -> str:
        return f"{self.channels}, pool={self.pool}, fusion={self.fusion}, axes={self.axes}"


class SimplifiedNonLocal(GlobalContext):
    """y = x + W_v sum_j a_j x_j: the non-local block with one attention map for all queries, W_v moved out of the sum.

    Args:
        channels: C.
        options: those of ``GlobalContext`` that do not make it another block: ``axes``, ``channel_dim``.
    """

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **{**NAMED["simplified_non_local"], **options})


def _transform(channels: int, hidden: int, kind: str, norm: bool) -> nn.Sequential:
    """(N, C) to (N, C); the last layer starts as zero."""
    last = nn.Linear(channels, channels, bias=False) if kind == "linear" else nn.Linear(hidden, channels)
    nn.init.zeros_(last.weight)
    if last.bias is not None:
        nn.init.zeros_(last.bias)
    if kind == "linear":
        return nn.Sequential(last)
    middle = [nn.LayerNorm(hidden), nn.ReLU(inplace=True)] if norm else [nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Linear(channels, hidden), *middle, last)
