"""Walking through whatever a module takes or returns, and comparing it within one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: dtype -> relative and absolute tolerance; the absolute one is multiplied by the largest expected value.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (3e-2, 3e-2),
}


def leaves(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nest of lists, tuples, dicts and dataclasses, with the path that leads to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from leaves(getattr(value, f.name), f"{path}.{f.name}")


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nest."""
    return [tensor for _, tensor in leaves(value)]


def map_tree(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tree(change, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tree(change, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tree(change, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tree(change, getattr(value, f.name)) for f in fields(value)})
    return value


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The same nest with floating tensors in another type."""
    return map_tree(lambda t: t.to(dtype) if t.is_floating_point() else t, value)


def structure(value: Any) -> Any:
    """The shape of a nest without its values: container types, keys and tensor types. Lengths of lists stay."""
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype))
    if isinstance(value, dict):
        return ("dict", {key: structure(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return (type(value).__name__, [structure(item) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, {f.name: structure(getattr(value, f.name)) for f in fields(value)})
    return type(value).__name__


def same_bits(a: Any, b: Any) -> str:
    """Empty where two nests are equal bit for bit (NaN equals NaN), else where they first differ."""
    if structure(a) != structure(b):
        return f"the structures differ: {structure(a)} and {structure(b)}"
    for (path, x), (_, y) in zip(leaves(a), leaves(b), strict=True):
        if x.shape != y.shape:
            return f"{path}: shapes {tuple(x.shape)} and {tuple(y.shape)}"
        if not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) or not torch.equal(x.isnan(), y.isnan()):
            return f"{path}: largest difference {_gap(x, y):.3g}"
    return ""


def close(actual: Any, expected: Any, dtype: torch.dtype = torch.float32) -> str:
    """Empty where two nests agree within the table's tolerance of ``dtype``, else where they first differ."""
    ours, theirs = list(leaves(actual)), list(leaves(expected))
    if len(ours) != len(theirs):
        return f"{len(ours)} tensors, expected {len(theirs)}"
    relative, absolute = TOLERANCES[dtype]
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        if x.shape != y.shape:
            return f"{path}: shape {tuple(x.shape)}, expected {tuple(y.shape)}"
        a, b = x.detach().double(), y.detach().double()
        scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
        if not torch.allclose(a, b, rtol=relative, atol=absolute * max(scale, 1e-3), equal_nan=True):
            allowed = f"{dtype} tolerance {relative:g}"
            return f"{path}: largest difference {_gap(x, y):.3g} at a largest value of {scale:.3g}, {allowed}"
    return ""


def _gap(x: Tensor, y: Tensor) -> float:
    difference = (x.detach().double() - y.detach().double()).abs()
    return float(difference.nan_to_num(float("inf")).max()) if difference.numel() else 0.0


def finite(value: Any) -> str:
    """Empty where every floating tensor is finite, else the path of the first that is not."""
    for path, tensor in leaves(value):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return f"{path} has {int((~tensor.isfinite()).sum())} of {tensor.numel()} values that are not finite"
    return ""


def clone(value: Any) -> Any:
    """A copy that shares no memory."""
    return map_tree(lambda t: t.detach().clone(), value)
