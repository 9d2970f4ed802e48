"""Gradients: they reach the input and every parameter, they are right, and following them learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject, perturb, seeded
from torchive.testing.tree import cast, finite, leaves, tensors

ATTEMPTS = 3
CROWD = 24  # objects per image, so that every level of a detector has some to match
LARGEST_GRADCHECK = 20_000  # elements of the input


def input_gradient(subject: Subject) -> None:
    """The gradient of every floating input exists, is finite and is not zero throughout."""
    for seed in range(ATTEMPTS):
        module = subject.make()
        perturb(module, seed)
        inputs: Any = subject.inputs(seed)
        watched = tensors(inputs[0])
        for t in watched:
            t.requires_grad_()
        value = subject.objective(module, inputs, seed=seed)
        assert value.requires_grad, "the result does not depend on the input by any gradient"
        grads = torch.autograd.grad(value, watched, allow_unused=True)
        for (path, _), grad in zip(leaves(inputs[0], "input"), grads, strict=True):
            assert grad is not None, f"no gradient reaches {path}"
            fault = finite(grad)
            assert not fault, f"the gradient of {path}: {fault}"
        if all(bool(grad.any()) for grad in grads if grad is not None):
            return
    raise AssertionError(f"the gradient of the input is zero for {ATTEMPTS} seeds")


def parameter_gradients(subject: Subject) -> None:
    """Every trainable parameter gets a finite gradient that is not zero for every seed."""
    names = [name for name, p in subject.make().named_parameters() if p.requires_grad]
    if not names:
        raise NotApplicableError("it has no trainable parameter")
    waiting = set(names)
    for seed in range(ATTEMPTS):
        module = subject.make()
        perturb(module, seed)
        module.train()
        subject.objective(module, subject.inputs(seed), seed=seed, per_image=CROWD).backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                fault = finite(parameter.grad)
                assert not fault, f"the gradient of {name}: {fault}"
                if bool(parameter.grad.any()):
                    waiting.discard(name)
        if not waiting:
            return
    dead = [name for name in names if name in waiting]
    raise AssertionError(f"{len(dead)} of {len(names)} parameters get no gradient: {', '.join(dead[:8])}")


def gradcheck(subject: Subject) -> None:
    """In float64 the analytic gradient equals the numeric one, for inputs and parameters, at a seeded point."""
    if subject.is_detection:
        raise NotApplicableError("assignment and suppression are not smooth")
    module = subject.evaluated(perturbed=True).to(torch.float64)
    shape = subject.shape
    inputs: Any = cast(
        subject.inputs(shape=(min(2, shape[0]), *shape[1:]) if subject.kind != "loss" else shape), torch.float64
    )
    if inputs[0].numel() > LARGEST_GRADCHECK:
        raise NotApplicableError(
            f"the test-sized input has {inputs[0].numel()} values; at most {LARGEST_GRADCHECK} are checked"
        )
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    floats = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    if subject.kind == "loss":
        floats = floats[:1]  # the target is a constant

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = list(inputs)
        for i, value in zip(floats, values, strict=False):
            given[i] = value
        state = dict(zip(parameters, values[len(floats) :], strict=True))
        output = torch.func.functional_call(module, state, tuple(given))
        return tuple(t for t in tensors(output) if t.is_floating_point())

    points = [inputs[i].clone().requires_grad_() for i in floats] + [
        p.clone().requires_grad_() for p in parameters.values()
    ]
    with seeded():
        try:
            torch.autograd.gradcheck(function, points, fast_mode=True, eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=1e-9)
        except GradcheckError as error:
            text = " ".join(str(error).split())
            raise AssertionError(f"analytic and numeric gradients differ: {text[:300]}") from None


class _Learner(nn.Module):
    """A trainable pointwise stem, the part under test, and a frozen random readout."""

    def __init__(self, part: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.part, self.axis = part, axis
        self.stem = nn.Linear(channels, channels)

    def forward(self, *inputs: Tensor) -> Tensor:
        first = self.stem(inputs[0].movedim(self.axis, -1)).movedim(-1, self.axis).contiguous()
        parts = [t.flatten(1).mean(1) + t.flatten(1).std(1) for t in tensors(self.part(first, *inputs[1:]))]
        return torch.stack(parts, 1).mean(1)


def learns(subject: Subject) -> None:
    """Thirty steps on four fixed samples cut the loss to a share of what it was."""
    spec = subject.tiny.get("learn", {})
    steps, ratio = int(spec.get("steps", 30)), float(spec.get("ratio", 0.8))
    with seeded():
        module = subject.make().train()
        four = subject.shape if subject.kind == "loss" or subject.is_detection else (4, *subject.shape[1:])
        inputs: Any = subject.inputs(
            shape=None if subject.kind in ("loss", "procedure") or subject.is_detection else four
        )
        trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        if subject.kind == "loss":
            trained = [inputs[0].requires_grad_(), *trained]

            def value() -> Tensor:
                return subject.objective(module, inputs)
        elif subject.kind in ("block", "backbone"):
            learner = _Learner(module, four[subject.channel_axis], subject.channel_axis)
            trained = list(learner.parameters())
            goal = torch.tensor([1.0, 2.0, 3.0, 4.0])

            def value() -> Tensor:
                return (learner(*inputs) - goal).square().mean()
        else:

            def value() -> Tensor:
                return subject.objective(module, inputs)

        optimizer = torch.optim.Adam(trained, lr=float(spec.get("lr", 0.01)))
        first = float(value().detach())
        for _ in range(steps):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
        last = float(value().detach())
    assert last <= ratio * first, (
        f"{steps} steps took the loss from {first:.4g} to {last:.4g}; at most {ratio} of it is asked"
    )
