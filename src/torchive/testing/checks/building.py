"""Building: construct, copy, pickle, meta device, seed, state dict, moves."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject, perturb
from torchive.testing.tree import cast, close, same_bits, tensors


def builds(subject: Subject) -> None:
    """The test-sized instance can be made, and is what its contract asks for."""
    module = subject.make()
    wanted = {
        "block": ("forward",),
        "backbone": ("forward", "levels"),
        "loss": ("forward", "reduction"),
        "system": ("forward", "losses", "predict", "task"),
        "two_players": ("losses", "players"),
        "procedure": ("losses", "deployable"),
        "search": ("ask", "tell"),
        "explanation": ("explain",),
        "metric": ("update", "compute", "reset"),
    }[subject.kind]
    missing = [name for name in wanted if not hasattr(module, name)]
    assert not missing, f"{type(module).__name__} lacks {', '.join(missing)}, which a {subject.kind} has"
    if subject.kind not in ("search", "explanation"):
        assert isinstance(module, nn.Module), f"expected a torch.nn.Module, got {type(module).__name__}"


def deep_copy(subject: Subject) -> None:
    """A deep copy works, gives equal outputs and shares no parameter with the original."""
    module = subject.make()
    if isinstance(module, nn.Module):
        module.eval()
    twin = copy.deepcopy(module)
    _same_outputs(subject, module, twin, "the deep copy")
    if isinstance(module, nn.Module):
        mine = {p.data_ptr() for p in module.parameters() if p.numel()}
        assert not mine & {p.data_ptr() for p in twin.parameters() if p.numel()}, "the deep copy shares parameters"


def pickles(subject: Subject) -> None:
    """Pickling and unpickling gives an equal module, as worker processes need it."""
    module = subject.make()
    if isinstance(module, nn.Module):
        module.eval()
    twin = pickle.loads(pickle.dumps(module))
    _same_outputs(subject, module, twin, "the unpickled module")


def _same_outputs(subject: Subject, module: Any, twin: Any, what: str) -> None:
    if subject.kind in ("search", "metric"):
        return
    inputs = subject.inputs()
    with torch.no_grad():
        fault = same_bits(subject.forward(module, inputs), subject.forward(twin, inputs))
    assert not fault, f"{what} gives another output: {fault}"


def meta_device(subject: Subject) -> None:
    """It builds without memory on the meta device; a block's or backbone's shapes there are the real ones."""
    if not subject.fresh:
        raise NotApplicableError("an instance was given; give a factory to have it built on the meta device")
    with torch.device("meta"):
        module = subject.make()
    real = [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.device.type != "meta"]
    assert not real, f"built on the meta device, yet {', '.join(real[:5])} hold memory"
    if subject.kind in ("block", "backbone"):
        inputs = subject.inputs()
        with torch.no_grad():
            there = [tuple(t.shape) for t in tensors(module.eval()(*(x.to("meta") for x in inputs)))]
            here = [tuple(t.shape) for t in tensors(subject.evaluated()(*inputs))]
        assert there == here, f"shapes on the meta device {there}, on the CPU {here}"


def seeded_weights(subject: Subject) -> None:
    """One seed gives the same weights twice."""
    if not subject.fresh:
        raise NotApplicableError("an instance was given; give a factory to have it built twice")
    first, second = subject.make(3).state_dict(), subject.make(3).state_dict()
    fault = same_bits(dict(first), dict(second))
    assert not fault, f"two builds with one seed differ: {fault}"


def state_dict(subject: Subject) -> None:
    """After training passes the state dict, loaded strictly into a new instance, gives the same output bit for bit."""
    module, inputs = subject.make(), subject.inputs()
    perturb(module)
    if any(p.requires_grad for p in module.parameters()) or subject.kind != "loss":
        for seed in range(2):
            subject.objective(module, subject.inputs(seed), seed=seed)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = subject.make(5)
    perturb(other, 5)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with torch.no_grad():
        mine, theirs = subject.forward(module.eval(), inputs), subject.forward(other.eval(), inputs)
    fault = same_bits(mine, theirs)
    assert not fault, f"state was lost in the round trip: {fault}"


def moves(subject: Subject) -> None:
    """``.to`` moves every tensor: none sits in a plain attribute, and it runs in float64 close to float32."""
    module, inputs = subject.evaluated(), subject.inputs()
    with torch.no_grad():
        expected = subject.forward(module, inputs)
    hidden = list(_hidden(module))
    assert not hidden, f"{', '.join(hidden)}: tensors in plain attributes do not move; use register_buffer"
    module.to(torch.float64)
    with torch.no_grad():
        output = subject.forward(module, cast(inputs, torch.float64))
    kinds = {str(t.dtype) for t in tensors(output) if t.is_floating_point()}
    assert kinds <= {"torch.float64"}, f"float64 in, {', '.join(sorted(kinds))} out"
    if not subject.is_detection:  # a box more or less at a threshold is no fault
        fault = close(output, expected)
        assert not fault, f"float64 and float32 differ: {fault}"
    module.to("meta")
    left = [n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.device.type != "meta"]
    assert not left, f"{', '.join(left)} did not move to another device"


def _hidden(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers", "_modules") or isinstance(value, nn.Module):
                continue
            if _holds_tensor(value):
                yield f"{name}.{key}" if name else key


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, list | tuple) and any(map(_holds_tensor, value))
