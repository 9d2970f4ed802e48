"""The pooled outer product, its normalisations, its triangle and its sketch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.nn.global_pool import flattens


def outer_mean(x: Tensor, y: Tensor) -> Tensor:
    """Phi: (N, C, L) and (N, D, L) to (N, C, D); any strides, nothing is copied."""
    return torch.bmm(x, y.transpose(1, 2)) / x.shape[2]


def signed_root(z: Tensor, eps: float = 1e-5) -> Tensor:
    """sign(z) (sqrt(|z| + eps) - sqrt(eps)), written so that nothing cancels and the gradient at zero is finite."""
    return z / ((z.abs() + eps).sqrt() + eps**0.5)


def matrix_root(a: Tensor, iterations: int = 5, ridge: float = 0.0) -> Tensor:
    """Square roots of symmetric positive matrices (N, C, C), plus ``ridge`` on the diagonal, by Newton and Schulz.

    It is computed in float32 or better, without autocast; a matrix of zeros has the root zero.
    """
    kind = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        one = torch.eye(a.shape[-1], dtype=kind, device=a.device)
        y = a.to(kind) + ridge * one
        size = y.square().sum((1, 2), keepdim=True).clamp_min(torch.finfo(kind).tiny).sqrt()  # (N, 1, 1)
        y, z = y / size, one.expand_as(y)
        for _ in range(iterations):
            t = 1.5 * one - 0.5 * torch.bmm(z, y)
            y, z = torch.bmm(y, t), torch.bmm(t, z)
        return (y * size.sqrt()).to(a.dtype)


def triangle(a: Tensor) -> Tensor:
    """The upper triangles of symmetric matrices: (N, C, C) to (N, C (C + 1) / 2).

    What is off the diagonal is multiplied by sqrt(2), so that dot products stay those of the whole matrices.
    """
    rows, columns = torch.triu_indices(a.shape[1], a.shape[1], device=a.device)
    scale = torch.where(rows == columns, 1.0, 2**0.5).to(a.dtype)
    return a[:, rows, columns] * scale


class TensorSketch(nn.Module):
    """Random sketch (N, C, D) to (N, d) of matrices whose dot products it keeps in the mean.

    Bins and signs are buffers, drawn once. Of x y^T it is the circular convolution of the count sketches of x and y.

    Args:
        in_channels: C.
        second_channels: D.
        out_channels: d.

    Raises:
        ValueError: a number below one.
    """

    bins: Tensor
    second_bins: Tensor
    signs: Tensor
    second_signs: Tensor

    def __init__(self, in_channels: int, second_channels: int, out_channels: int) -> None:
        super().__init__()
        if min(in_channels, second_channels, out_channels) < 1:
            given = f"{in_channels}, {second_channels} and {out_channels}"
            raise ValueError(f"in_channels, second_channels and out_channels must be >= 1, got {given}")
        self.out_channels = out_channels
        for prefix, size in (("", in_channels), ("second_", second_channels)):
            self.register_buffer(f"{prefix}bins", torch.randint(out_channels, (size,)))
            self.register_buffer(f"{prefix}signs", 2.0 * torch.randint(2, (size,)) - 1)

    def forward(self, phi: Tensor) -> Tensor:
        bins = (self.bins[:, None] + self.second_bins).remainder(self.out_channels).flatten()  # (C D,)
        values = (phi * (self.signs[:, None] * self.second_signs).to(phi.dtype)).flatten(1)  # (N, C D)
        empty = phi.new_zeros(phi.shape[0], self.out_channels)
        return empty.scatter_add(1, bins.expand(phi.shape[0], -1), values)


class BilinearPooling(nn.Module):
    """Maps (N, C, *S) and (N, D, *S) to descriptors (N, F) of length one; without a second map the first counts twice.

    F is C D, C (C + 1) / 2 with ``compact="triangle"``, or ``out_channels`` with ``compact="sketch"``.

    Args:
        in_channels: C.
        second_channels: D, for two streams; None for one that is shared.
        compact: "none" keeps the whole matrix, "triangle" half of a shared stream's without loss, "sketch" a sketch.
        out_channels: d of the sketch.
        root_iterations: Newton-Schulz iterations of the matrix square root, for a shared stream; 0 takes none.
        ridge: what is added to the diagonal before the matrix root.
        eps: what keeps the root's gradient finite.

    Raises:
        ValueError: a number out of range, or an option that does not go with two streams; in ``forward``, other shapes.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        second_channels: int | None = None,
        compact: str = "none",
        out_channels: int = 8192,
        root_iterations: int = 0,
        ridge: float = 1e-5,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        second = in_channels if second_channels is None else second_channels
        if min(in_channels, second) < 1 or root_iterations < 0:
            given = f"{in_channels}, {second} and {root_iterations}"
            raise ValueError(f"expected channels >= 1 and root_iterations >= 0, got {given}")
        if compact not in ("none", "triangle", "sketch"):
            raise ValueError(f"compact must be none, triangle or sketch, got {compact!r}")
        if eps <= 0 or ridge < 0:
            raise ValueError(f"expected eps > 0 and ridge >= 0, got {eps} and {ridge}")
        if second_channels is not None and (compact == "triangle" or root_iterations):
            given = "compact='triangle'" if compact == "triangle" else f"root_iterations={root_iterations}"
            raise ValueError(f"the matrix of two streams is not symmetric: expected one stream, got {given}")
        self.in_channels, self.second_channels, self.compact = in_channels, second_channels, compact
        self.root_iterations, self.ridge, self.eps = root_iterations, ridge, eps
        self.sketch = TensorSketch(in_channels, second, out_channels) if compact == "sketch" else None
        lengths = {"none": in_channels * second, "triangle": in_channels * (in_channels + 1) // 2}
        self.out_channels = lengths.get(compact, out_channels)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        phi = self.matrix(x, y)  # (N, C, D)
        if self.sketch is not None:
            z = signed_root(self.sketch(phi), self.eps)  # (N, d)
        else:
            z = signed_root(phi, self.eps)
            z = triangle(z) if self.compact == "triangle" else z.flatten(1)  # (N, F)
        return F.normalize(z)

    def matrix(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Phi, (N, C, D): pooled, with the matrix root if there is one, before the other normalisations."""
        first = self._flat(x, self.in_channels)  # (N, C, L)
        if (y is None) is not (self.second_channels is None):
            raise ValueError(f"expected {1 if self.second_channels is None else 2} maps, got {1 if y is None else 2}")
        if y is None or self.second_channels is None:
            phi = outer_mean(first, first)
            return matrix_root(phi, self.root_iterations, self.ridge) if self.root_iterations else phi
        if y.shape[2:] != x.shape[2:]:
            if y.ndim != 4 or x.ndim != 4:
                raise ValueError(f"expected maps of one size, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
            y = F.interpolate(y, x.shape[2:], mode="bilinear")
        return outer_mean(first, self._flat(y, self.second_channels))

    def _flat(self, x: Tensor, channels: int) -> Tensor:
        if x.ndim < 3 or x.shape[1] != channels:
            raise ValueError(f"expected (N, {channels}, *S), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point features, got {x.dtype}")
        return x.flatten(2)

    def extra_repr(self) -> str:
        second = "" if self.second_channels is None else f", second_channels={self.second_channels}"
        return f"{self.in_channels}{second}, compact={self.compact}, root_iterations={self.root_iterations}"


class CompactBilinearPool(nn.Module):
    """Global pooling (N, C, *S) to (N, C, 1..) by a sketch of length C, which takes the place of a mean over positions.

    The descriptor has length sqrt(C), so that its entries are about one in size, as those of normalised features are.

    Args:
        channels: C.
        flatten: whether the result is (N, C).
        eps: what keeps the root's gradient finite.

    Raises:
        ValueError: ``channels`` below one; in ``forward``, another number of channels.
    """

    def __init__(self, channels: int, *, flatten: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.flatten = channels, flatten
        self.pooling = BilinearPooling(channels, compact="sketch", out_channels=channels, eps=eps)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int, **options: Any) -> CompactBilinearPool:
        """The layer that takes a global mean's place.

        Raises:
            ValueError: ``old`` does not pool to one position, or has its channels last.
        """
        return cls(channels, **{"flatten": flattens(old), **options})

    def forward(self, x: Tensor) -> Tensor:
        y = self.pooling(x) * self.channels**0.5  # (N, C)
        return y if self.flatten else y.view(*y.shape, *[1] * (x.ndim - 2))
