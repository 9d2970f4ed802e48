"""Number types and memory layouts: bfloat16, channels-last, strided views."""

from __future__ import annotations

import torch
from torch import Tensor

from torchive.testing.checks.calling import require_tensor_inputs
from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject, seeded, total
from torchive.testing.tree import cast, close, finite, leaves, map_tree


def bfloat16(subject: Subject) -> None:
    """bfloat16 gives finite numbers of its own type, close to float32; systems and procedures run under autocast."""
    if subject.kind in ("system", "two_players", "procedure"):
        _autocast(subject)
        return
    module, inputs = subject.evaluated(), subject.inputs()
    rounded = cast(inputs, torch.bfloat16)
    with torch.no_grad():
        module.load_state_dict(cast(cast(dict(module.state_dict()), torch.bfloat16), torch.float32))
        expected = subject.forward(module, cast(rounded, torch.float32))
        output = subject.forward(module.to(torch.bfloat16), rounded)
    allowed = {torch.bfloat16} | ({torch.float32} if subject.kind == "loss" else set())
    for path, tensor in leaves(output):
        assert not tensor.is_floating_point() or tensor.dtype in allowed, (
            f"{path} is {tensor.dtype}, expected torch.bfloat16"
        )
    fault = finite(output) or close(output, expected, torch.bfloat16)
    assert not fault, f"bfloat16 differs from float32: {fault}"


def _autocast(subject: Subject) -> None:
    inputs = subject.inputs()
    values = []
    for enabled in (False, True):
        module = subject.make().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), seeded():
            if subject.kind == "procedure":
                losses = module.losses(subject.batch())
            else:
                losses = subject.losses(module, inputs, subject.targets(inputs))
        value = total({key: loss.float() for key, loss in losses.items()})
        value.backward()
        for name, parameter in module.named_parameters():
            fault = finite(parameter.grad)
            assert not fault, f"autocast {enabled}: the gradient of {name}: {fault}"
        values.append(float(value.detach()))
    gap = abs(values[1] - values[0]) / max(abs(values[0]), 1e-6)
    assert values[1] == values[1], "the loss under autocast is NaN"
    if not subject.is_detection:  # its sampled proposals may change with the last bit
        assert gap < 0.1, f"the loss is {values[0]:.4g} in float32 and {values[1]:.4g} under autocast"


def channels_last(subject: Subject) -> None:
    """Channels-last input gives the same values, and maps that come out keep the layout."""
    require_tensor_inputs(subject)
    if len(subject.shape) not in (4, 5) or subject.channel_axis != 1:
        raise NotApplicableError("the input is not an image or a volume")
    layout = torch.channels_last if len(subject.shape) == 4 else torch.channels_last_3d
    module, inputs = subject.evaluated(perturbed=True), subject.inputs()
    with torch.no_grad():
        expected = subject.forward(module, inputs)
        module.to(memory_format=layout)
        output = subject.forward(module, (inputs[0].contiguous(memory_format=layout), *inputs[1:]))
    fault = close(output, expected)
    assert not fault, f"channels-last gives other values: {fault}"
    for path, tensor in leaves(output):
        if tensor.ndim == len(subject.shape) and tensor.shape[1] > 1 and tensor[0, 0].numel() > 1:
            kept = tensor.stride(1) == 1  # a crop of a channels-last map is one, too
            assert kept, f"{path} of shape {tuple(tensor.shape)} lost channels-last: strides {tensor.stride()}"


def non_contiguous(subject: Subject) -> None:
    """A strided view gives the values of its contiguous copy."""
    module, inputs = subject.evaluated(perturbed=True), subject.inputs()
    with torch.no_grad():
        fault = close(subject.forward(module, map_tree(_strided, inputs)), subject.forward(module, inputs))
    assert not fault, f"a strided view gives other values: {fault}"


def _strided(x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.ndim < 2:
        return x
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 1e3, dtype=x.dtype)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]  # a crop
