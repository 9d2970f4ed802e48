"""Attention in a given network: the convolutions that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.backbones.san_self_attention.attention import PairwiseAttention, PatchwiseAttention
from torchive.nn.passes import as_inputs, trial_pass
from torchive.nn.rewriting import Rewriting

LEAST_CHANNELS = 16  # a relation takes a sixteenth of them


def attend(
    network: nn.Module,
    last: int | None = 3,
    *,
    kind: Literal["patchwise", "pairwise"] = "patchwise",
    relation: str | None = None,
    chunk: int | None = None,
    example: Any = None,
    matches: Callable[[str], bool] | None = None,
) -> Rewriting:
    """Put attention in the place of a network's spatial convolutions, in place; the new layers start untrained.

    Taken are square convolutions of odd kernels above 1 that keep the size, whole or depthwise, with at least 16
    channels, on maps that are larger than the border; each keeps its channels, kernel, stride and dilation.

    Args:
        network: any network of 2-D convolutions.
        last: how many of them, from the end; None is all, which costs most on the large maps of the first layers.
        kind: of attention.
        relation: delta of that kind; None takes the paper's, concatenation or subtraction.
        chunk: rows at a time, to bound the memory of training.
        example: an input, or a tuple of inputs; an image of 64 pixels if None.
        matches: which convolutions, by their dotted name; None is all.

    Returns:
        What was changed, with ``undo()``.

    Raises:
        ValueError: an unknown ``kind`` or ``relation``, or ``last`` or ``chunk`` below 1.
    """
    if kind not in ("patchwise", "pairwise"):
        raise ValueError(f"kind must be patchwise or pairwise, got {kind!r}")
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1 or None, got {last}")
    cls = PairwiseAttention if kind == "pairwise" else PatchwiseAttention
    options: dict[str, Any] = {"chunk": chunk} | ({} if relation is None else {"relation": relation})
    cls(LEAST_CHANNELS, LEAST_CHANNELS, kernel_size=3, **options)  # refuses bad options before anything is changed
    result, made = Rewriting(network), []
    for name, shape in _called(network, example).items():
        if matches is not None and not matches(name):
            continue
        old = network.get_submodule(name)
        reason = _refusal(old, shape)
        if reason is None:
            try:
                made.append((name, cls.from_module(old, channels=shape[1], **options)))
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            result.left_alone.append((name, reason))
    for name, new in made if last is None else made[-last:]:
        result.put(name, new)
    return result


def _refusal(module: nn.Module, shape: torch.Size) -> str | None:
    assert isinstance(module, nn.Conv2d)
    if type(module).forward is not nn.Conv2d.forward:
        return f"{type(module).__name__} computes more than Conv2d"
    if len(shape) != 4 or shape[1] < LEAST_CHANNELS:
        return f"expected (N, C, H, W) with at least {LEAST_CHANNELS} channels, got shape {tuple(shape)}"
    border = module.dilation[0] * (module.kernel_size[0] // 2)
    if min(shape[2:]) <= border:
        return f"a reflected border of {border} does not fit its map, {shape[2]} x {shape[3]}"
    return None


def _called(network: nn.Module, example: Any) -> dict[str, torch.Size]:
    """The convolutions with a window that one pass calls, and the smallest input of each."""
    shapes: dict[str, torch.Size] = {}

    def called(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shapes[name] = min(shapes.get(name, args[0].shape), args[0].shape, key=lambda s: min(s[2:]))

        return hook

    handles = (
        module.register_forward_pre_hook(called(name))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and name
    )
    trial_pass(network, as_inputs(network, example), handles)
    return shapes
