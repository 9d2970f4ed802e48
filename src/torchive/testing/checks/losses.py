"""Laws of losses: reductions, sign, order, empty truths, extreme predictions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject, total
from torchive.testing.targets import empty_targets
from torchive.testing.tree import close, finite


def _reduced(subject: Subject, reduction: str) -> Any:
    """An instance with another reduction: constructed with it, or a copy with the attribute set."""
    if subject.fresh:
        try:
            return subject.make(reduction=reduction).eval()
        except TypeError:
            pass
    module = copy.deepcopy(subject.make()).eval()
    module.reduction = reduction
    return module


def reductions(subject: Subject) -> None:
    """``none``, ``mean`` and ``sum`` agree."""
    inputs = subject.inputs()
    with torch.no_grad():
        none, mean, add = (_reduced(subject, r)(*inputs) for r in ("none", "mean", "sum"))
    assert none.ndim >= 1, f"reduction none gives a scalar, expected one value per entry of {tuple(inputs[0].shape)}"
    fault = close(none.sum(), add)
    assert not fault, f"the sum of reduction none is {float(none.sum()):.6g}, reduction sum gives {float(add):.6g}"
    if subject.tiny.get("mean_over") == "valid":
        count = float(add / mean)
        whole = abs(count - round(count)) < 1e-3 and 1 <= round(count) <= none.numel()
        assert whole, f"sum / mean is {count:.6g}, expected a whole number of entries up to {none.numel()}"
        return
    fault = close(none.mean(), mean)
    assert not fault, f"the mean of reduction none is {float(none.mean()):.6g}, reduction mean gives {float(mean):.6g}"


def non_negative(subject: Subject) -> None:
    """It is never below zero, unless the card says that it may be."""
    if subject.tiny.get("may_be_negative", False):
        raise NotApplicableError("the card says that it may be negative")
    module = subject.evaluated()
    for seed in range(5):
        with torch.no_grad():
            value = float(module(*subject.inputs(seed)))
        assert value >= 0, f"the loss is {value:.6g} for seed {seed}; `may_be_negative = true` would allow it"


def order_invariant(subject: Subject) -> None:
    """The order of the samples does not matter."""
    module, inputs = subject.evaluated(), subject.inputs()
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        fault = close(module(*(x[order] for x in inputs)), module(*inputs))
    assert not fault, f"permuted samples give another loss: {fault}"


def empty_targets_check(subject: Subject) -> None:
    """Truths with little or nothing in them give a finite loss whose gradient runs."""
    spec = subject.tiny.get("target", {"kind": "none"})
    if subject.kind == "loss":
        inputs = subject.inputs()
        cases: list[tuple[str, tuple[Any, ...]]] = [("no sample at all", tuple(x[:0] for x in inputs))]
        if len(inputs) > 1:
            cases += [(name, (inputs[0], target)) for name, target in empty_targets(spec, inputs[1], subject.shape)]
        for name, given in cases:
            module, prediction = subject.make(), given[0].clone().requires_grad_()
            _survives(name, lambda m=module, p=prediction, g=given: m(p, *g[1:]), prediction)
        return
    inputs = subject.inputs()
    shapes = [tuple(image.shape) for image in inputs[0]]
    found = list(empty_targets(spec, subject.targets(inputs), shapes))
    if not found:
        raise NotApplicableError(f"targets of kind {spec.get('kind')!r} cannot be empty")
    for name, targets in found:
        module = subject.make().train()
        _survives(name, lambda m=module, t=targets: total(subject.losses(m, inputs, t)), None)
        bad = [n for n, p in module.named_parameters() if finite(p.grad)]
        assert not bad, f"{name}: the gradient of {bad[0]} is not finite"


def _survives(name: str, call: Any, prediction: Tensor | None) -> None:
    try:
        value = call()
    except Exception as error:
        raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert bool(value.isfinite()), f"{name}: the loss is {float(value)}"
    assert value.requires_grad, f"{name}: the loss {float(value):.4g} is cut off from its input"
    value.backward()
    if prediction is not None:
        fault = finite(prediction.grad)
        assert not fault, f"{name}: the gradient {fault}"


def extreme_predictions(subject: Subject) -> None:
    """Predictions ten thousand times larger, and all zero, give a finite loss with a finite gradient."""
    inputs = subject.inputs()
    for name, factor in (("predictions x 1e4", 1e4), ("predictions x -1e4", -1e4), ("all predictions zero", 0.0)):
        module, prediction = subject.make(), (inputs[0] * factor).requires_grad_()
        _survives(name, lambda m=module, p=prediction: m(p, *inputs[1:]), prediction)
