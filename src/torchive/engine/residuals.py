"""Where a network adds a residual branch to its input: one traced pass, for parts that stand at the end of a branch.

An addition is residual where one term comes from the other, or where both come from the one input of the module that
adds and one of them by no more than a projection. Its branch is the longer way. The end of a branch is the outermost
module that made the term.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from torchive.engine.callsites import observe

#: Functions that add two tensors, and those that a term may pass on its way to the sum.
_ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_PASSES = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__", "div", "div_", "permute", "transpose", "view"})
_SHAPES = frozenset({"reshape", "flatten", "unflatten", "contiguous", "movedim", "dropout", "to", "clone"})


@dataclass(eq=False)
class _Node:
    """One value: what it was made of, how many layers with weights lie before it, and which modules gave it."""

    tensor: Tensor  # kept, so that its id stays its own
    parents: list[_Node]
    function: str = ""
    depth: int = 0
    stack: tuple[str, ...] = ()  # modules whose forwards were running, outermost first
    givers: list[str] = field(default_factory=list)  # modules that returned it, the first to finish first


@dataclass
class Residuals:
    """``ends``: modules whose output is a residual branch's; ``others``: additions whose branch no module ends."""

    ends: list[str] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)


def trace_residuals(model: nn.Module, example: Any = None) -> Residuals:
    """Run the network once, in eval mode and without gradients, and find its residual branches.

    Raises:
        ValueError: no example runs; the message holds the first error.
    """
    return observe(model, lambda _: _Recorder(model), example).residuals()


class _Recorder(TorchFunctionMode):
    """The values of a pass as a graph, and its additions with the module that makes them and its first input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(m): n for n, m in model.named_modules()}
        self.modules = dict(model.named_modules())
        self.nodes: dict[int, _Node] = {}
        self.running: list[tuple[str, _Node | None]] = []  # module and its input where that is one tensor
        self.additions: list[tuple[str, _Node | None, _Node, _Node]] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        self.running.append((self.names[id(module)], self.node(tensors[0]) if len(tensors) == 1 else None))

    def leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.running.pop()
        if isinstance(output, Tensor):
            self.node(output).givers.append(self.names[id(module)])

    def node(self, tensor: Tensor) -> _Node:
        if id(tensor) not in self.nodes:
            self.nodes[id(tensor)] = _Node(tensor, [])
        return self.nodes[id(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        name = getattr(func, "__name__", "")
        parents = [self.nodes[id(t)] for t in given if id(t) in self.nodes]
        if name in _ADDS and self.running and len(args) > 1:
            pair = [self.nodes.get(id(value)) for value in args[:2]]
            first, second = pair
            if first is not None and second is not None and first.tensor.shape == second.tensor.shape:
                self.additions.append((*self.running[-1], first, second))
        result = func(*args, **(kwargs or {}))
        if name == "__get__" or not parents:
            return result
        layer = name not in _PASSES and any(isinstance(t, nn.Parameter) and t.ndim > 1 for t in given)
        depth = max(p.depth for p in parents) + layer
        for value in tree_leaves(result):
            known = self.nodes.get(id(value))
            if isinstance(value, Tensor) and (known is None or name.endswith("_")):  # the latter is in place
                stack = tuple(n for n, _ in self.running)
                self.nodes[id(value)] = _Node(value, parents, name, depth, stack)
        return result

    def residuals(self) -> Residuals:
        found = Residuals()
        for owner, source, first, second in self.additions:
            branch = _branch(source, first, second)
            if branch is None:
                continue
            if isinstance(self.modules[owner], nn.TransformerEncoderLayer):
                reason = "its fused form in evaluation passes parts by; replace TransformerEncoderLayer itself"
                found.others += [(owner, reason)] if (owner, reason) not in found.others else []
                continue
            end = self.end(owner, branch, {id(first), id(second)} - {id(branch)})
            if end is None:
                found.others.append((owner or "forward", "no module ends its residual branch"))
            elif end not in found.ends:
                found.ends.append(end)
        return found

    def end(self, owner: str, node: _Node, other: set[int]) -> str | None:
        """The outermost module inside the owner that made the value, or what it was scaled or reshaped from.

        Where none made it, the one that handed it on last, such as dropout.
        """
        inside = f"{owner}." if owner else ""
        handed: list[str] = []
        while True:
            givers = [n for n in node.givers if n.startswith(inside) and n]
            made = [n for n in givers if n in node.stack]
            if made:
                return made[-1]
            handed += givers
            ways = [p for p in node.parents if id(p) not in other and p.depth == node.depth]
            if node.function not in _PASSES | _SHAPES or len(ways) != 1:
                return handed[0] if handed else None
            node = ways[0]


def _branch(source: _Node | None, first: _Node, second: _Node) -> _Node | None:
    """The term of an addition that is a residual branch, or None."""
    for one, other in ((first, second), (second, first)):
        if one is not other and _comes_from(other, one) and other.depth > one.depth:
            return other
    if source is None or not (_comes_from(first, source) and _comes_from(second, source)):
        return None
    short, long = sorted((first, second), key=lambda node: node.depth)
    if _free_of(first, source) or _free_of(second, source) or short.depth == long.depth:
        return None
    return long if short.depth - source.depth <= 1 else None


def _comes_from(node: _Node, source: _Node) -> bool:
    return source in _ancestors(node)


def _free_of(node: _Node, source: _Node) -> bool:
    """Whether some way to the value does not begin at the source, as where a second map is joined."""
    return any(not n.parents and n is not source for n in _ancestors(node, until=source))


def _ancestors(node: _Node, until: _Node | None = None) -> set[_Node]:
    seen, waiting = set(), [node]
    while waiting:
        now = waiting.pop()
        if now not in seen:
            seen.add(now)
            waiting += [] if now is until else now.parents
    return seen
