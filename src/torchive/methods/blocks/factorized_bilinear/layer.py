"""The layer as a linear one, on the last axis, and as a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def slow_start(progress: float, *, share: float = 0.03, scale: float = 0.1) -> float:
    """The multiple of the learning rate at a share of the run: from ``scale`` to 1 over the first ``share``.

    The release takes 3 of 100 epochs on CIFAR and 1 of 120 on ImageNet, for all weights alike.
    """
    return scale + (1 - scale) * min(progress / share, 1.0) if share > 0 else 1.0


class Factors(nn.Module):
    """The quadratic part that the forms of the layer share: K times k vectors, their signs and DropFactor.

    Args:
        shape: shape of one vector: (n,) of a linear layer, (C, h, w) of a convolution.
        outputs: K.
        rank: k; 0 has no quadratic part.
        drop: share of the factors that is dropped in training.
        diagonal: whether products of a feature with itself count.
        signed: whether every other factor is subtracted.
        shared_drop: whether one mask of k factors serves a whole batch.

    Raises:
        ValueError: a number out of range.
    """

    signs: Tensor | None

    def __init__(
        self,
        shape: tuple[int, ...],
        outputs: int,
        *,
        rank: int = 20,
        drop: float = 0.5,
        diagonal: bool = True,
        signed: bool = False,
        shared_drop: bool = False,
    ) -> None:
        super().__init__()
        if min(*shape, outputs) < 1 or rank < 0:
            raise ValueError(f"expected sizes >= 1 and rank >= 0, got {shape}, {outputs} and {rank}")
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {drop}")
        self.outputs, self.rank, self.drop = outputs, rank, drop
        self.diagonal, self.shared_drop = diagonal, shared_drop
        self.weight = nn.Parameter(torch.empty(outputs * rank, *shape))  # F, the k rows of an output side by side
        size = self.weight[0].numel() if rank else 1
        nn.init.normal_(self.weight, std=(2 / max(rank * size, 1)) ** 0.5)
        signs = 1.0 - 2.0 * (torch.arange(rank) % 2)
        self.register_buffer("signs", signs.expand(outputs, -1).clone() if signed else None)  # (K, k)

    def squares(self, z: Tensor, own: Tensor | None) -> Tensor:
        """(F x)^2, without what the features' own squares give where these do not count."""
        return z.square() if own is None else z.square() - own

    def weights(self, like: Tensor) -> Tensor:
        """What each squared product counts, (N, K, k) or something that expands to it: DropFactor and signs."""
        shape = (1 if self.shared_drop else like.shape[0], 1 if self.shared_drop else self.outputs, self.rank)
        if self.training and self.drop:
            kept = (torch.rand(shape, dtype=torch.float32, device=like.device) >= self.drop).to(like.dtype)
        else:
            kept = like.new_ones(()).expand(1, 1, self.rank) * (1 - self.drop)
        return kept if self.signs is None else kept * self.signs.to(like.dtype)

    def extra_repr(self) -> str:
        form = f"rank={self.rank}, drop={self.drop}, diagonal={self.diagonal}"
        return f"{tuple(self.weight.shape[1:])}, {self.outputs}, {form}, signed={self.signs is not None}"


class FactorizedBilinear(nn.Module):
    """(..., n) to (..., K), as ``nn.Linear``, with b_j + w_j^T x + |F_j x|^2; K (1 + n + k n) weights.

    Rows of the first axis are samples; what lies between is of one sample and loses the same factors.

    Args:
        in_channels: n.
        out_channels: K.
        rank: k; the paper has 20 on CIFAR and 50 on ImageNet, 0 is a linear layer.
        drop: share of the factors that is dropped in training.
        diagonal: whether products of a feature with itself count; the release leaves them out.
        signed: whether every other factor is subtracted, so that any quadratic form of rank k can be had.
        shared_drop: whether one mask serves all outputs and samples, as in the release.
        rate: multiple of the learning rate for F (``parameter_rules``).

    Raises:
        ValueError: a number out of range; in ``forward``, another number of features.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        rank: int = 20,
        drop: float = 0.5,
        diagonal: bool = True,
        signed: bool = False,
        shared_drop: bool = False,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        options: dict[str, Any] = {"diagonal": diagonal, "signed": signed, "shared_drop": shared_drop}
        self.factors = Factors((in_channels,), out_channels, rank=rank, drop=drop, **options)
        self.rate = rate

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int, **options: Any) -> nn.Module:
        """The layer that takes a linear layer's or a convolution's place and keeps its weights.

        The quadratic part starts as that of a new layer; a start of zero would never leave zero.

        Raises:
            ValueError: ``old`` is neither, or a convolution with groups or dilation.
        """
        if isinstance(old, nn.Conv2d):
            return FactorizedBilinearConv.from_module(old, channels=channels, **options)
        if not isinstance(old, nn.Linear):
            raise ValueError(f"expected nn.Linear or nn.Conv2d, got {type(old).__name__}")
        new = cls(old.in_features, old.out_features, **options)
        new.linear = old
        return new

    @classmethod
    def from_forms(cls, forms: Tensor, *, drop: float = 0.0) -> FactorizedBilinear:
        """The layer whose quadratic part is x^T A_j x in testing, of symmetric matrices (K, n, n), with n factors."""
        if forms.ndim != 3 or forms.shape[1] != forms.shape[2]:
            raise ValueError(f"expected (K, n, n), got shape {tuple(forms.shape)}")
        outputs, size, _ = forms.shape
        layer = cls(size, outputs, rank=size, drop=drop, signed=True).to(forms)
        values, vectors = torch.linalg.eigh((forms + forms.transpose(1, 2)) / 2)
        with torch.no_grad():
            rows = (values.abs() / (1 - drop)).sqrt().unsqueeze(2) * vectors.transpose(1, 2)  # (K, n, n)
            layer.factors.weight.copy_(rows.flatten(0, 1))
            assert layer.factors.signs is not None
            layer.factors.signs.copy_(torch.where(values < 0, -1.0, 1.0))
            nn.init.zeros_(layer.linear.weight)
            nn.init.zeros_(layer.linear.bias)
        return layer

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """F may learn at a rate of its own."""
        return {"factors.weight": {"lr": self.rate}} if self.rate != 1 and self.factors.rank else {}

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[-1] != self.linear.in_features:
            raise ValueError(f"expected (N, ..., {self.linear.in_features}), got shape {tuple(x.shape)}")
        y = self.linear(x)  # (N, ..., K)
        part = self.factors
        if not part.rank:
            return y
        z = F.linear(x, part.weight)  # (N, ..., K k)
        own = None if part.diagonal else F.linear(x.square(), part.weight.square())
        squares = part.squares(z, own).unflatten(-1, (-1, part.rank))  # (N, ..., K, k)
        weights = part.weights(z)
        weights = weights.view(weights.shape[0], *[1] * (x.ndim - 2), *weights.shape[1:])
        return y + (squares * weights).sum(-1)


class FactorizedBilinearConv(nn.Module):
    """(N, C, H, W) to (N, K, h, w), as ``nn.Conv2d``: the layer on each patch of C kernel_size^2 numbers.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: side of the window; the paper's head has 1.
        stride: step of the window.
        padding: border of zeros that is added on each side.
        rank: k, see ``FactorizedBilinear``.
        drop: share of the factors that is dropped in training, the same at all positions.
        diagonal: whether products of a number with itself count.
        signed: whether every other factor is subtracted.
        shared_drop: whether one mask serves all outputs and samples.

    Raises:
        ValueError: a number out of range; in ``forward``, another number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        rank: int = 20,
        drop: float = 0.5,
        diagonal: bool = True,
        signed: bool = False,
        shared_drop: bool = False,
    ) -> None:
        super().__init__()
        self.linear = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        options: dict[str, Any] = {"diagonal": diagonal, "signed": signed, "shared_drop": shared_drop}
        shape = (in_channels, *self.linear.kernel_size)
        self.factors = Factors(shape, out_channels, rank=rank, drop=drop, **options)

    @classmethod
    def from_module(cls, old: nn.Module, *, channels: int, **options: Any) -> FactorizedBilinearConv:
        """The layer that takes a convolution's place and keeps its weights.

        Raises:
            ValueError: ``old`` is no convolution, or one with groups, dilation or another border than zeros.
        """
        if not isinstance(old, nn.Conv2d) or old.groups != 1 or set(old.dilation) != {1} or old.padding_mode != "zeros":
            raise ValueError(f"expected a convolution without groups and dilation, with zeros around, got {old}")
        window: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
        new = cls(channels, old.out_channels, **window, **options)
        new.linear = old
        return new

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.linear.in_channels:
            raise ValueError(f"expected (N, {self.linear.in_channels}, H, W), got shape {tuple(x.shape)}")
        y = self.linear(x)  # (N, K, h, w)
        part = self.factors
        if not part.rank:
            return y
        place: tuple[Any, ...] = (None, self.linear.stride, self.linear.padding)
        z = F.conv2d(x, part.weight, *place)  # (N, K k, h, w)
        own = None if part.diagonal else F.conv2d(x.square(), part.weight.square(), *place)
        squares = part.squares(z, own).unflatten(1, (-1, part.rank))  # (N, K, k, h, w)
        return y + (squares * part.weights(z)[..., None, None]).sum(2)
