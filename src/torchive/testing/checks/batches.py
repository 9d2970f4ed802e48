"""Batches and sizes: rows do not see each other, and every legal shape goes through."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from torchive.testing.checks.calling import require_tensor_inputs
from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject, seeded
from torchive.testing.tree import clone, close, finite, leaves, map_tree, tensors


def _rows(subject: Subject, module: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """One nest of tensors per row of the batch: of ``predict`` for detection, of ``forward`` otherwise.

    Raises:
        NotApplicableError: the output of several samples has no row for each. AssertionError: that of one has not.
    """
    with torch.no_grad():
        if subject.is_detection:
            return list(module.predict(*inputs))
        output = subject.forward(module, inputs)
    n = len(inputs[0])
    for path, tensor in leaves(output):
        if tensor.ndim == 0 or len(tensor) != n:
            fault = f"{path} of shape {tuple(tensor.shape)} has no row for each of {n} samples"
            assert n > 1, fault
            raise NotApplicableError(fault)
    return [map_tree(lambda t, i=i: t[i], output) for i in range(n)]  # type: ignore[misc]


def _take(inputs: tuple[Any, ...], index: list[int]) -> tuple[Any, ...]:
    return tuple(x[index] if isinstance(x, torch.Tensor) else [x[i] for i in index] for x in inputs)


def _same_size(subject: Subject) -> tuple[Any, ...]:
    return subject.inputs(shape=(max(3, subject.shape[0]), *subject.shape[1:]))


def batch_independence(subject: Subject) -> None:
    """In evaluation a row of a batch equals the row alone."""
    module, inputs = subject.evaluated(perturbed=True), _same_size(subject)
    together = _rows(subject, module, inputs)
    for i in range(len(inputs[0])):
        fault = close(_rows(subject, module, _take(inputs, [i]))[0], together[i])
        assert not fault, f"row {i} of the batch differs from the row alone: {fault}"


def row_order(subject: Subject) -> None:
    """In evaluation permuting the rows permutes the results."""
    module, inputs = subject.evaluated(perturbed=True), _same_size(subject)
    together, order = _rows(subject, module, inputs), [2, 0, 1, *range(3, len(inputs[0]))]
    fault = close(_rows(subject, module, _take(inputs, order)), [together[i] for i in order])
    assert not fault, f"permuted rows give other results: {fault}"


def nan_stays(subject: Subject) -> None:
    """In evaluation a row of NaN leaves the other rows finite and as they were."""
    module, inputs = subject.evaluated(perturbed=True), _same_size(subject)
    clean = _rows(subject, module, inputs)
    spoiled = clone(inputs)
    for x in spoiled:
        if not isinstance(x, torch.Tensor) or x.is_floating_point():
            x[0][...] = float("nan")
    rows = _rows(subject, module, spoiled)
    fault = finite(rows[1:]) or close(rows[1:], clean[1:])
    assert not fault, f"a row of NaN reached another row: {fault}"


def _runs(subject: Subject, module: Any, shape: tuple[int, ...]) -> Any:
    inputs = subject.inputs(shape=shape)
    try:
        with torch.no_grad():
            output = subject.forward(module, inputs)
    except Exception as error:
        raise AssertionError(f"shape {shape} fails: {type(error).__name__}: {error}") from error
    fault = finite(output)
    assert not fault, f"shape {shape}: {fault}"
    if subject.kind in ("block", "backbone"):
        for path, tensor in leaves(output):
            assert len(tensor) == shape[0], f"shape {shape}: {path} has {len(tensor)} rows"
    if subject.kind == "block" and subject.tiny.get("same_shape", False):
        assert tuple(output.shape) == shape, f"shape {shape} in, {tuple(output.shape)} out"
    return output


def sizes(subject: Subject) -> None:
    """Odd and non-square sizes go through; a size that is not a multiple of the divisor is refused by name."""
    module = subject.evaluated()
    for shape in subject.resized():
        _runs(subject, module, shape)
    divisor, axes = int(subject.tiny.get("divisor", 1)), subject.size_axes
    if divisor > 1:
        odd = list(subject.shape)
        odd[axes[-1]] += 1
        _refuses(subject, module, tuple(odd), rf"\b{divisor}\b", f"the divisor {divisor}")


def batch_of_one(subject: Subject) -> None:
    """A single sample goes through in evaluation."""
    _runs(subject, subject.evaluated(), (1, *subject.shape[1:]))


def empty_batch(subject: Subject) -> None:
    """No sample at all goes through in evaluation and gives no rows."""
    require_tensor_inputs(subject)
    output = _runs(subject, subject.evaluated(), (0, *subject.shape[1:]))
    for path, tensor in leaves(output):
        assert tensor.numel() == 0, f"an empty batch gave {path} of shape {tuple(tensor.shape)}"


def smallest(subject: Subject) -> None:
    """The smallest legal shape that is declared goes through, forward and backward."""
    declared = subject.tiny.get("smallest")
    if not declared:
        raise NotApplicableError("no `smallest` shape is declared")
    shape = tuple(declared[0] if isinstance(declared[0], list) else declared)
    _runs(subject, subject.evaluated(), shape)
    if subject.kind in ("block", "backbone"):
        module, inputs = subject.evaluated(), subject.inputs(shape=shape)
        inputs[0].requires_grad_()
        if any(t.requires_grad for t in tensors(module(*inputs))):
            subject.objective(module, inputs).backward()
            fault = finite(inputs[0].grad)
            assert not fault, f"shape {shape}: the gradient of the input: {fault}"


def too_small(subject: Subject) -> None:
    """A declared shape that is too small is refused by a ValueError that says a number."""
    declared = subject.tiny.get("too_small")
    if not declared:
        raise NotApplicableError("no `too_small` shape is declared")
    _refuses(subject, subject.evaluated(), tuple(declared), r"\d", "a number")


def _refuses(subject: Subject, module: nn.Module, shape: tuple[int, ...], pattern: str, what: str) -> None:
    try:
        with torch.no_grad(), seeded():
            subject.forward(module, subject.inputs(shape=shape))
    except ValueError as error:
        if not re.search(pattern, str(error)):
            raise AssertionError(f"shape {shape}: the ValueError does not say {what}: {error}") from error
        return
    except Exception as error:
        raise AssertionError(f"shape {shape}: expected a ValueError, got {type(error).__name__}: {error}") from error
    raise AssertionError(f"shape {shape} was accepted; expected a ValueError that says {what}")


def bad_rank(subject: Subject) -> None:
    """A tensor of one axis is refused by an error that says a number."""
    module, inputs = subject.evaluated(), subject.inputs()
    flat = [image.flatten() for image in inputs[0]] if subject.is_detection else inputs[0].flatten()
    _rejects(subject, module, (flat, *inputs[1:]), r"\d", "an input of one axis")


def bad_channels(subject: Subject) -> None:
    """Another number of channels is refused by an error that says a number."""
    if subject.tiny.get("any_channels", False):
        raise NotApplicableError("the card says that it takes any number of channels")
    shape = list(subject.shape)
    shape[subject.channel_axis] += 1
    module, inputs = subject.evaluated(), subject.inputs(shape=shape)
    _rejects(subject, module, inputs, r"\d", f"{shape[subject.channel_axis]} channels")


def bad_dtype(subject: Subject) -> None:
    """Integers instead of floats are refused by an error that names a type."""
    module = subject.evaluated()
    inputs = map_tree(lambda t: (t * 100).long() if t.is_floating_point() else t, subject.inputs())
    _rejects(subject, module, inputs, r"(?i)float|long|int|double|dtype|byte", "an integer input")


def _rejects(subject: Subject, module: Any, inputs: tuple[Any, ...], pattern: str, what: str) -> None:
    try:
        with torch.no_grad():
            subject.forward(module, inputs)
    except (ValueError, TypeError, RuntimeError) as error:
        if not re.search(pattern, str(error)):
            raise AssertionError(f"{what}: the error is unclear: {type(error).__name__}: {error}") from error
        return
    except Exception as error:
        raise AssertionError(f"{what}: expected ValueError, TypeError or RuntimeError, got {error!r}") from error
    raise AssertionError(f"{what} was accepted; expected a ValueError or TypeError")
