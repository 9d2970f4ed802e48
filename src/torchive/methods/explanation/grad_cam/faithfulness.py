"""Does a map tell what the network uses? Removal of what it marks, and the map of a network without knowledge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.passes import eval_mode


@torch.no_grad()
def faithfulness(
    model: nn.Module,
    inputs: Tensor,
    maps: Tensor,
    target: int | Tensor | None = None,
    *,
    mode: Literal["deletion", "insertion"] = "deletion",
    steps: int = 20,
    blank: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Area under the class probability while pixels go, or come, most important first (arXiv:1806.07421).

    A good map gives a small area for deletion and a large one for insertion. A random order is the yardstick.

    Args:
        model: (N, C, H, W) to logits (N, K).
        inputs: (N, C, H, W).
        maps: (N, 1, H, W), larger is more important.
        target: a class, one for each sample, or None for the highest logit.
        mode: "deletion" replaces pixels by the blank image, "insertion" starts from it.
        steps: equal shares in which pixels are replaced.
        blank: makes the blank image; by default zero for deletion and a blurred image for insertion.

    Returns:
        (N,) areas in [0, 1], by the trapezoid rule over ``steps + 1`` points.

    Raises:
        ValueError: an unknown mode, no steps, or maps that do not fit.
    """
    if mode not in ("deletion", "insertion"):
        raise ValueError(f"mode must be deletion or insertion, got {mode!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if maps.shape != (len(inputs), 1, *inputs.shape[2:]):
        raise ValueError(f"expected maps {(len(inputs), 1, *inputs.shape[2:])}, got {tuple(maps.shape)}")
    make = blank or (torch.zeros_like if mode == "deletion" else _blurred)
    empty = make(inputs)
    before, after = (inputs, empty) if mode == "deletion" else (empty, inputs)
    rank = (
        maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).view_as(maps)
    )  # 0 is most important
    total = rank[0].numel() if len(rank) else 1
    with eval_mode(model):
        chosen = _classes(model(inputs), target)
        curve = [
            model(torch.where(rank < round(total * step / steps), after, before))
            .softmax(1)
            .gather(1, chosen[:, None])[:, 0]
            for step in range(steps + 1)
        ]
    return torch.trapezoid(torch.stack(curve, 1), dx=1 / steps)


def _classes(logits: Tensor, target: int | Tensor | None) -> Tensor:
    if target is None:
        return logits.argmax(1)
    return torch.as_tensor(target, device=logits.device).long().expand(len(logits))


def _blurred(inputs: Tensor) -> Tensor:
    """A box mean over about a quarter of the side: local colour stays, shape goes."""
    side = max(min(inputs.shape[2:]) // 8, 1) * 2 + 1
    return F.avg_pool2d(inputs, side, 1, side // 2, count_include_pad=False)


def randomisation_check(
    explainer: Any, model: nn.Module, inputs: Tensor, target: int | Tensor | None = None, *, seed: int = 1810
) -> Tensor:
    """Rank correlation of each map with that of a copy whose weights are drawn anew (Adebayo et al., arXiv:1810.03292).

    A method that explains the network must give another map: values near one mean that it shows the image alone. A map
    that is constant in either network correlates by zero.

    Args:
        explainer: anything with ``explain(model, inputs, target)`` that returns a ``CamMaps``.
        model: the network; it is copied, not changed.
        inputs: (N, C, H, W).
        target: a class, or one for each sample; None takes the model's own highest logit for both networks.
        seed: of the new weights.

    Returns:
        (N,) Spearman correlations.

    Raises:
        ValueError: no part of the model can be drawn anew.
    """
    with torch.no_grad(), eval_mode(model):
        chosen = _classes(model(inputs), target)
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = 0
        for part in other.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset) and next(part.parameters(recurse=False), None) is not None:
                reset()
                drawn += 1
    if not drawn:
        raise ValueError(f"{type(model).__name__} has no part with reset_parameters; its weights cannot be drawn anew")
    mine, theirs = (explainer.explain(m, inputs, chosen).raw.flatten(1) for m in (model, other))
    return _spearman(mine, theirs)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    a, b = (_ranks(x) for x in (a, b))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norm = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / norm.where(norm > 0, 1)


def _ranks(x: Tensor) -> Tensor:
    """Ranks with ties averaged, (N, L): the number of smaller values plus half the number of equal ones."""
    ordered = x.sort(1).values.contiguous()
    low = torch.searchsorted(ordered, x.contiguous())
    high = torch.searchsorted(ordered, x.contiguous(), right=True)
    return (low + high).double() / 2
