"""Any network with ternary convolutions and activations between its first and its last layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchive.methods.blocks.ternarynet.activation import TernaryTanh, Variant
from torchive.methods.blocks.ternarynet.convolution import Precision, TernaryConv2d, TernaryConv3d
from torchive.nn.passes import as_inputs, trial_pass
from torchive.nn.rewriting import Rewriting

_ACTS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)
_CONVS = (nn.Conv2d, nn.Conv3d)


def ternarize(
    network: nn.Module,
    precision: Precision = "ternary",
    *,
    example: Any = None,
    matches: Callable[[str], bool] | None = None,
    variant: Variant = "smooth",
    slopes: tuple[float, float] = (3.0, 8.0),
) -> Rewriting:
    """Turn the convolutions and activations of a network into ternary ones, in place; weights are taken over.

    The first convolution stays, and so do those whose output leaves the network, those of squeeze-and-excitation gates
    (maps of one position), depthwise ones, and activations that depthwise convolutions read or that stand behind the
    last ternary convolution. Other ReLU, ReLU6, Hardswish and SiLU become ``TernaryTanh``.

    Args:
        network: any network of 2-D or 3-D convolutions.
        precision: of the weights, as of ``TernaryConv2d``.
        example: an input, or a tuple of inputs; an image of 64 pixels if None.
        matches: which modules, by their dotted name; None is all.
        variant, slopes: as of ``TernaryTanh``; "relu" leaves the activations as they are.

    Returns:
        What was changed, with ``undo()``.

    Raises:
        ValueError: an unknown ``precision`` or ``variant``.
    """
    inputs = as_inputs(network, example, dims=(2, 3))
    wanted = matches or (lambda _: True)
    turns, single, last, readers = _look(network, inputs)
    result = Rewriting(network)
    places: list[tuple[int, str, Any]] = [(turns[name], name, network.get_submodule(name)) for name in turns]
    convs = [(turn, name, module) for turn, name, module in sorted(places) if isinstance(module, _CONVS)]
    chosen: dict[str, int] = {}
    kept = {convs[0][1]: "it is the first convolution"} if convs else {}
    kept |= dict.fromkeys(single, "it works on single positions") | dict.fromkeys(last, "it gives the output")
    for turn, name, module in convs:
        if not wanted(name):
            continue
        if name in kept:
            result.left_alone.append((name, kept[name]))
            continue
        if len(module.weight[0]) == 1:
            result.left_alone.append((name, "its filters see one channel: too few weights for one scale"))
            continue
        if type(module) not in _CONVS:
            result.left_alone.append((name, f"{type(module).__name__} computes more than a convolution"))
            continue
        cls: Any = TernaryConv2d if type(module) is nn.Conv2d else TernaryConv3d
        result.put(name, cls.from_module(module, precision=precision))
        chosen[name] = turn
    for turn, name, module in sorted(places) if variant != "relu" else ():
        if not isinstance(module, _ACTS) or name in single or not wanted(name) or not chosen:
            continue
        if turn > max(chosen.values()) or (readers.get(name) and not readers[name] & chosen.keys()):
            result.left_alone.append((name, "no ternary convolution reads it"))
        else:
            result.put(name, TernaryTanh.from_module(module, variant=variant, slopes=slopes))
    return result


def _look(
    network: nn.Module, inputs: tuple[Any, ...]
) -> tuple[dict[str, int], set[str], set[str], dict[str, set[str]]]:
    """One pass: the first turn of each convolution and activation, those on single positions, those that end the
    network, and which read whose output as it is.
    """
    turns: dict[str, int] = {}
    single: set[str] = set()
    outputs: dict[int, tuple[Tensor, str]] = {}
    readers: dict[str, set[str]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim < 4:
                return
            turns.setdefault(name, len(turns))
            if id(args[0]) in outputs:
                readers.setdefault(outputs[id(args[0])][1], set()).add(name)
            if args[0].shape[2:].numel() == 1:
                single.add(name)
            outputs[id(output)] = (output, name)

        return hook

    kinds = (*_CONVS, *_ACTS)
    named = ((name, m) for name, m in network.named_modules() if name and isinstance(m, kinds))
    result = trial_pass(network, inputs, (m.register_forward_hook(note(name)) for name, m in named))
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return turns, single, {outputs[id(leaf)][1] for leaf in leaves if id(leaf) in outputs}, readers
