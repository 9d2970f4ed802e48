"""Slim convolutions in whole networks: the layer, the norm behind it, and the convolution that reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchive.methods.blocks.slimconv.convolution import SlimConv
from torchive.nn.passes import as_inputs, eval_mode, hooked
from torchive.nn.rewriting import Rewriting


def slim(
    network: nn.Module,
    *,
    example: Any = None,
    matches: Callable[[str], bool] | None = None,
    folds: int = 2,
    lower_groups: int | None = None,
    reduction: int = 32,
    gate_norm: Literal["batch", "layer"] = "batch",
) -> Rewriting:
    """Put slim convolutions into a network, in place.

    A 3x3 convolution that keeps its channels is replaced where its map goes, by way of a batch norm and pointwise
    layers, into one other convolution alone: as in a bottleneck, and in a basic block's first half. The batch norm
    behind it goes, and the other convolution keeps the weights of the channels that are left.

    Args:
        network: any network of 2-D convolutions.
        example: an input, or a tuple of inputs; an image of 64 pixels if None.
        matches: which convolutions, by their dotted name; None is all.
        folds, lower_groups, reduction, gate_norm: as of ``SlimConv``.

    Returns:
        What was changed, with ``undo()``.

    Raises:
        ValueError: ``folds`` or ``reduction`` below one, or an unknown ``gate_norm``.
    """
    SlimConv(2 * max(folds, 1), folds=folds, reduction=reduction, gate_norm=gate_norm)  # refuses bad options at once
    flow = _Flow(network)
    with torch.no_grad(), eval_mode(network), flow.watched():
        outputs = network(*as_inputs(network, example))
    flow.results = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    result, taken = Rewriting(network), set()
    for name, old in list(network.named_modules()):
        if not isinstance(old, nn.Conv2d) or old.kernel_size != (3, 3) or name in taken:
            continue
        if matches is not None and not matches(name):
            continue
        found = _next(flow, name, old)
        if isinstance(found, str):
            result.left_alone.append((name, found))
            continue
        norm, reader = found
        try:
            new = SlimConv.from_module(
                old, folds=folds, lower_groups=lower_groups, reduction=reduction, gate_norm=gate_norm
            )
        except ValueError as error:
            result.left_alone.append((name, str(error)))
            continue
        result.put(name, new)
        if norm is not None:
            result.put(norm, _without_norm(network.get_submodule(norm)), told=False)
        result.put(reader, _narrowed(network.get_submodule(reader), new.out_channels), told=False)
        taken.add(reader)
    return result


def _next(flow: _Flow, name: str, old: nn.Conv2d) -> tuple[str | None, str] | str:
    """The batch norm and the convolution that a convolution's map goes through, or why there are none."""
    if old.in_channels != old.out_channels:
        return f"{old.in_channels} channels become {old.out_channels}"
    if old.groups == old.in_channels:
        return "it is depthwise"
    steps = list(flow.after(name))
    norm = next((step.owner for step in steps if isinstance(step.module, _BatchNorm)), None)
    if not steps or not isinstance(steps[-1].module, nn.Conv2d):
        return "its map does not go into one other convolution alone"
    if steps[-1].module.groups != 1:
        return f"the next convolution has {steps[-1].module.groups} groups"
    return norm, steps[-1].owner


def _without_norm(norm: nn.Module) -> nn.Module:
    """What is left of a norm that has an activation of its own."""
    act = getattr(norm, "act", None)
    return copy.deepcopy(act) if isinstance(act, nn.Module) else nn.Identity()


def _narrowed(reader: nn.Module, channels: int) -> nn.Module:
    """A convolution that reads the first channels only."""
    assert isinstance(reader, nn.Conv2d)
    new = copy.copy(reader)
    new._parameters = dict(reader._parameters)
    new.in_channels = channels
    new.weight = nn.Parameter(reader.weight.detach()[:, :channels].clone(), reader.weight.requires_grad)
    if reader.bias is not None:
        new.bias = nn.Parameter(reader.bias.detach().clone(), reader.bias.requires_grad)
    return new


@dataclass
class _Step:
    """One function that a network called: where, the tensors that went in, and the one that came out."""

    name: str
    owner: str
    module: nn.Module
    inputs: list[Tensor]
    output: Tensor


_POINTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.ELU,
    nn.Mish,
    nn.Dropout,
    nn.Dropout2d,
)
_FUNCTIONS = frozenset(
    ["relu", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "elu", "mish", "dropout", "dropout2d"]
)


@dataclass
class _Flow:
    """Which function's tensor goes into which."""

    network: nn.Module
    steps: list[_Step] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)  # what the network gives

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While the network runs, note its steps."""
        stack: list[tuple[str, nn.Module]] = [("", self.network)]
        handles = []
        for name, module in self.network.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(lambda m, _, n=name: stack.append((n, m))))
                handles.append(module.register_forward_hook(lambda *_: _drop(stack)))
        steps = self.steps

        class Watch(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                output = func(*args, **(kwargs or {}))
                if isinstance(output, Tensor) and func.__name__ != "__get__":
                    flat = [*args, *(kwargs or {}).values()]
                    flat = [v for value in flat for v in (value if isinstance(value, list | tuple) else [value])]
                    given = [value for value in flat if isinstance(value, Tensor)]
                    steps.append(_Step(func.__name__.strip("_"), *stack[-1], given, output))
                return output

        with hooked(handles), Watch():
            yield

    def after(self, name: str) -> Iterator[_Step]:
        """The steps that a module's one output goes through, up to the next convolution or the first fork."""
        own = [i for i, step in enumerate(self.steps) if step.owner == name]
        if len(own) != 1:
            return
        index = own[0]
        output = self.steps[index].output
        while True:
            readers = [i for i in range(index + 1, len(self.steps)) if _reads(self.steps[i], output)]
            if not readers or (len(readers) > 1 and self.steps[readers[0]].output is not output):
                return
            if any(leaf is output for leaf in self.results):
                return
            index = readers[0]
            step = self.steps[index]
            if isinstance(step.module, nn.Conv2d):
                if sum(other.owner == step.owner for other in self.steps) == 1:
                    yield step
                return
            if not (isinstance(step.module, (*_POINTWISE, _BatchNorm)) or step.name in _FUNCTIONS):
                return
            yield step
            output = step.output


def _reads(step: _Step, tensor: Tensor) -> bool:
    return any(value is tensor for value in step.inputs)


def _drop(stack: list[Any]) -> None:
    stack.pop()


def slim_resnet(
    layers: Sequence[int] = (3, 4, 6, 3),
    *,
    folds: int = 2,
    lower_groups: int | None = None,
    num_classes: int = 1000,
    **options: Any,
) -> nn.Module:
    """Sc-ResNet of bottlenecks, (N, 3, H, W) to (N, K): torchvision's network with slim convolutions.

    Args:
        layers: bottlenecks of each stage: (3, 4, 6, 3) is Sc-ResNet-50, (3, 4, 23, 3) 101.
        folds, lower_groups: as of ``SlimConv``.
        num_classes: K.
        options: further arguments of torchvision's ``ResNet``, such as ``groups`` and ``width_per_group``.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    network = ResNet(Bottleneck, list(layers), num_classes=num_classes, **options)
    slim(network, folds=folds, lower_groups=lower_groups)
    return network
