"""Weights of timm's ``nasnetalarge``, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from torchive.methods.backbones.nasnet.network import NASNet

#: pattern of timm's name within a cell -> the name here.
_RULES = (
    (r"comb_iter_(\d)_(left|right)\.separable_1\.depthwise_conv2d", r"\2.\1.1"),
    (r"comb_iter_(\d)_(left|right)\.separable_1\.pointwise_conv2d", r"\2.\1.2"),
    (r"comb_iter_(\d)_(left|right)\.bn_sep_1", r"\2.\1.3"),
    (r"comb_iter_(\d)_(left|right)\.separable_2\.depthwise_conv2d", r"\2.\1.5"),
    (r"comb_iter_(\d)_(left|right)\.separable_2\.pointwise_conv2d", r"\2.\1.6"),
    (r"comb_iter_(\d)_(left|right)\.bn_sep_2", r"\2.\1.7"),
    (r"conv_1x1\.conv", "last.1"),
    (r"conv_1x1\.bn", "last.2"),
    (r"conv_prev_1x1\.conv", "before.1"),
    (r"conv_prev_1x1\.bn", "before.2"),
    (r"path_1\.conv", "before.1.first"),
    (r"path_2\.conv", "before.1.second"),
    (r"final_path_bn", "before.1.norm"),
)


def load_timm(network: NASNet, weights: Mapping[str, Tensor]) -> NASNet:
    """Give a network of the variant "large" the weights of timm's ``nasnetalarge``; its classifier is left out.

    Raises:
        ValueError: a tensor of another shape, or a name that only one of the two networks has.
    """
    repeats = (len(network.cells) - 4) // 3
    found = {_renamed(name, repeats): t for name, t in weights.items() if not name.startswith("last_linear")}
    own = network.state_dict()
    if set(own) != set(found):
        odd = sorted(set(own) ^ set(found))
        raise ValueError(f"expected the tensors of nasnetalarge, got {len(odd)} others, such as {odd[0]}")
    for name, mine in own.items():
        if mine.shape != found[name].shape:
            raise ValueError(f"{name} has shape {tuple(mine.shape)}, the tensor for it {tuple(found[name].shape)}")
    network.load_state_dict(found)
    return network


def _renamed(name: str, repeats: int) -> str:
    """timm's name of a tensor as this network spells it."""
    cell, _, rest = name.partition(".")
    if cell == "conv0":
        return "stem." + rest.replace("conv", "0").replace("bn", "1")
    stem, reduction, normal = (
        re.fullmatch(p, cell) for p in (r"cell_stem_(\d)", r"reduction_cell_(\d)", r"cell_(\d+)")
    )
    if stem:
        number = int(stem[1])
    elif reduction:
        number = 2 + repeats + (repeats + 1) * int(reduction[1])
    elif normal:
        number = 2 + int(normal[1]) + int(normal[1]) // repeats
    else:
        return name
    for pattern, own in _RULES:
        match = re.match(pattern + r"(?=\.)", rest)
        if match:
            return f"cells.{number}.{match.expand(own)}{rest[match.end() :]}"
    return name
