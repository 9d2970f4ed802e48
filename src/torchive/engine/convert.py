"""Put a block into any network: ``convert(model, "gcnet", where="layer3.*")``.

Replacing swaps the layers that a card names for ``new.from_module(old, channels=C)``; inserting puts
``new.from_channels(C)`` after the matched modules; a part that changes the maps between layers rewrites the network by
the function that its card names. One traced pass over an example finds the channels and the calls, so
that an activation which one block uses three times becomes three, and ``relu`` called as a function is found too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn

from torchive.catalogue import class_path_of, get_card
from torchive.engine.callsites import Call, Trace, split_calls, trace_calls
from torchive.engine.conversion import Change, ConversionError, ConversionReport, Followed
from torchive.engine.places import a_few, insertion_places, matches, places_of
from torchive.engine.rewriting import rewrite


@dataclass(frozen=True)
class Rule:
    """Layers of type ``old``, or calls of the functions in ``functions``, become ``new``.

    With ``feeds``, only layers whose output goes straight into a layer of that type.
    """

    old: type[nn.Module]
    new: type[nn.Module]
    functions: tuple[str, ...] = ()
    feeds: type[nn.Module] | None = None


def convert(
    model: nn.Module,
    method: str | type[nn.Module],
    where: str | Sequence[str] | None = None,
    *,
    example: Any = None,
    replaces: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
    **options: Any,
) -> ConversionReport:
    """Put a method's block into a network, in place.

    Args:
        model: any network: of timm, torchvision, Torchive or written by hand.
        method: the name of a built block, or a class of your own with ``from_module`` or ``from_channels``.
        where: a shell pattern over dotted module names (``*`` also crosses dots), ``re:REGEX``, or a list of them. None
            takes all layers of the replaced types, or the card's own places for an inserted block.
        example: an input of the network for the traced pass; found by itself for common networks.
        replaces: the layer types that it replaces, such as ``torch.nn.SiLU``, instead of the card's; a class of yours
            is inserted without them.
        options: keyword arguments of the block.

    Returns:
        What was changed and what was left alone, with ``undo()``.

    Raises:
        ConversionError: nothing matched, no example runs, or a block refuses its place. The network is unchanged.
        KeyError, ValueError: the method is unknown, or not built.
    """
    name, rules, part, places = _plan(method, replaces)
    patterns = [where] if isinstance(where, str) else list(where) if where is not None else None
    before = _parameters(model)
    trace = trace_calls(model, example)
    report = ConversionReport(name, [], [], (before, before))
    try:
        if isinstance(part, str):
            rewrite(model, _load(part), lambda place: matches(place, patterns), trace, options, report)
        elif part is not None:
            names = insertion_places(model, method, patterns, places, example, report)
            _insert(model, part, names, trace, options, report)
        else:
            _replace(model, rules, patterns, trace, options, report)
    except Exception:
        report.undo()
        raise
    if not report.changes:
        raise ConversionError(_nothing(model, name, rules, patterns, report))
    report.parameters = (before, _parameters(model))
    return report


def _plan(
    method: str | type[nn.Module], replaces: Any
) -> tuple[str, list[Rule], type[nn.Module] | str | None, list[list[str]]]:
    """Name, replacement rules, class to insert or path of the function that rewrites, default places."""
    cls: type[nn.Module] = method if isinstance(method, type) else _load(class_path_of(method))
    name = method if isinstance(method, str) else method.__name__
    if replaces is not None:
        types = [replaces] if isinstance(replaces, type) else list(replaces)
        if not hasattr(cls, "from_module"):
            raise ConversionError(f"{name} is inserted, it replaces nothing: {cls.__name__} has no from_module")
        return name, [Rule(t, cls, _FUNCTIONS.get(t, ())) for t in types], None, []
    if not isinstance(method, str):
        return name, [], cls, []
    host = get_card(method).host
    if host.get("mode") == "insert":
        part = _load(host["new"]) if "new" in host else cls
        return method, [], part, places_of(host.get("where", []))
    if host.get("mode") == "rewrite":
        return method, [], str(host["function"]), []
    if host.get("mode") != "replace":
        raise ConversionError(f"{method} is not a part of a network: its card names no host")
    rules = []
    for entry in host["replace"]:
        old = _load(_colon(entry["old"]))
        new = _load(entry["new"]) if "new" in entry else cls
        feeds = _load(_colon(entry["feeds"])) if "feeds" in entry else None
        rules.append(Rule(old, new, _FUNCTIONS.get(old, ()), feeds))
    return method, rules, None, []


_FUNCTIONS: dict[type[nn.Module], tuple[str, ...]] = {nn.ReLU: ("relu", "relu_"), nn.ReLU6: ("relu6",)}


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _colon(path: str) -> str:
    return path if ":" in path else ":".join(path.rsplit(".", 1))


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _replace(
    model: nn.Module,
    rules: list[Rule],
    patterns: list[str] | None,
    trace: Trace,
    options: dict[str, Any],
    report: ConversionReport,
) -> None:
    made = tuple(rule.new for rule in rules)
    inside = {id(m) for module in model.modules() if isinstance(module, made) for m in module.modules()}
    targets: list[tuple[str, nn.Module, Rule]] = []
    for name, module in model.named_modules():
        rule = next((r for r in rules if isinstance(module, r.old)), None)
        if rule is None or not name or id(module) in inside or not matches(name, patterns):
            continue
        reason = _refusal(model, name, module, rule, trace)
        if reason:
            report.left_alone.append((name, reason))
        else:
            targets.append((name, module, rule))
    for name, module, rule in targets:
        sites = (
            split_calls(model, name, trace, report._undo) if _varies(trace.calls[id(module)], rule, module) else None
        )
        for site, call in sites or [(name, trace.calls[id(module)][0])]:
            if sites is None and _varies(trace.calls[id(module)], rule, module):
                counts = sorted({c.channels for c in trace.calls[id(module)]})
                if len(counts) > 1:
                    report.left_alone.append(
                        (name, f"called with {counts} channels in a forward that cannot be traced")
                    )
                    break
            _swap(model, site, rule, module, call, options, report)
    _replace_functions(model, rules, patterns, trace, options, report)


def _replace_functions(
    model: nn.Module,
    rules: list[Rule],
    patterns: list[str] | None,
    trace: Trace,
    options: dict[str, Any],
    report: ConversionReport,
) -> None:
    """Calls such as ``torch.relu(x)`` in a module's own forward become modules."""
    for rule in rules:
        for owner, calls in trace.functions(rule.functions).items():
            inside = {id(m) for module in model.modules() if isinstance(module, rule.new) for m in module.modules()}
            if not matches(owner or "forward", patterns) or id(model.get_submodule(owner)) in inside:
                continue
            sites = split_calls(model, owner, trace, report._undo, functions=rule.functions, function_calls=calls)
            if sites is None:
                count = len(calls)
                what = f"{count} x {rule.functions[0]} called as a function in a forward that cannot be traced"
                report.left_alone.append((owner or type(model).__name__, what))
                continue
            for site, call in sites:
                if call.channels < 1:
                    report.left_alone.append((site, f"its input has shape {call.shape}"))
                else:
                    _swap(model, site, rule, model.get_submodule(site), call, options, report)


def _varies(calls: list[Call], rule: Rule, module: nn.Module) -> bool:
    """Whether one module serves several places and the new part would have weights of its own in each."""
    return len(calls) > 1 and not any(True for _ in module.parameters())


def _refusal(model: nn.Module, name: str, module: nn.Module, rule: Rule, trace: Trace) -> str | None:
    calls = trace.calls.get(id(module), [])
    if not calls:
        return "not called by the example"
    if calls[0].channels < 1:
        return f"its input has shape {calls[0].shape}"
    if rule.feeds is not None and not any(isinstance(m, rule.feeds) for m in trace.readers[id(module)]):
        return f"feeds no {rule.feeds.__name__}"
    if type(module).forward is not rule.old.forward:
        accepts = getattr(rule.new, "accepts", None)
        if accepts is None or not accepts(module):
            return f"{type(module).__name__} computes more than {rule.old.__name__}"
    pooled = 1 in (calls[0].positions, *(output.positions for output in trace.outputs[id(module)]))
    plain = not any(True for _ in module.parameters())
    if plain and pooled and _is_gate(model.get_submodule(name.rpartition(".")[0])):
        return "inside a squeeze-and-excitation gate"
    return None


def _is_gate(module: nn.Module) -> bool:
    """Whether it is called like a squeeze-and-excitation gate, or is a plain sequence that ends in a sigmoid."""
    if type(module) is nn.Sequential and len(module):
        return isinstance(module[-1], nn.Sigmoid | nn.Hardsigmoid)
    return re.search(r"(?i:squeeze)|^(?:SE|se)(?![a-z])", type(module).__name__) is not None


def _swap(
    model: nn.Module,
    name: str,
    rule: Rule,
    old: nn.Module,
    call: Call,
    options: dict[str, Any],
    report: ConversionReport,
) -> None:
    extra = dict(options)
    if call.axis == -1 and "channel_dim" not in extra and _takes(rule.new, "channel_dim"):
        extra["channel_dim"] = -1
    try:
        new = rule.new.from_module(old, channels=call.channels, **extra)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{name}: {rule.new.__name__} refuses {type(old).__name__}: {error}") from error
    _like(new, old, model)
    _set(model, name, new, report)
    report.changes.append(Change(name, type(old).__name__, type(new).__name__, call.channels))


def _insert(
    model: nn.Module,
    part: type[nn.Module],
    names: list[str],
    trace: Trace,
    options: dict[str, Any],
    report: ConversionReport,
) -> None:
    for name in names:
        module = model.get_submodule(name)
        outputs = trace.outputs.get(id(module), [])
        if not outputs or outputs[0].channels < 1:
            report.left_alone.append(
                (name, "not called by the example" if not outputs else f"its output is {outputs[0].shape}")
            )
            continue
        if isinstance(module, Followed) and isinstance(module.part, part):
            report.left_alone.append((name, f"already followed by {part.__name__}"))
            continue
        counts = {call.channels for call in outputs}
        if len(counts) > 1:
            raise ConversionError(
                f"{name} is called several times with {sorted(counts)} channels; one block cannot serve them all"
            )
        call = outputs[0]
        extra = dict(options)
        if call.axis == -1:
            if not _takes(part, "channel_dim"):
                report.left_alone.append(
                    (name, f"channels are on the last axis of {call.shape}; {part.__name__} takes axis 1")
                )
                continue
            extra.setdefault("channel_dim", -1)
        if len(call.shape) != 4 and _takes(part, "ndim"):
            extra.setdefault("ndim", len(call.shape) - 2)
        new_start = hasattr(part, "from_host")  # which may change the host's weights
        own = module.named_parameters() if new_start else ()
        kept = {k: v.detach().clone() for k, v in own if not v.is_meta}  # those hold no values
        report._undo.append(lambda m=module, k=kept: _restore(m, k))  # type: ignore[misc]
        try:
            if new_start:
                block = part.from_host(module, channels=call.channels, **extra)  # type: ignore[attr-defined]
            else:
                block = part.from_channels(call.channels, **extra)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise ConversionError(f"{name}: {part.__name__} refuses {call.channels} channels: {error}") from error
        _like(block, module, model)
        changed = [key for key, value in kept.items() if not torch.equal(value, module.get_parameter(key))]
        followed = Followed(module, block, changed=changed)
        followed.train(module.training)
        _set(model, name, followed, report)
        report.changes.append(
            Change(name, type(module).__name__, f"{type(module).__name__} + {part.__name__}", call.channels)
        )


@torch.no_grad()
def _restore(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        module.get_parameter(name).copy_(value)


def _takes(cls: type[nn.Module], option: str) -> bool:
    import inspect

    return option in inspect.signature(cls.__init__).parameters


def _like(new: nn.Module, old: nn.Module, model: nn.Module) -> None:
    """Device, dtype and mode of the place that the new part takes."""
    tensor = next((t for m in (old, model) for t in [*m.parameters(), *m.buffers()] if t.is_floating_point()), None)
    if tensor is not None:
        new.to(tensor.device, tensor.dtype)
    new.train(old.training)


def _set(model: nn.Module, name: str, new: nn.Module, report: ConversionReport) -> None:
    """Put a module under a name, in every place where the old object stands."""
    old = model.get_submodule(name)
    for other, module in list(model.named_modules(remove_duplicate=False)):
        if module is old and other:
            parent = model.get_submodule(other.rpartition(".")[0])
            leaf = other.rpartition(".")[2]
            parent._modules[leaf] = new
            report._undo.append(lambda p=parent, k=leaf: p._modules.__setitem__(k, old))  # type: ignore[misc]


def _nothing(
    model: nn.Module, name: str, rules: list[Rule], patterns: list[str] | None, report: ConversionReport
) -> str:
    if report.left_alone:
        listed = "; ".join(f"{place}: {reason}" for place, reason in report.left_alone[:5])
        return f"{name}: nothing was converted. {listed}"
    names = [n for n, _ in model.named_modules() if n]
    if patterns is None and rules:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        wanted = " or ".join(rule.old.__name__ for rule in rules)
        has = ", ".join(kinds) or "none"
        hint = f"; its layers are {has}; replaces= takes another type"
        return f"{name} replaces {wanted}, and {type(model).__name__} has none{hint}"
    if patterns is None:
        return f"{name}: none of the card's places fits {type(model).__name__}; say where=, for example {a_few(names)}"
    close = get_close_matches(patterns[0].replace("*", ""), names, n=3, cutoff=0.3) or names[:3]
    kinds_wanted = f" with {' or '.join(r.old.__name__ for r in rules)}" if rules else ""
    return f"{name}: no module{kinds_wanted} matches {', '.join(map(repr, patterns))}; names look like {a_few(close)}"
