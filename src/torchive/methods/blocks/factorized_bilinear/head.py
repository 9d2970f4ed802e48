"""The classifier's form: the layer at each position of the last map, then the mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

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
        if self.act != "none":
            x = x.tanh() if self.act == "tanh" else x.relu()
        mean = x.flatten(2).mean(2)  # (N, C)
        y = self.linear(mean)  # (N, K), the mean of the linear parts
        part = self.factors
        if not part.rank:
            return y
        if self.mode == "mean_then_layer":
            x = mean[..., None, None]
        elif x.ndim != 4:
            x = x.flatten(2).unsqueeze(3)
        weight = part.weight[..., None, None].to(x.dtype)
        z = F.conv2d(x, weight)  # (N, K k, h, w)
        own = None if part.diagonal else F.conv2d(x.square(), weight.square())
        squares = part.squares(z, own).mean((2, 3)).unflatten(1, (-1, part.rank))  # (N, K, k)
        return y + (squares * part.weights(squares)).sum(2)
