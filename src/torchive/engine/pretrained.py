"""A network with trained weights from a pinned package."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torchive.data.faults import DataError
from torchive.data.weights import load_weights, read_weights, weights_info
from torchive.protocols import Level


def pretrained_network(name: str) -> nn.Module:
    """The network of these weights, in evaluation mode: timm's, (N, 3, H, W) to (N, 1000), or a method of this archive.

    Images are (pixel - mean) / std, as ``torchive.data.weights.WEIGHTS[name]`` says.

    Raises:
        DataError: no such weights, the package cannot be had, or the tensors are not the network's.
    """
    import timm

    info = weights_info(name)
    if ":" in info.network:
        module, _, function = info.network.partition(":")
        network: nn.Module = getattr(import_module(module), function)(read_weights(name))
        return network
    model: nn.Module = timm.create_model(info.network, **info.options)
    own, found = model.state_dict(), load_weights(name)
    if [v.shape for v in own.values()] != [v.shape for v in found.values()]:
        raise DataError(f"{info.package}: its tensors are not those of {info.network}")
    model.load_state_dict(dict(zip(own, found.values(), strict=True)))
    return model.eval()


class PretrainedFeatures(nn.Module):
    """A trained network as a detector's backbone: images (N, 3, H, W) in [0, 1] to its maps, finest first.

    It normalises the images itself, and fills them with zeros at the right and below to multiples of the coarsest
    stride. There all strided convolutions halve even sizes, so that timm's "same" padding, whose sizes an export takes
    minutes to solve, is a constant. Its batch norms keep the statistics they were trained with, since a detector's
    batches are small. Recipes name it: ``backbone: {class_path: torchive.engine.pretrained.PretrainedFeatures}``.

    Args:
        weights: a name of ``torchive.data.weights.WEIGHTS`` whose network is timm's.
        output_stride: the coarsest map's stride, 32, 16 or 8; below 32 the later stages are dilated instead.

    Raises:
        DataError: as ``pretrained_network``, or weights of a network that has no feature maps.
    """

    def __init__(self, *, weights: str = "efficientnet_lite0", output_stride: int = 32) -> None:
        super().__init__()
        import timm

        info = weights_info(weights)
        if ":" in info.network:
            raise DataError(f"{weights}: these weights are a whole method's, not a backbone's")
        self.body = timm.create_model(info.network, features_only=True, output_stride=output_stride, **info.options)
        trained = pretrained_network(weights).state_dict()
        self.body.load_state_dict({name: trained[name] for name in self.body.state_dict()})
        maps = self.body.feature_info
        self.levels = tuple(Level(c, s) for c, s in zip(maps.channels(), maps.reduction(), strict=True))
        self.mean, self.std, self.divisor = info.mean, info.std, self.levels[-1].stride
        for name, module in list(self.body.named_modules()):
            if isinstance(module, timm.layers.Conv2dSame):
                self.body.set_submodule(name, EvenConv2d.from_same(module))
        self.train()  # its norms too are held from the start

    def train(self, mode: bool = True) -> PretrainedFeatures:
        """Training mode for all but the batch norms."""
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        x = (x - self.mean) / self.std
        height, width = x.shape[2:]
        if not statically_known_true(height % self.divisor == 0) or not statically_known_true(
            width % self.divisor == 0
        ):
            x = F.pad(x, (0, -width % self.divisor, 0, -height % self.divisor))
        return list(self.body(x))


class EvenConv2d(nn.Conv2d):
    """TensorFlow's "same" convolution of sides that the stride divides: ``kernel - stride`` zeros, most at the end."""

    @classmethod
    def from_same(cls, old: nn.Conv2d) -> EvenConv2d:
        """The same weights, of a convolution that pads by what its input's size asks for."""
        with torch.device("meta"):
            new = cls(
                old.in_channels,
                old.out_channels,
                old.kernel_size,  # type: ignore[arg-type]
                old.stride,  # type: ignore[arg-type]
                dilation=old.dilation,  # type: ignore[arg-type]
                groups=old.groups,
                bias=old.bias is not None,
            )
        new.weight, new.bias = old.weight, old.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        border: list[int] = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            border = [total // 2, total - total // 2, *border]
        return super().forward(F.pad(x, border))
