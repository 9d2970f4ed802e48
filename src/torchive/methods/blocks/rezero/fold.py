"""Inference without gates: alpha moves into the last linear layer of its branch."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from torchive.methods.blocks.rezero.gate import ReZero
from torchive.methods.blocks.rezero.transformer import ReZeroDecoderLayer, ReZeroEncoderLayer
from torchive.nn.passes import as_inputs, trial_pass

_LINEAR = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)


@torch.no_grad()
def fold(model: nn.Module, example: Any) -> nn.Module:
    """A copy for inference in which W <- alpha W and b <- alpha b for the last linear layer of each gated branch.

    A gate that ends a branch elsewhere disappears; a ``ReZero`` with a branch and the Transformer layers keep a plain
    sum. The last registered linear layer is taken, and one pass over ``example`` (a tensor, or a tuple of arguments)
    proves for each branch that scaling that layer scales the branch; where it does not, the gate stays. The copy is in
    eval mode; the network itself stays as it was.
    """
    copy = deepcopy(model).eval()
    branches = _branches(copy)
    seen: dict[nn.Module, Any] = {}
    handles = (b.register_forward_pre_hook(lambda m, a: seen.setdefault(m, a) and None) for b in branches.values())
    trial_pass(copy, as_inputs(copy, example), handles)
    for gate, branch in branches.items():
        last = _last(branch)
        if branch in seen and last is not None and _is_linear(gate, branch, last, seen[branch]):
            _scale(last, gate.alpha)
            gate.alpha.fill_(1.0)
    for module in copy.modules():
        if isinstance(module, ReZeroEncoderLayer | ReZeroDecoderLayer):
            _fold_layer(module)
    for name, module in list(copy.named_modules()):
        if module in branches and module.branch is None and bool((module.alpha == 1).all()):
            parent, _, child = name.rpartition(".")
            setattr(copy.get_submodule(parent), child, nn.Identity())
    return copy


def _branches(model: nn.Module) -> dict[ReZero, nn.Module]:
    """Gate -> the branch that it multiplies: its own, or the module that stands in front of it."""
    found: dict[ReZero, nn.Module] = {}
    for parent in model.modules():
        before: nn.Module | None = None
        for name, child in parent.named_children():
            if isinstance(child, ReZero) and child.branch is not None:
                found[child] = child.branch
            elif isinstance(child, ReZero) and before is not None and (name == "part" or type(parent) is nn.Sequential):
                found[child] = before  # "part" is what conversions insert
            before = child
    return found


def _last(branch: nn.Module) -> nn.Module | None:
    """The last layer that is linear in its weights and has some, in the order of registration."""
    layers = [m for m in branch.modules() if isinstance(m, _LINEAR) and isinstance(m.weight, Tensor)]
    return layers[-1] if layers else None


def _is_linear(gate: ReZero, branch: nn.Module, last: nn.Module, inputs: Any) -> bool:
    """Whether scaling that layer's outputs scales those of the branch, shown on the inputs that it had."""
    once = branch(*inputs)
    state = [(p, p.clone()) for p in (last.weight, last.bias) if isinstance(p, Tensor)]
    factor = torch.linspace(1.5, 3.0, len(gate.alpha)).to(gate.alpha)
    if len(factor) not in (1, len(last.weight)):  # type: ignore[arg-type]
        return False
    _scale(last, factor)
    scaled = branch(*inputs)
    for parameter, value in state:
        parameter.copy_(value)
    expected = once * gate.shaped(factor, once)
    return bool(once.any()) and torch.allclose(scaled, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def _scale(layer: nn.Module, alpha: Tensor) -> None:
    for parameter in (layer.weight, layer.bias):
        if isinstance(parameter, Tensor):
            factor = alpha.to(parameter)
            parameter.mul_(factor if len(factor) == 1 else factor.view(-1, *[1] * (parameter.ndim - 1)))


def _fold_layer(layer: ReZeroEncoderLayer | ReZeroDecoderLayer) -> None:
    """The output projections of attention and the second linear layer take alpha."""
    ends = [layer.self_attn.out_proj, layer.linear2]
    if isinstance(layer, ReZeroDecoderLayer):
        ends.insert(1, layer.multihead_attn.out_proj)
    for i, end in enumerate(ends):
        _scale(end, layer.alpha[i % len(layer.alpha)].view(1))
    layer.alpha.fill_(1.0)
