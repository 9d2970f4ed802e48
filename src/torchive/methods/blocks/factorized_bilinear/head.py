"""The classifier's form: the layer at each position of the last map, then the mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchive.methods.blocks.factorized_bilinear.layer import FactorizedBilinear, Factors


class FactorizedBilinearHead(nn.Module):
    """Map (N, C, *S) to (N, K) scores: mean_l (b + W x_l + |F x_l|^2) with x = tanh of the map.

    It is bilinear pooling of low rank: the quadratic part is the dot product of F^T F with the pooled outer product.

    Args:
        in_channels: C.
        num_classes: K.
        rank: k; the paper has 20 on CIFAR and 50 on ImageNet, 0 is mean pooling and a linear layer.
        drop: share of the factors that is dropped in training.
        act: what the map goes through first: "tanh", which bounds the squares, "relu" or "none".
        mode: "layer_then_mean", as in the paper, or "mean_then_layer".
        diagonal: whether products of a feature with itself count; the release leaves them out.
        signed: whether every other factor is subtracted.
        shared_drop: whether one mask serves all classes and samples, as in the release.
        rate: multiple of the learning rate for F (``parameter_rules``).

    Raises:
        ValueError: a number out of range or an unknown option; in ``forward``, another number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        rank: int = 20,
        drop: float = 0.5,
        act: str = "tanh",
        mode: str = "layer_then_mean",
        diagonal: bool = True,
        signed: bool = False,
        shared_drop: bool = False,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        if act not in ("tanh", "relu", "none"):
            raise ValueError(f"act must be tanh, relu or none, got {act!r}")
        if mode not in ("layer_then_mean", "mean_then_layer"):
            raise ValueError(f"mode must be layer_then_mean or mean_then_layer, got {mode!r}")
        self.in_channels, self.act, self.mode, self.rate = in_channels, act, mode, rate
        self.linear = nn.Linear(in_channels, num_classes)
        options: dict[str, Any] = {"diagonal": diagonal, "signed": signed, "shared_drop": shared_drop}
        self.factors = Factors((in_channels,), num_classes, rank=rank, drop=drop, **options)

    @staticmethod
    def from_module(old: nn.Module, *, channels: int, **options: Any) -> nn.Module:
        """The layer that takes a linear layer's place, ``FactorizedBilinear``, with its weights."""
        return FactorizedBilinear.from_module(old, channels=channels, **options)

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """F may learn at a rate of its own."""
        return {"factors.weight": {"lr": self.rate}} if self.rate != 1 and self.factors.rank else {}

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, *S), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected floating-point features, got {x.dtype}")
        flat = x.flatten(2)  # (N, C, L)
        if self.act != "none":
            flat = flat.tanh() if self.act == "tanh" else flat.relu()
        mean = flat.mean(2, keepdim=True)  # (N, C, 1)
        y = self.linear(mean.squeeze(2))  # (N, K); the mean of the linear parts
        part = self.factors
        if not part.rank:
            return y
        if self.mode == "mean_then_layer":
            flat = mean
        z = _products(part, part.weight, flat)  # (N, K k, L)
        own = None if part.diagonal else _products(part, part.weight.square(), flat.square())
        squares = part.squares(z, own).mean(2).unflatten(1, (-1, part.rank))  # (N, K, k)
        return y + (squares * part.weights(flat)).sum(2)


def _products(part: Factors, weight: Tensor, x: Tensor) -> Tensor:
    """F x at each position: (N, C, L) to (N, K k, L); any strides, nothing is copied."""
    return torch.matmul(weight.to(x.dtype), x)
