"""Where a network calls its layers: one traced pass, and the splitting of a layer that is called in several places.

A block that owns one ``relu`` and calls it three times needs three activations once these have weights. ``split_calls``
reads the block's forward with ``torch.fx``, gives every call a module of its own and keeps the block's class, names and
methods.
"""

from __future__ import annotations

import inspect
import linecache
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import chain, count
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from torchive.engine.conversion import ConversionError
from torchive.nn.passes import as_inputs, trial_pass


@dataclass(frozen=True)
class Call:
    """One call as the example saw it: the tensor's shape, the axis of its channels (1 or -1) and their number.

    ``channels`` is 0 where the value is no tensor with positions.
    """

    shape: tuple[int, ...]
    axis: int
    channels: int

    @property
    def positions(self) -> int:
        """Product of the axes that are neither batch nor channels."""
        total = 1
        for size in self.shape[1:]:
            total *= size
        return total // max(self.channels, 1)


@dataclass
class Trace:
    """Inputs and outputs of every module by ``id``, who reads its output, functions that forwards call, the example."""

    example: Any = None
    calls: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    readers: dict[int, list[nn.Module]] = field(default_factory=lambda: defaultdict(list))
    called: dict[str, list[tuple[str, Call]]] = field(default_factory=lambda: defaultdict(list))

    def functions(self, names: tuple[str, ...]) -> dict[str, list[Call]]:
        """Owner's dotted name -> its calls of the named functions, in order."""
        found = {owner: [c for n, c in calls if n in names] for owner, calls in self.called.items()}
        return {owner: calls for owner, calls in found.items() if calls}


_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


class _Recorder(TorchFunctionMode):
    """Notes calls of activation functions with the module whose forward makes them."""

    names = frozenset({"relu", "relu_", "relu6", "gelu", "silu", "leaky_relu", "hardswish"})

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        super().__init__()
        self.trace = trace
        self.stack: list[tuple[str, nn.Module]] = []
        self.last: tuple[int, int] | None = None  # channel axis and channels of the last layer that tells them
        self.dotted = {id(m): n for n, m in model.named_modules()}
        self.made: dict[
            int, tuple[Tensor, nn.Module]
        ] = {}  # by the output's id; the tensor is kept, so the id stays its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (
            name in self.names
            and self.stack
            and not type(self.stack[-1][1]).__module__.startswith("torch.nn.modules.activ")
        ):
            self.trace.called[self.stack[-1][0]].append((name, self.call(args[0])))
        return func(*args, **(kwargs or {}))

    def call(self, value: Any) -> Call:
        if not isinstance(value, Tensor):
            return Call((), 1, 0)
        shape = tuple(value.shape)
        if value.ndim < 3 or not value.is_floating_point():
            return Call(shape, 1, 0)
        axis, channels = self.last or (1 if value.ndim > 3 else -1, -1)
        if channels > 0 and shape[axis] != channels and shape[-axis if axis == -1 else -1] == channels:
            axis = -axis if axis == -1 else -1
        return Call(shape, axis, shape[axis])

    def enter(self, module: nn.Module, args: Any) -> None:
        self.trace.calls[id(module)].append(self.call(args[0]) if args else Call((), 1, 0))
        if args and id(args[0]) in self.made:
            self.trace.readers[id(self.made[id(args[0])][1])].append(module)
        self.stack.append((self.dotted[id(module)], module))

    def leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.stack.pop()
        if isinstance(output, Tensor) and not any(True for _ in module.children()):
            self.made[id(output)] = (output, module)
        if isinstance(output, Tensor) and output.ndim >= 3:
            if isinstance(module, _FIRST):
                self.last = (1, output.shape[1])
            elif isinstance(module, nn.Linear) or type(module) is nn.LayerNorm:
                self.last = (-1, output.shape[-1])
        self.trace.outputs[id(module)].append(self.call(output))


def trace_calls(model: nn.Module, example: Any = None) -> Trace:
    """Run the network once, in eval mode and without gradients, and note every call; nothing in it changes.

    Raises:
        ConversionError: no example runs; the message holds the first error.
    """
    return observe(model, lambda candidate: _Recorder(Trace(candidate), model), example).trace


class Recorder(Protocol):
    """What watches a pass: a mode around it, told of every module that begins and ends."""

    def __enter__(self) -> object: ...
    def __exit__(self, *error: Any) -> object: ...
    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None: ...
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None: ...


_R = TypeVar("_R", bound=Recorder)


def observe(model: nn.Module, recorder_for: Callable[[Any], _R], example: Any = None) -> _R:
    """Run the network once under a recorder, with the example or the first of ``examples_of`` that it takes.

    Args:
        model: runs in eval mode, without gradients, and is left as it was; so are the generators.
        recorder_for: example -> a recorder of its own.
        example: an input, or a tuple of inputs.

    Returns:
        The recorder of the pass that ran.

    Raises:
        ConversionError: no example runs; the message holds the first error.
    """
    first: Exception | None = None
    for candidate in [example] if example is not None else examples_of(model):
        recorder = recorder_for(candidate)
        handles = (
            handle
            for module in model.modules()
            for handle in (
                module.register_forward_pre_hook(recorder.enter),
                module.register_forward_hook(recorder.leave),
            )
        )
        try:
            with torch.random.fork_rng(devices=[]), recorder:
                trial_pass(model, as_inputs(model, candidate), handles)
            return recorder
        except Exception as error:
            first = first or error
    raise ConversionError(
        f"no example input runs through {type(model).__name__}; pass example=. First error: {first}"
    ) from first


def examples_of(model: nn.Module) -> Iterator[Any]:
    """Inputs to try, most likely first: images at the network's own size, a list of images, a clip, a sequence."""
    parameter = next(model.parameters(), torch.zeros(()))
    like: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    stem = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if stem is None:
        linear = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        width = linear.in_features if linear is not None else 3
        yield torch.zeros(2, 16, width, **like)
        yield torch.zeros(2, width, **like)
        yield torch.zeros(1, 3, 64, 64, **like)
        return
    channels, ndim = stem.in_channels, stem.weight.ndim - 2
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    sizes = [64, 96, 128, 224, *_own_sizes(model), config.get("input_size", (0,))[-1], 299]
    if ndim == 1:
        yield torch.zeros(1, channels, 64, **like)
        yield torch.zeros(1, channels, 16000, **like)
    if ndim == 3:
        for frames, size in ((8, 32), (8, 64), (16, 112), (32, 64), (32, 224)):
            yield torch.zeros(1, channels, frames, size, size, **like)
    for size in dict.fromkeys(s for s in sizes if s):
        yield torch.zeros(1, channels, size, size, **like)
    yield [torch.zeros(channels, 128, 128, **like)]


def _own_sizes(model: nn.Module) -> Iterator[int]:
    """Sides of square images that a network, or its patch embedding, says that it is made for."""
    for module in model.modules():
        for name in ("image_size", "img_size"):
            size = getattr(module, name, None)
            sides = size if isinstance(size, tuple | list) else (size,)
            if isinstance(sides[0], int) and not isinstance(sides[0], bool) and len(set(sides)) == 1:
                yield sides[0]


class _Children(fx.Tracer):
    """Every child is a leaf: only the module's own forward is read."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


_numbers = count()


def split_calls(
    model: nn.Module,
    name: str,
    trace: Trace,
    undo: list[Callable[[], None]],
    *,
    functions: tuple[str, ...] = (),
    function_calls: list[Call] | None = None,
) -> list[tuple[str, Call]] | None:
    """Give every call of a layer a module of its own.

    Args:
        name: the layer; or, with ``functions``, the module whose forward calls these functions.
        undo: what restores the network is appended here.

    Returns:
        Dotted name and call of each place, or None where the forward cannot be read: data-dependent branches, a layer
        with two owners, or code that differs between training and evaluation.
    """
    owner_name, _, leaf = (name, "", "") if functions else name.rpartition(".")
    owner = model.get_submodule(owner_name)
    calls = function_calls if function_calls is not None else trace.calls[id(model.get_submodule(name))]
    graph = _read(owner)
    if graph is None:
        return None
    if functions:
        nodes = [n for n in graph.nodes if _is_function(n, functions)]
    else:
        nodes = [n for n in graph.nodes if n.op == "call_module" and n.target == leaf]
    if not nodes or len(calls) % len(nodes):
        return None
    prefix = f"{owner_name}." if owner_name else ""
    if not functions and len(nodes) == 1:
        return [(name, calls[0])]
    sites, added = [], []
    for i, node in enumerate(nodes):
        if functions:
            site = _free(owner, functions[0])
            owner.add_module(site, nn.ReLU6() if functions[0] == "relu6" else nn.ReLU())
            added.append(site)
            with graph.inserting_before(node):
                replacement = graph.call_module(site, (node.args[0],))
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
        elif i:
            site = _free(owner, leaf)
            owner.add_module(site, owner.get_submodule(leaf))
            added.append(site)
            node.target = site
        else:
            site = leaf
        sites.append((prefix + site, calls[i]))
    if added and not functions:  # one object under several names: each gets its own before anything is swapped
        for site in added:
            owner._modules[site] = type(owner.get_submodule(leaf))()
    base = type(owner)
    specialised = _specialise(base, graph)

    def restore() -> None:
        owner.__class__ = base
        for site in added:
            owner._modules.pop(site, None)

    if specialised is None:
        restore()
        return None
    owner.__class__ = specialised
    undo.append(restore)
    return sites


def _read(owner: nn.Module) -> fx.Graph | None:
    """The owner's forward as a graph, or None where it cannot be read or differs between training and evaluation."""
    training, graphs = owner.training, []
    try:
        for mode in (True, False):
            owner.training = mode
            graph = _Children().trace(owner)
            for node in graph.nodes:
                node.type = None  # annotations would need their names in the new code
            graphs.append(graph)
    except Exception:
        return None
    finally:
        owner.training = training
    codes = [graph.python_code("self").src for graph in graphs]
    return graphs[0] if codes[0] == codes[1] else None


def _is_function(node: fx.Node, names: tuple[str, ...]) -> bool:
    if node.op == "call_function":
        return getattr(node.target, "__name__", "") in names
    return node.op == "call_method" and node.target in names


def _free(owner: nn.Module, stem: str) -> str:
    stem = stem.rstrip("_")
    return next(n for n in chain([stem], (f"{stem}_{i}" for i in count(2))) if not hasattr(owner, n))


def _specialise(base: type[nn.Module], graph: fx.Graph) -> type[nn.Module] | None:
    """A subclass of the owner's class with the graph as its forward; None where names do not rebuild the code."""
    graph.lint()
    code = graph.python_code("self")
    names = []
    for key, value in code.globals.items():
        if re.search(rf"\b{re.escape(key)}\b", code.src):
            reference = _reference(value)
            if reference is None:
                return None
            names.append((key, *reference))
    parameters = [p for p in inspect.signature(base.forward).parameters.values() if p.kind == p.VAR_KEYWORD]
    return None if parameters else _build_class(_plain(base), code.src, tuple(names))


def _plain(base: type[nn.Module]) -> type[nn.Module]:
    return base.__bases__[0] if hasattr(base, "_torchive_source") else base


def _reference(value: Any) -> tuple[str, str] | None:
    if isinstance(value, ModuleType):
        return value.__name__, ""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    try:
        return (module, name) if module and name and _resolve(module, name) is value else None
    except (ImportError, AttributeError):
        return None


def _resolve(module: str, name: str) -> Any:
    value: Any = import_module(module)
    for part in name.split(".") if name else ():
        value = getattr(value, part)
    return value


def _build_class(base: type[nn.Module], source: str, names: tuple[tuple[str, str, str], ...]) -> type[nn.Module]:
    filename = f"<torchive conversion {next(_numbers)} of {base.__name__}>"
    namespace = {key: _resolve(module, name) for key, module, name in names}
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), namespace)
    members = {
        "forward": namespace["forward"],
        "_torchive_source": (base, source, names),
        "__reduce_ex__": _reduce,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _reduce(self: nn.Module, _protocol: int) -> tuple[Any, ...]:
    return _rebuild, type(self)._torchive_source, self.__dict__.copy()  # type: ignore[attr-defined]


def _rebuild(base: type[nn.Module], source: str, names: tuple[tuple[str, str, str], ...]) -> nn.Module:
    cls = _build_class(base, source, names)
    return cls.__new__(cls)
