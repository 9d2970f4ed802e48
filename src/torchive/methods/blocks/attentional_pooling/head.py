"""The head: a feature map to class scores, its maps, and its low-rank form of a full second-order head."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.blocks.attentional_pooling.saliency import (
    ATTENTIONS,
    Attention,
    BottomUpPool,
    attend,
    attended_means,
    saliency,
    weighted_means,
)


class AttentionMaps(NamedTuple):
    """What the head looked at; the mean of ``combined`` over positions is the head's output.

    Attributes:
        bottom_up: h, (N, P, K or 1, *S).
        top_down: t, (N, P, K, *S).
        combined: sum_p h t, (N, K, *S).
    """

    bottom_up: Tensor
    top_down: Tensor
    combined: Tensor


def head_weights(in_channels: int, num_classes: int, *, rank: int = 1) -> dict[str, int]:
    """Weights, without biases, of three heads on C channels: mean, attentional and full second-order pooling."""
    return {
        "average": in_channels * num_classes,
        "attentional": rank * in_channels * (num_classes + 1),
        "bilinear": in_channels**2 * num_classes,
    }


class AttentionalPooling(nn.Module):
    """Map (N, C, *S) to (N, K) scores; takes the place of the global mean and the last linear layer.

    With b = 0 and its bias 1 it is the mean over positions and a linear layer, which is ``start="average"``.

    Args:
        in_channels: C.
        num_classes: K.
        rank: P, the number of products that are summed.
        per_class: whether each class has a bottom-up map of its own.
        attention: what the bottom-up map goes through: "linear" (nothing), "relu" or "softmax" over positions.
        chained: whether map p + 1 is computed from map p, as in the release, and not from the features.
        drop: share of the features that the top-down branch loses in training; 0.8 in the release.
        start: "small" draws all weights with deviation 0.001, as in the release; "average" starts as mean pooling.
        source_channels: channels of the features that the bottom-up map is computed from; None takes x itself.

    Raises:
        ValueError: a number below one, ``drop`` outside [0, 1), or an unknown option; in ``forward``, inputs of other
            shapes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        rank: int = 1,
        per_class: bool = False,
        attention: Attention = "linear",
        chained: bool = False,
        drop: float = 0.8,
        start: Literal["small", "average"] = "small",
        source_channels: int | None = None,
    ) -> None:
        super().__init__()
        source = in_channels if source_channels is None else source_channels
        if min(in_channels, num_classes, rank, source) < 1:
            given = f"{in_channels}, {num_classes}, {rank} and {source}"
            raise ValueError(f"in_channels, num_classes, rank and source_channels must be >= 1, got {given}")
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        if start not in ("small", "average"):
            raise ValueError(f"start must be small or average, got {start!r}")
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {drop}")
        self.in_channels, self.num_classes, self.rank, self.drop = in_channels, num_classes, rank, drop
        self.attention, self.source_channels, self.chained = attention, source, chained
        self.maps_per_rank = num_classes if per_class else 1
        own = self.maps_per_rank * (1 if chained else rank)
        self.bottom_up = nn.Parameter(torch.empty(own, source))  # b
        links = (rank - 1, self.maps_per_rank, self.maps_per_rank)
        self.chain = nn.Parameter(torch.empty(links)) if chained and rank > 1 else None
        self.bottom_up_bias = nn.Parameter(torch.empty(rank, self.maps_per_rank))
        self.top_down = nn.Parameter(torch.empty(rank, num_classes, in_channels))  # a
        self.top_down_bias = nn.Parameter(torch.empty(rank, num_classes))
        self._start(start)

    def _start(self, start: str) -> None:
        nn.init.zeros_(self.top_down_bias)
        if start == "small":
            for weight in (self.bottom_up, self.top_down, self.chain):
                if weight is not None:
                    nn.init.normal_(weight, std=0.001)
            nn.init.zeros_(self.bottom_up_bias)
            return
        nn.init.zeros_(self.bottom_up)
        if self.chain is not None:
            nn.init.zeros_(self.chain)
        nn.init.ones_(self.bottom_up_bias)
        nn.init.uniform_(self.top_down, -(self.in_channels**-0.5), self.in_channels**-0.5)

    @staticmethod
    def from_module(old: nn.Module, *, channels: int, **options: Any) -> BottomUpPool:
        """The layer that takes a global mean's place; with the linear layer behind it, it is the head of rank 1."""
        return BottomUpPool.from_module(old, channels=channels, **options)

    @classmethod
    def from_second_order(cls, weight: Tensor, *, rank: int, **options: Any) -> AttentionalPooling:
        """The head nearest to full second-order scores Tr(X^T X W_k^T) / L; with rank C it is equal to them.

        Args:
            weight: (K, C, C), the matrices W_k.
            rank: P, at most C; the P largest singular directions of the stacked matrices are kept.
            options: those of the class, without ``per_class``.

        Raises:
            ValueError: a weight of another shape, a rank above C, or ``per_class``.
        """
        if weight.ndim != 3 or weight.shape[1] != weight.shape[2]:
            raise ValueError(f"expected (K, C, C), got shape {tuple(weight.shape)}")
        classes, channels, _ = weight.shape
        if rank > channels or options.get("per_class") or options.get("chained"):
            raise ValueError(f"expected a rank of at most {channels} and no per_class or chained, got {rank}")
        left, values, right = torch.linalg.svd(weight.detach().flatten(0, 1), full_matrices=False)
        head = cls(channels, classes, rank=rank, **options).to(weight)
        with torch.no_grad():
            head.bottom_up.copy_(right[:rank])
            head.top_down.copy_((left * values)[:, :rank].unflatten(0, (classes, channels)).permute(2, 0, 1))
            head.bottom_up_bias.zero_()
            head.top_down_bias.zero_()
        return head

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """Scores (N, K) of (N, C, *S); ``source`` (N, source_channels, *S) feeds the bottom-up map instead of x."""
        flat = self._flat(x, self.in_channels)  # (N, C, L)
        dropped = self.training and self.drop > 0
        if source is None and not self.chained and not dropped:  # z (N, P M, C), M = 1 or K; mean (N, P M)
            z, mean = attended_means(flat, self.bottom_up, self.bottom_up_bias.flatten(), self.attention)
        else:
            h = self._bottom_up(flat if source is None else self._flat(source, self.source_channels))
            z, mean = weighted_means(h, F.dropout(flat, self.drop, self.training)), h.mean(2)
        mean = mean.unflatten(1, (self.rank, -1))  # (N, P, M)
        a = self.top_down.to(x.dtype)
        if self.maps_per_rank == 1:
            scores = z.flatten(1) @ a.transpose(0, 1).flatten(1).T  # (N, K)
        else:
            scores = (z.unflatten(1, (self.rank, -1)) * a).sum((1, 3))
        return scores + (mean * self.top_down_bias.to(x.dtype)).sum(1)

    def maps(self, x: Tensor, source: Tensor | None = None) -> AttentionMaps:
        """The bottom-up, top-down and combined maps, without dropout."""
        flat = self._flat(x, self.in_channels)
        h = self._bottom_up(flat if source is None else self._flat(source, self.source_channels))
        h = h.unflatten(1, (self.rank, -1))  # (N, P, M, L)
        t = saliency(flat, self.top_down.flatten(0, 1), self.top_down_bias.flatten()).unflatten(1, (self.rank, -1))
        found = (h, t, (h * t).sum(1))
        return AttentionMaps(*(m.unflatten(-1, x.shape[2:]) for m in found))

    def _bottom_up(self, flat: Tensor) -> Tensor:
        """(N, source, L) to (N, P M, L), after the attention's function."""
        if not self.chained:
            return attend(saliency(flat, self.bottom_up, self.bottom_up_bias.flatten()), self.attention)
        maps = [saliency(flat, self.bottom_up, self.bottom_up_bias[0])]
        for p in range(self.rank - 1):
            assert self.chain is not None
            maps.append(saliency(maps[-1], self.chain[p], self.bottom_up_bias[p + 1]))
        return attend(torch.cat(maps, 1), self.attention)

    def _flat(self, x: Tensor, channels: int) -> Tensor:
        if x.ndim < 3 or x.shape[1] != channels:
            raise ValueError(f"expected (N, {channels}, *S), got shape {tuple(x.shape)}")
        return x.flatten(2)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.num_classes}, rank={self.rank}, attention={self.attention}, drop={self.drop}"
