"""The two forms of attention, whole or in chunks of rows."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.backbones.san_self_attention.aggregation import (
    Footprint,
    neighbours,
    require_size,
    weighted_sum,
)
from torchive.methods.backbones.san_self_attention.chunks import joint_norm, light, moments_of

PAIRWISE = ("subtraction", "summation", "hadamard", "dot", "concatenation")
PATCHWISE = ("concatenation", "star", "clique")
_FREE = 2**22  # numbers in the relations of one chunk where no gradient is needed


class _Attention(nn.Module):
    """What both forms share: the maps phi, psi and beta, the way in chunks, and the sum over the footprint."""

    gamma: nn.Sequential
    width: int  # channels of the relation of two positions

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        relation_channels: int | None,
        kernel_size: int,
        stride: int,
        dilation: int,
        share: int,
        relation: str,
        relations: tuple[str, ...],
        chunk: int | None,
    ) -> None:
        super().__init__()
        middle = max(in_channels // 16, 1) if relation_channels is None else relation_channels
        numbers = (
            in_channels,
            out_channels,
            middle,
            kernel_size,
            stride,
            dilation,
            share,
            1 if chunk is None else chunk,
        )
        if min(numbers) < 1 or kernel_size % 2 == 0:
            raise ValueError(
                "in_channels, out_channels, relation_channels, kernel_size, stride, dilation, share and chunk must be "
                f">= 1 and kernel_size odd, got {numbers}"
            )
        if out_channels % share:
            raise ValueError(f"out_channels must be a multiple of share, got {out_channels} and {share}")
        if relation not in relations:
            raise ValueError(f"relation must be one of {', '.join(relations)}, got {relation!r}")
        self.in_channels, self.out_channels, self.relation, self.chunk = in_channels, out_channels, relation, chunk
        self.groups = out_channels // share
        self.footprint = Footprint(kernel_size, stride, dilation)
        self.phi = nn.Conv2d(in_channels, middle, 1)
        self.psi = nn.Conv2d(in_channels, middle, 1)
        self.beta = nn.Conv2d(in_channels, out_channels, 1)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int, **options: Any) -> Any:
        """The layer that takes a convolution's place, with its channels, kernel, stride and dilation.

        Raises:
            ValueError: ``old`` is no square convolution with an odd kernel above 1 and borders that keep the size, or
                it has several groups that are more than one channel each.
        """
        if not isinstance(old, nn.Conv2d):
            raise ValueError(f"it replaces a Conv2d, got {type(old).__name__}")
        side, apart = old.kernel_size[0], old.dilation[0]
        square = all(len(set(pair)) == 1 for pair in (old.kernel_size, old.stride, old.dilation))
        kept = old.padding in ("same", (apart * (side // 2),) * 2)
        if not square or not kept or side % 2 == 0 or side == 1 or old.groups not in (1, old.in_channels):
            raise ValueError(
                "it replaces square convolutions of odd kernels above 1 that keep the size, with one group or one for "
                f"each channel, got {old}"
            )
        taken: dict[str, Any] = {
            "kernel_size": side,
            "stride": old.stride[0],
            "dilation": apart,
            "share": next(s for s in range(8, 0, -1) if old.out_channels % s == 0),
        }
        return cls(channels, old.out_channels, **{**taken, **options})

    @abstractmethod
    def _place(self, x: Tensor) -> list[Tensor]:
        """Further maps that a relation reads: one of the centres and one, padded, of the neighbours; or none."""

    @abstractmethod
    def _relate(self, phi: Tensor, psi: Tensor, *place: Tensor) -> Tensor:
        """delta: what gamma maps."""

    @abstractmethod
    def _weights(self, mapped: Tensor, phi: Tensor) -> Tensor:
        """(N, G, k * k, H', W') of what gamma gives."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        require_size(x, self.footprint)
        step, inner = self.footprint.stride, self._layout(x)
        phi, psi, beta = (conv(x).contiguous(memory_format=inner) for conv in (self.phi, self.psi, self.beta))
        maps = [phi[..., ::step, ::step], self.footprint.pad(psi), self.footprint.pad(beta), *self._place(x)]
        height = maps[0].shape[2]
        rows = self._rows(maps[0])
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        if rows is None or rows >= height:
            return self._whole(*maps).contiguous(memory_format=layout)
        chunks = [(first, min(first + rows, height)) for first in range(0, height, rows)]
        parts = [self._cut(maps, first, last) for first, last in chunks]
        if self.training:
            y = torch.cat(self._in_chunks(parts), 2)
        else:
            y = torch.cat([light(self._whole, *part) for part in parts], 2)
        return y.contiguous(memory_format=layout)

    def attention(self, x: Tensor) -> Tensor:
        """The weights (N, G, k * k, H', W') of (N, C, H, W)."""
        step = self.footprint.stride
        phi, psi = self.phi(x)[..., ::step, ::step], self.footprint.pad(self.psi(x))
        return self._weights(self.gamma(self._relate(phi, psi, *self._place(x))), phi)

    def _layout(self, x: Tensor) -> torch.memory_format:
        """Of the maps inside: the longer of a row and the groups is the axis that lies together."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or x.shape[3] * 8 > self.groups:
            return torch.contiguous_format
        return torch.channels_last

    def _rows(self, phi: Tensor) -> int | None:
        """Rows of a chunk; None for all."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return None
        if self.chunk is not None or torch.is_grad_enabled() or self.training:
            return self.chunk
        numbers = phi.shape[0] * phi.shape[3] * self.width * self.footprint.kernel_size**2
        return max(_FREE // max(numbers, 1), 1)

    def _cut(self, maps: list[Tensor], first: int, last: int) -> list[Tensor]:
        """The output rows first..last - 1 of centres, and what of the padded maps they read."""
        reads = self.footprint.rows(first, last)
        return [m[:, :, first:last] if i in (0, 3) else m[:, :, reads] for i, m in enumerate(maps)]

    def _whole(self, phi: Tensor, psi: Tensor, beta: Tensor, *place: Tensor) -> Tensor:
        weight = self._weights(self.gamma(self._relate(phi, psi, *place)), phi)
        return weighted_sum(beta, weight, self.footprint)  # (N, C_out, H', W')

    def _in_chunks(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """As ``_whole`` in training, with the batch norms' statistics of all chunks together; nothing of a chunk is
        kept but what it gives.
        """
        first, _, one, second, _, two = self.gamma
        assert isinstance(first, nn.BatchNorm2d)
        assert isinstance(second, nn.BatchNorm2d)

        def related(*part: Tensor) -> Tensor:
            return self._relate(part[0], part[1], *part[3:])

        scale, shift = joint_norm(first, [light(moments_of(related), *part) for part in parts])

        def hidden(*part: Tensor) -> Tensor:
            return one((related(*part) * scale + shift).relu())

        scale_2, shift_2 = joint_norm(second, [light(moments_of(hidden), *part) for part in parts])

        def result(*part: Tensor) -> Tensor:
            weight = self._weights(two((hidden(*part) * scale_2 + shift_2).relu()), part[0])
            return weighted_sum(part[2], weight, self.footprint)

        return [light(result, *part) for part in parts]

    def extra_repr(self) -> str:
        at = f"kernel_size={self.footprint.kernel_size}, stride={self.footprint.stride}"
        return f"{self.in_channels}, {self.out_channels}, {self.relation}, {at}"


class PairwiseAttention(_Attention):
    """Map (N, C, H, W) to (N, C', H', W'): each neighbour's weight is a function of its own and the centre's features.

    Without positions a permuted footprint gives the same output. With a constant gamma it is a box filter of beta(x).

    Args:
        in_channels: C.
        out_channels: C'.
        relation: delta: "subtraction", "summation", "hadamard", "dot" or "concatenation".
        position: whether P_i - P_j joins the relation.
        attention: "softmax" over the footprint, or "linear" for none.
        relation_channels: r; C // 16 if None.
        kernel_size, stride, dilation: of the footprint; the kernel is odd.
        share: channels that share one weight; C' is a multiple of it.
        chunk: output rows handled at a time, which bounds the memory of training, too, at the price of computing the
            relations three times. None takes all at once, and as many as 16 MB hold where no gradient is needed.

    Raises:
        ValueError: a number below one or that does not fit, an even kernel, or an unknown option; in ``forward``, an
            input of other channels or not larger than the border.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        relation: Literal["subtraction", "summation", "hadamard", "dot", "concatenation"] = "subtraction",
        position: bool = True,
        attention: Literal["softmax", "linear"] = "softmax",
        relation_channels: int | None = None,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        share: int = 8,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            relation_channels=relation_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            share=share,
            relation=relation,
            relations=PAIRWISE,
            chunk=chunk,
        )
        if attention not in ("softmax", "linear"):
            raise ValueError(f"attention must be softmax or linear, got {attention!r}")
        middle = self.phi.out_channels
        own = {"dot": 1, "concatenation": 2 * middle}.get(relation, middle)
        self.softmax = attention == "softmax"
        self.place = nn.Conv2d(2, 2, 1) if position else None
        self.width = own + 2 * position
        self.gamma = _gamma(self.width, middle, self.groups)

    def _place(self, x: Tensor) -> list[Tensor]:
        """P of the centres and, padded, of the neighbours."""
        if self.place is None:
            return []
        height, width = x.shape[2:]
        across = torch.linspace(-1, 1, width, dtype=x.dtype, device=x.device).expand(height, width)
        down = torch.linspace(-1, 1, height, dtype=x.dtype, device=x.device)[:, None].expand(height, width)
        placed = self.place(torch.stack([across, down])[None])
        step = self.footprint.stride
        return [placed[..., ::step, ::step], self.footprint.pad(placed)]

    def _relate(self, phi: Tensor, psi: Tensor, *place: Tensor) -> Tensor:
        """(N, width, k * k, L)."""
        height, width = phi.shape[2:]
        theirs = neighbours(psi, self.footprint, height, width)  # (N, r, k * k, H', W')
        mine = phi.unsqueeze(2)
        if self.relation == "subtraction":
            related = mine - theirs
        elif self.relation == "summation":
            related = mine + theirs
        elif self.relation == "hadamard":
            related = mine * theirs
        elif self.relation == "dot":
            related = (mine * theirs).sum(1, keepdim=True)
        else:
            related = torch.cat([mine.expand_as(theirs), theirs], 1)
        if place:
            apart = place[0].unsqueeze(2) - neighbours(place[1], self.footprint, height, width)
            related = torch.cat([related, apart.expand(related.shape[0], -1, -1, -1, -1)], 1)
        return related.flatten(3)

    def _weights(self, mapped: Tensor, phi: Tensor) -> Tensor:
        weight = mapped.softmax(2) if self.softmax else mapped  # (N, G, k * k, L)
        return weight.unflatten(3, phi.shape[2:])


class PatchwiseAttention(_Attention):
    """Map (N, C, H, W) to (N, C', H', W'): all weights of a footprint are one function of all its features.

    With constant weights it is a depthwise convolution whose kernels are shared by channels.

    Args:
        in_channels: C.
        out_channels: C'.
        relation: delta: "concatenation", "star" (products of the centre with each) or "clique" (of each with each).
        relation_channels, kernel_size, stride, dilation, share, chunk: as in ``PairwiseAttention``.

    Raises:
        ValueError: as ``PairwiseAttention``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        relation: Literal["concatenation", "star", "clique"] = "concatenation",
        relation_channels: int | None = None,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        share: int = 8,
        chunk: int | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            relation_channels=relation_channels,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            share=share,
            relation=relation,
            relations=PATCHWISE,
            chunk=chunk,
        )
        middle, taps = self.phi.out_channels, kernel_size**2
        self.full = {"star": taps, "clique": taps**2}.get(relation, middle * (taps + 1))
        self.width = -(-self.full // taps)
        self.gamma = _gamma(self.full, self.groups, taps * self.groups)

    def _place(self, x: Tensor) -> list[Tensor]:
        if self.relation != "clique":
            return []
        phi = self.phi(x)  # not at the centres alone
        step = self.footprint.stride
        return [phi[..., ::step, ::step], self.footprint.pad(phi)]

    def _relate(self, phi: Tensor, psi: Tensor, *place: Tensor) -> Tensor:
        """(N, full, 1, L)."""
        theirs = neighbours(psi, self.footprint, *phi.shape[2:])  # (N, r, k * k, H', W')
        if self.relation == "star":
            related = (phi.unsqueeze(2) * theirs).sum(1)
        elif self.relation == "clique":
            mine = neighbours(place[1], self.footprint, *phi.shape[2:])
            related = torch.einsum("nrjhw,nrkhw->njkhw", mine, theirs).flatten(1, 2)
        else:
            related = torch.cat([phi, theirs.flatten(1, 2)], 1)
        return related.flatten(2).unsqueeze(2)

    def _weights(self, mapped: Tensor, phi: Tensor) -> Tensor:
        return mapped.view(
            mapped.shape[0], self.groups, self.footprint.kernel_size**2, *phi.shape[2:]
        )  # (N, G, k * k, H', W')


def _gamma(width: int, middle: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, out, 1),
    )
