"""Running a network and keeping what a layer gives, without a trace left in the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchive.nn.passes import trial_pass

Inputs = Tensor | Sequence[Tensor]
Layer = str | nn.Module
Target = int | Tensor | Callable[[Any], Tensor] | Sequence[Any] | None


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Tokens (N, L, C) to maps (N, C, h, w): a ``reshape`` for transformers, pickled like any value.

    Attributes:
        prefix: tokens in front that are no positions, such as the class token.
        grid: (h, w); None takes a square.
    """

    prefix: int = 1
    grid: tuple[int, int] | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        places = tokens.shape[1] - self.prefix
        h, w = self.grid or (round(places**0.5),) * 2
        if tokens.ndim != 3 or h * w != places:
            raise ValueError(
                f"expected tokens (N, {self.prefix} + h w, C) on a grid of {h} x {w}, got {tuple(tokens.shape)}"
            )
        return tokens[:, self.prefix :].transpose(1, 2).unflatten(2, (h, w))


@dataclass
class Pass:
    """What one pass gave: the model's output, each layer's activations, and the padded batch of a detector."""

    output: Any
    activations: list[Tensor]
    canvas: tuple[tuple[int, ...], list[tuple[int, ...]]] | None


def run_with_layers(model: nn.Module, inputs: Inputs, layers: Sequence[nn.Module]) -> Pass:
    """One forward pass, with a graph from the layers' outputs onwards only.

    A hook cuts the graph at the first layer reached: what lies below runs without gradients. The network goes on with a
    copy of the kept tensor, so that an in-place operation behind the layer cannot change it. Of a layer that runs
    several times, the last run counts.

    Raises:
        ValueError: a layer did not run, or its output holds no tensor.
    """
    kept: dict[int, Tensor] = {}
    canvas: list[Any] = []

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            tensor = _first_tensor(output, layers[index])
            torch.set_grad_enabled(True)
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            kept[index] = tensor
            return _with_first(output, tensor.clone())

        return hook

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        item = output[0] if isinstance(output, tuple) and output else output
        if hasattr(item, "image_sizes") and isinstance(getattr(item, "tensors", None), Tensor):
            canvas.append((tuple(item.tensors.shape[2:]), [tuple(size) for size in item.image_sizes]))

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(keep(index)).remove)
        if not isinstance(inputs, Tensor):  # a detector pads its images to a batch: find where they lie
            for part in model.modules():
                stack.callback(part.register_forward_hook(note).remove)
        stack.enter_context(torch.no_grad())
        output = model(inputs)
    missing = [i for i in range(len(layers)) if i not in kept]
    if missing:
        raise ValueError(f"layer {missing[0]} ({type(layers[missing[0]]).__name__}) did not run in the forward pass")
    return Pass(output, [kept[i] for i in range(len(layers))], canvas[-1] if canvas else None)


def _first_tensor(output: Any, layer: nn.Module) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ValueError(
            f"the layer {type(layer).__name__} returns {type(output).__name__}; choose one that returns a tensor"
        )
    return first


def _with_first(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: tensor})
    return type(output)([tensor, *output[1:]])


def last_spatial_layer(model: nn.Module, inputs: Inputs) -> str:
    """Dotted name of the layer with the last activation that has channels and more than one position.

    One pass over the first sample. Of nested modules that return the same tensor, the innermost is named.

    Raises:
        ValueError: there is none, or the network works on tokens, so that no choice is safe.
    """
    wanted = inputs.ndim if isinstance(inputs, Tensor) else 4
    found: list[tuple[str, Tensor, int]] = []
    tokens: list[int] = []

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if name and output.ndim == wanted and output[0, 0].numel() > 1:
                # an in-place ReLU returns the tensor of the layer before it: its version tells them apart
                if not found or found[-1][1] is not output or found[-1][2] != output._version:
                    found.append((name, output, output._version))
            elif output.ndim == 3 and output.shape[1] > 1:
                tokens.append(output.shape[1])

        return hook

    handles = (part.register_forward_hook(note(name)) for name, part in model.named_modules())
    trial_pass(model, (inputs[:1],), handles)
    if not found:
        raise ValueError(f"no module returns a {wanted}-D tensor with more than one position; name a layer")
    if len(tokens) > 3:
        raise ValueError(
            f"the network works on tokens, the last of them (N, {tokens[-1]}, C); name a layer and give "
            "reshape, such as TokenGrid()"
        )
    return found[-1][0]


def find_layers(model: nn.Module, layer: Layer | Sequence[Layer]) -> list[nn.Module]:
    """The modules that names stand for; modules must be parts of the model.

    Raises:
        ValueError: an unknown name, or a module of another model.
    """
    parts = dict(model.named_modules())
    modules = []
    for one in [layer] if isinstance(layer, str | nn.Module) else layer:
        if isinstance(one, str):
            if one not in parts:
                from difflib import get_close_matches

                close = get_close_matches(one, parts, n=1)
                raise ValueError(f"no layer {one!r} in the model" + (f"; did you mean {close[0]!r}?" if close else ""))
            modules.append(parts[one])
        elif any(one is part for part in parts.values()):
            modules.append(one)
        else:
            raise ValueError(f"the layer {type(one).__name__} is no part of the model")
    if not modules:
        raise ValueError("expected at least one layer, got an empty list")
    return modules


def scores_of(output: Any, target: Target) -> Tensor:
    """The scores that are explained, (N,), or () where a callable returns one scalar for the batch.

    Classes pick from logits (N, K, *S); further axes are summed over, so that a segmenter is asked for the class
    anywhere.

    Raises:
        ValueError: a class outside the logits, or an output that a class cannot pick from.
    """
    if callable(target):
        return _as_scores(target(output))
    if isinstance(target, list | tuple) and any(callable(one) for one in target):
        return torch.stack([_as_scores(one(row)).sum() for one, row in zip(target, output, strict=True)])
    if not isinstance(output, Tensor) or output.ndim < 2:
        kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"a class picks from logits (N, K), the model returned {kind}; give a callable as target")
    if target is None:
        if output.ndim > 2:
            raise ValueError(f"the output {tuple(output.shape)} has no one best class; give a class or a callable")
        return output.amax(1)
    chosen = torch.as_tensor(target, device=output.device)
    if chosen.is_floating_point() or chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != len(output)):
        raise ValueError(f"expected a class or one for each of {len(output)} samples, got {target!r}")
    if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= output.shape[1]):
        raise ValueError(f"expected classes 0 to {output.shape[1] - 1}, got {target!r}")
    logits = output.flatten(2).sum(2) if output.ndim > 2 else output
    return logits.gather(1, chosen.long().expand(len(output))[:, None])[:, 0]


def _as_scores(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim > 1:
        kind = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"a target must return one scalar, or one score per sample (N,), got {kind}")
    return value
