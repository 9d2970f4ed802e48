"""A network with trained weights from a pinned package."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from torchive.data.faults import DataError
from torchive.data.weights import load_weights, read_weights, weights_info


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
