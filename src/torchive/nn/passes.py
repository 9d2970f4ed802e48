"""One pass of a network as it stands: in evaluation mode, on an input that it takes, watched by hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_CONVOLUTIONS: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_SIDES = {2: (64, 64), 3: (16, 64, 64)}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module, a frozen one too, has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks for as long as it lasts; of handles that are made one by one none stays if one fails."""
    kept: list[RemovableHandle] = []
    try:
        kept.extend(handles)
        yield
    finally:
        for handle in kept:
            handle.remove()


def trial_pass(network: nn.Module, inputs: tuple[Any, ...], handles: Iterable[RemovableHandle]) -> Any:
    """What the network gives for its arguments, without gradients and in evaluation mode, its hooks removed again."""
    with hooked(handles), torch.no_grad(), eval_mode(network):
        return network(*inputs)


def as_inputs(network: nn.Module, example: Any = None, *, dims: Sequence[int] = (2,)) -> tuple[Any, ...]:
    """The arguments of a trial pass: the example, or zeros of 64 pixels (16 frames) for the first convolution.

    Args:
        network: whose first convolution tells channels, device and dtype.
        example: an input, or a tuple of inputs; None makes one.
        dims: which convolutions count, 2 and 3 dimensions.

    Raises:
        ValueError: there is no example and no such convolution.
    """
    if example is not None:
        return example if isinstance(example, tuple) else (example,)
    kinds = tuple(_CONVOLUTIONS[n] for n in dims)
    first: Any = next((m for m in network.modules() if isinstance(m, kinds)), None)
    if first is None:
        what = "convolution" if len(kinds) > 1 else f"{dims[0]}-D convolution"
        raise ValueError(f"{type(network).__name__} has no {what}")
    weight = first.weight
    return (torch.zeros(1, first.in_channels, *_SIDES[weight.ndim - 2], device=weight.device, dtype=weight.dtype),)
