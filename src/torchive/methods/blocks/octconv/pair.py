"""The pair of maps that travels through a network as if it were one map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree


class Octave:
    """A map in two frequencies: ``high`` (N, C_h, *S, H, W) and ``low`` (N, C_l, *S, ceil(H / 2), ceil(W / 2)).

    PyTorch's functions take it in the place of the (N, C_h + C_l, *S, H, W) map that it stands for. Pointwise
    functions, sums, products, pooling, resizing, concatenation and batch norms work on both parts apart; the mean over
    all positions gives one vector; any other function sees ``join`` of it.
    """

    def __init__(self, high: Tensor, low: Tensor) -> None:
        self.high, self.low = high, low

    @property
    def shape(self) -> torch.Size:
        """Of the map that it stands for."""
        batch, channels, *rest = self.high.shape
        return torch.Size((batch, channels + self.low.shape[1], *rest))

    def size(self, axis: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if axis is None else self.shape[axis]

    def __len__(self) -> int:
        return len(self.high)

    def __repr__(self) -> str:
        return f"Octave(high={tuple(self.high.shape)}, low={tuple(self.low.shape)})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Methods and attributes of a tensor."""
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"neither Octave nor a tensor has {name!r}")
        method = getattr(Tensor, name)
        if not callable(method):
            return getattr(self.high, name)
        return lambda *args, **kwargs: _call(method, (self, *args), kwargs)

    def __add__(self, other: Any) -> Any:
        return _call(torch.add, (self, other), {})

    def __sub__(self, other: Any) -> Any:
        return _call(torch.sub, (self, other), {})

    def __mul__(self, other: Any) -> Any:
        return _call(torch.mul, (self, other), {})

    def __truediv__(self, other: Any) -> Any:
        return _call(torch.div, (self, other), {})

    def __neg__(self) -> Any:
        return _call(torch.neg, (self,), {})

    def __getitem__(self, index: Any) -> Any:
        return join(self)[index]

    __radd__ = __iadd__ = __add__
    __rmul__ = __imul__ = __mul__
    __isub__, __itruediv__ = __sub__, __truediv__


def pool(x: Tensor, factor: int) -> Tensor:
    """Means over windows of ``factor`` x ``factor``; those at the border average what they hold."""
    if x.ndim == 5:
        window = (1, factor, factor)
        return F.avg_pool3d(x, window, window, ceil_mode=True, count_include_pad=False)
    return F.avg_pool2d(x, factor, factor, ceil_mode=True, count_include_pad=False)


def enlarge(low: Tensor, height: int, width: int) -> Tensor:
    """Every cell doubled, and cropped to ``height`` x ``width`` (each twice the low one's, or one less)."""
    return F.interpolate(low, size=(*low.shape[2:-2], height, width))


def split(x: Tensor, low: int) -> Octave:
    """A plain map as a pair: its last ``low`` channels are pooled."""
    at = x.shape[1] - low
    return Octave(x[:, :at], pool(x[:, at:], 2))


def join(x: Octave | Tensor) -> Tensor:
    """The map that a pair stands for: the low part is enlarged and stands behind the high one."""
    if isinstance(x, Tensor):
        return x
    return torch.cat([x.high, enlarge(x.low, x.high.shape[-2], x.high.shape[-1])], 1)


def join_all(values: Any) -> Any:
    """Every pair in nested lists, tuples and dicts joined."""
    return pytree.tree_map_only(Octave, join, values, is_leaf=lambda value: isinstance(value, Octave))


#: Functions of each number by itself, and sums and products of maps.
_EACH = frozenset(
    (
        *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish"),
        *("hardsigmoid", "hardtanh", "sigmoid", "logsigmoid", "tanh", "softplus", "softsign", "threshold"),
        *("clamp", "clip", "abs", "neg", "exp", "log", "sqrt", "rsqrt", "square", "pow", "dropout"),
        *("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
        *("detach", "clone", "contiguous", "to", "float", "double", "half", "bfloat16", "type_as", "cpu"),
        *("cuda", "requires_grad", "nan_to_num", "add", "sub", "mul", "div", "true_divide", "truediv"),
        *("radd", "rsub", "rmul", "maximum", "minimum"),
    )
)
#: In the place of what writes into a plain map that is about to be split.
_FRESH: dict[str, Callable[..., Any]] = {
    "__iadd__": torch.add,
    "__isub__": torch.sub,
    "__imul__": torch.mul,
    "__itruediv__": torch.div,
    "add_": torch.add,
    "sub_": torch.sub,
    "mul_": torch.mul,
    "div_": torch.div,
}
#: Questions that the high part answers.
_ABOUT = frozenset(
    (
        *("dim", "ndimension", "is_floating_point", "is_complex", "is_contiguous", "element_size"),
        *("get_device", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
    )
)
_MEANS = frozenset(["mean", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "amax"])


def _call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    func = _FRESH.get(func.__name__, func)
    name = func.__name__.strip("_")
    if name in _EACH:
        return _each(func, args, kwargs)
    if name in _ABOUT:
        return func(args[0].high, *args[1:], **kwargs)
    if name in _MEANS and _over_all_positions(name, *args, **kwargs):
        parts = (func(part, *args[1:], **kwargs) for part in (args[0].high, args[0].low))
        return torch.cat(list(parts), 1)
    if name in _SPECIAL:
        found = _SPECIAL[name](func, *args, **kwargs)
        if found is not None:
            return found
    return func(*join_all(list(args)), **join_all(kwargs))


def _each(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Octave:
    like = next(value for value in (*args, *kwargs.values()) if isinstance(value, Octave))
    pairs = [_shared(value, like) for value in args]
    named = {key: _shared(value, like) for key, value in kwargs.items()}
    high = func(*(pair[0] for pair in pairs), **{key: pair[0] for key, pair in named.items()})
    low = func(*(pair[1] for pair in pairs), **{key: pair[1] for key, pair in named.items()})
    return Octave(high, low)


def _shared(value: Any, like: Octave) -> tuple[Any, Any]:
    """What each part of ``like`` gets of an argument: its part, its channels, pooled positions, or the whole."""
    if isinstance(value, Octave):
        return value.high, value.low
    if not isinstance(value, Tensor) or value.ndim < 3:
        return value, value
    x = value[(None,) * (like.high.ndim - value.ndim)]  # broadcasting goes by the last axes
    high = low = x
    if x.shape[1] != 1:
        at = like.high.shape[1]
        high, low = x[:, :at], x[:, at:]
    return high, low if x.shape[-1] == 1 and x.shape[-2] == 1 else pool(low, 2)


def _over_all_positions(name: str, x: Any, *args: Any, **kwargs: Any) -> bool:
    if not isinstance(x, Octave):
        return False
    if name.startswith("adaptive"):
        size = args[0] if args else kwargs.get("output_size")
        return size == 1 or (isinstance(size, list | tuple) and all(s == 1 for s in size))
    given = args[0] if args else kwargs.get("dim")
    axes = [given] if isinstance(given, int) else given if isinstance(given, list | tuple) else []
    return sorted(axis % x.high.ndim for axis in axes) == list(range(2, x.high.ndim))


def _cropped(high: Tensor, low: Tensor) -> Octave:
    """A pair whose low part may be one cell too large."""
    return Octave(high, low[..., : (high.shape[-2] + 1) // 2, : (high.shape[-1] + 1) // 2])


def _max_pool(
    func: Any,
    x: Octave,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Octave | None:
    if return_indices:
        return None
    options = (kernel_size, stride or kernel_size, padding, dilation)
    return _cropped(func(x.high, *options, ceil_mode=ceil_mode), func(x.low, *options, ceil_mode=True))


def _average_pool(
    func: Any,
    x: Octave,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    *more: Any,
    **kw: Any,
) -> Octave:
    high, low = (func(p, kernel_size, stride, padding, c, *more, **kw) for p, c in ((x.high, ceil_mode), (x.low, True)))
    return _cropped(high, low)


def _resize(func: Any, x: Octave, *args: Any, **kwargs: Any) -> Octave:
    high = func(x.high, *args, **kwargs)
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "nearest")
    corners = args[3] if len(args) > 3 else kwargs.get("align_corners")
    half = (*high.shape[2:-2], (high.shape[-2] + 1) // 2, (high.shape[-1] + 1) // 2)
    return Octave(high, F.interpolate(x.low, size=half, mode=mode, align_corners=corners))


def _concatenate(func: Any, tensors: Sequence[Any], dim: int = 0) -> Octave | None:
    """Over the channels; plain maps among them are split as the first pair is."""
    first = next((x for x in tensors if isinstance(x, Octave)), None)
    if first is None or dim % first.high.ndim != 1:
        return None
    share = first.low.shape[1] / first.shape[1]
    pairs = [x if isinstance(x, Octave) else split(x, int(share * x.shape[1])) for x in tensors]
    return Octave(torch.cat([p.high for p in pairs], 1), torch.cat([p.low for p in pairs], 1))


def _batch_norm(
    func: Any,
    x: Octave,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Octave | None:
    """Each part by its channels' statistics, which are kept where one norm keeps them all."""
    if func is not F.batch_norm or not isinstance(x, Octave):  # torch.batch_norm takes another order
        return None
    at, parts = x.high.shape[1], []
    for part, where in ((x.high, slice(None, at)), (x.low, slice(at, None))):
        given: Any = (None if value is None else value[where] for value in (running_mean, running_var, weight, bias))
        parts.append(func(part, *given, *args, **kwargs))
    return Octave(*parts)


def _group_norm(
    func: Any, x: Octave, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Octave | None:
    """Each part by its own groups, where none holds channels of both."""
    each = x.shape[1] // num_groups
    if x.high.shape[1] % each:
        return None
    at, parts = x.high.shape[1], []
    for part, where in ((x.high, slice(None, at)), (x.low, slice(at, None))):
        given = (None if value is None else value[where] for value in (weight, bias))
        parts.append(func(part, part.shape[1] // each, *given, eps))
    return Octave(*parts)


_SPECIAL: dict[str, Callable[..., Octave | None]] = {
    "max_pool2d": _max_pool,
    "max_pool3d": _max_pool,
    "avg_pool2d": _average_pool,
    "avg_pool3d": _average_pool,
    "interpolate": _resize,
    "cat": _concatenate,
    "concat": _concatenate,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
}
