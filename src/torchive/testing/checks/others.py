"""Explanations, metrics and searches."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from torchive.testing.subject import Subject
from torchive.testing.tree import clone, close, finite, leaves, same_bits


def explains(subject: Subject) -> None:
    """Maps of one channel at the size of the input, finite, for a class, a class per sample and the default."""
    explainer, model, (x, *_) = subject.make(), subject.model(), subject.inputs()
    n = len(x)
    for target in (None, 1, torch.arange(n) % 2):
        with torch.no_grad():  # callers often are
            maps = explainer.explain(model, x, target)
        found = [(path, t) for path, t in leaves(maps, "maps") if t.shape == (n, 1, *x.shape[2:])]
        assert found, (
            f"no map of shape {(n, 1, *x.shape[2:])} for target {target!r}: {[tuple(t.shape) for _, t in leaves(maps)]}"
        )
        fault = finite(maps)
        assert not fault, f"target {target!r}: {fault}"
        assert not any(t.requires_grad for _, t in found), "the maps hold on to the graph"


def model_untouched(subject: Subject) -> None:
    """Explaining leaves the model's weights, gradients, modes, hooks and ``requires_grad`` as they were."""
    explainer, model, inputs = subject.make(), subject.model(), subject.inputs()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    next(model.parameters()).requires_grad_(False)
    for training in (False, True):
        model.train(training)
        before, kept = _state(model), clone(dict(model.state_dict()))
        explainer.explain(model, inputs[0], 0)
        assert not same_bits(kept, dict(model.state_dict())), "explaining changed the weights or buffers"
        after = _state(model)
        changed = [name for name, value in before.items() if after.get(name) != value]
        assert before.keys() == after.keys(), "explaining added or removed parts"
        assert not changed, f"explaining changed {', '.join(changed[:5])}"
        grads = [p.grad is not None and bool((p.grad == 0.5).all()) for p in model.parameters()]
        assert all(grads), "explaining wrote into the gradients of the parameters"


def _state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, part in model.named_modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        found[f"the mode of {name or 'the model'}"] = part.training
        found[f"the hooks of {name or 'the model'}"] = sum(map(len, hooks))
        found[f"the class of {name or 'the model'}"] = type(part)
        found[f"the flags of {name or 'the model'}"] = {
            k: v for k, v in vars(part).items() if isinstance(v, bool | int)
        }
    found.update({f"requires_grad of {name}": p.requires_grad for name, p in model.named_parameters()})
    return found


def merges(subject: Subject) -> None:
    """Two halves updated one after the other, or merged, give the value of the whole."""
    whole, inputs = subject.make(), subject.inputs()
    half = max(1, len(inputs[0]) // 2)
    whole.update(*inputs)
    parts = [subject.make(), subject.make()]
    for metric, part in zip(parts, (slice(0, half), slice(half, None)), strict=True):
        metric.update(*(x[part] for x in inputs))
    parts[0].merge_state(parts[1])
    fault = close(parts[0].compute(), whole.compute())
    assert not fault, f"two merged halves differ from the whole: {fault}"


def resets(subject: Subject) -> None:
    """``reset`` forgets everything that was seen."""
    metric, fresh = subject.make(), subject.make()
    metric.update(*subject.inputs(1))
    metric.compute()
    metric.reset()
    for one in (metric, fresh):
        one.update(*subject.inputs(0))
    fault = close(metric.compute(), fresh.compute())
    assert not fault, f"after reset the value differs from a fresh metric's: {fault}"


def seeded_search(subject: Subject) -> None:
    """Two searches with one seed ask for the same architectures."""
    assert _trace(subject.make(), 6) == _trace(subject.make(), 6), (
        "two searches with one seed ask for different architectures"
    )


def resumes(subject: Subject) -> None:
    """A copy taken in the middle goes on as the original does."""
    search = subject.make()
    _trace(search, 4)
    twin = copy.deepcopy(search)
    assert _trace(search, 4) == _trace(twin, 4), "a copy taken in the middle goes on differently"


def _trace(search: Any, steps: int) -> list[str]:
    asked = []
    for step in range(steps):
        architecture = search.ask()
        asked.append(repr(architecture))
        search.tell(architecture, float((step * 7) % 5))
    return asked
