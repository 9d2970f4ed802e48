"""Calling: what comes out, that it is a function of what goes in, and that nothing else changes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchive.structures import Classification, Detections, Segmentation
from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject, seeded
from torchive.testing.tree import clone, finite, leaves, same_bits, structure, tensors


def forward_contract(subject: Subject) -> None:
    """``forward`` returns what its contract says: containers, shape, type, finite numbers."""
    module, inputs = subject.evaluated(), subject.inputs()
    output = subject.forward(module, inputs)
    fault = finite(output)
    assert not fault, fault
    found = tensors(output)
    assert found, f"no tensor in the output, which is a {type(output).__name__}"
    if subject.kind == "block":
        assert isinstance(output, Tensor), f"a block returns one tensor, got {type(output).__name__}"
        if subject.tiny.get("same_shape", False):
            assert output.shape == inputs[0].shape, f"shape {tuple(inputs[0].shape)} in, {tuple(output.shape)} out"
    if subject.kind == "loss":
        assert isinstance(output, Tensor), f"a loss returns one tensor, got {type(output).__name__}"
        assert output.ndim == 0, f"a loss is a scalar by default, got shape {tuple(output.shape)}"
    if subject.kind == "backbone":
        assert isinstance(output, list), f"a backbone returns a list of maps, got {type(output).__name__}"
    if subject.kind in ("block", "backbone"):
        for path, tensor in leaves(output):
            assert tensor.dtype == inputs[0].dtype, f"{path} is {tensor.dtype}, the input {inputs[0].dtype}"
            assert len(tensor) == len(inputs[0]), f"{path} has {len(tensor)} rows, the input {len(inputs[0])}"
    if subject.kind in ("system", "two_players", "procedure"):
        _loss_dict(subject)


def _loss_dict(subject: Subject) -> None:
    module = subject.make().train()
    inputs = subject.inputs()
    with seeded():
        if subject.kind == "procedure":
            losses = module.losses(subject.batch())
        else:
            losses = subject.losses(module, inputs, subject.targets(inputs))
    assert isinstance(losses, dict), f"losses returns a dict, got {type(losses).__name__}"
    assert losses, "losses returns an empty dict"
    for name, value in losses.items():
        assert isinstance(value, Tensor), f"losses[{name!r}] is a {type(value).__name__}, expected a scalar tensor"
        assert value.numel() == 1, f"losses[{name!r}] has shape {tuple(value.shape)}, expected a scalar"
        assert bool(value.isfinite()), f"losses[{name!r}] is {float(value)}"


def same_type_in_eval(subject: Subject) -> None:
    """``forward`` returns the same structure in training and in evaluation."""
    module, inputs = subject.make(), subject.inputs()
    with torch.no_grad(), seeded():
        training = structure(subject.forward(module.train(), inputs))
        evaluation = structure(subject.forward(module.eval(), inputs))
    assert training == evaluation, f"in training {training}, in evaluation {evaluation}"


def levels(subject: Subject) -> None:
    """Each map has the channels that ``levels`` promises, and grows by a cell where the input grows by its stride."""
    module, inputs = subject.evaluated(), subject.inputs()
    maps = subject.forward(module, inputs)
    assert len(maps) == len(module.levels), f"{len(maps)} maps, {len(module.levels)} levels"
    border = int(subject.tiny.get("border", 0))
    for i, (tensor, level) in enumerate(zip(maps, module.levels, strict=True)):
        size = tuple(-(-inputs[0].shape[axis] // level.stride) for axis in (-2, -1))
        assert tensor.shape[1] == level.channels, (
            f"map {i} has {tensor.shape[1]} channels, levels says {level.channels}"
        )
        fits = [b - border - 1 <= a <= b + 1 for a, b in zip(tensor.shape[-2:], size, strict=True)]
        assert all(fits), f"map {i} is {tuple(tensor.shape[-2:])}, stride {level.stride} makes {size}"
    if {2, 3} & set(subject.tiny.get("fixed", ())):
        return
    step = math.lcm(*(level.stride for level in module.levels))
    *rest, height, width = subject.shape
    with torch.no_grad():
        grown = subject.forward(module, subject.inputs(shape=(*rest, height + step, width + 2 * step)))
    for i, (small, large, level) in enumerate(zip(maps, grown, module.levels, strict=True)):
        more = tuple(b - a for a, b in zip(small.shape[-2:], large.shape[-2:], strict=True))
        wanted = (step // level.stride, 2 * step // level.stride)
        assert more == wanted, (
            f"map {i} grows by {more} cells where the input grows by {(step, 2 * step)} pixels; "
            f"stride {level.stride} makes {wanted}"
        )


def predict_contract(subject: Subject) -> None:
    """``predict`` returns one structure per image, with values in their ranges, and reads them from ``forward``."""
    module, inputs = subject.evaluated(), subject.inputs()
    calls: list[tuple[Any, ...]] = []

    def note(_called: nn.Module, args: tuple[Any, ...], named: dict[str, Any], _output: Any) -> None:
        calls.append((*args, *named.values()))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            found = module.predict(*inputs)
    finally:
        handle.remove()
    assert calls, "predict does not call forward, so that no exported file can stand in its place"
    given = max(sum(value is not None for value in call) for call in calls)
    assert given <= len(inputs), (
        f"predict gives forward {given} arguments for {len(inputs)}; an exported file has no more"
    )
    images = inputs[0]
    assert len(found) == len(images), f"{len(found)} predictions for {len(images)} images"
    wanted = {"classification": Classification, "detection": Detections, "segmentation": Segmentation}.get(module.task)
    for one, image in zip(found, images, strict=True):
        assert wanted is None or isinstance(one, wanted), (
            f"expected {wanted and wanted.__name__}, got {type(one).__name__}"
        )
        fault = finite(one)
        assert not fault, fault
        if isinstance(one, Classification):
            assert abs(float(one.scores.sum()) - 1) < 1e-4, f"scores sum to {float(one.scores.sum())}, expected 1"
        elif isinstance(one, Segmentation):
            assert one.labels.shape == image.shape[1:], (
                f"labels {tuple(one.labels.shape)} for an image {tuple(image.shape)}"
            )
            assert one.labels.dtype == torch.int64, f"labels are {one.labels.dtype}, expected torch.int64"
        elif isinstance(one, Detections):
            _detections(one, image)


def _detections(one: Detections, image: Tensor) -> None:
    height, width = image.shape[-2:]
    n = len(one.scores)
    assert one.boxes.shape == (n, 4), f"boxes {tuple(one.boxes.shape)} for {n} scores"
    assert one.labels.shape == (n,), f"labels {tuple(one.labels.shape)} for {n} scores"
    assert bool((one.scores.diff() <= 0).all()), "scores do not fall"
    assert bool(((one.scores >= 0) & (one.scores <= 1)).all()), "scores outside [0, 1]"
    assert bool((one.labels >= 1).all()), f"label {int(one.labels.min()) if n else 0} is below 1"
    limit = torch.tensor([width, height, width, height])
    assert bool(((one.boxes >= -1e-3) & (one.boxes <= limit + 1e-3)).all()), (
        f"boxes outside the {width} x {height} image"
    )
    assert bool((one.boxes[:, 2:] >= one.boxes[:, :2]).all()), "boxes with negative sides"
    if one.masks is not None:
        assert one.masks.shape == (n, height, width), f"masks {tuple(one.masks.shape)}, expected {(n, height, width)}"


def deterministic(subject: Subject) -> None:
    """In evaluation two calls give the same bits."""
    module, inputs = subject.evaluated(perturbed=True), subject.inputs()
    with torch.no_grad():
        first = clone(subject.forward(module, inputs))
        subject.forward(module, subject.inputs(1))
        fault = same_bits(first, subject.forward(module, inputs))
    assert not fault, f"the same input gave two outputs: {fault}"


def rng_untouched(subject: Subject) -> None:
    """In evaluation the global random generator is not used."""
    module, inputs = subject.evaluated(), subject.inputs()
    with seeded(11):
        before = torch.get_rng_state()
        with torch.no_grad():
            subject.forward(module, inputs)
        assert torch.equal(before, torch.get_rng_state()), "a call in evaluation drew from the global random generator"


def input_unchanged(subject: Subject) -> None:
    """Neither training nor evaluation writes into its input or its target."""
    for training in (False, True):
        module = subject.make()
        if isinstance(module, nn.Module):
            module.train(training)
        given: Any = subject.batch() if subject.kind == "procedure" else subject.inputs()
        targets = subject.targets(given) if subject.kind in ("system", "two_players") else None
        watched, kept = (given, targets), clone((given, targets))
        with torch.no_grad(), seeded():
            if subject.kind == "procedure":
                module.losses(given)
            else:
                subject.forward(module, given)
            if targets is not None:
                subject.losses(module, given, targets)
        fault = same_bits(kept, watched)
        assert not fault, (
            f"{'training' if training else 'evaluation'} wrote into its input: {fault.replace('output', 'given')}"
        )


def mode_unchanged(subject: Subject) -> None:
    """A call leaves every part's training flag as it was."""
    for training in (False, True):
        module = subject.make().train(training)
        parts = dict(module.named_modules())
        parts[list(parts)[-1]].train(not training)  # a frozen part, say
        before = {name: part.training for name, part in parts.items()}
        with torch.no_grad(), seeded():
            subject.objective(module, subject.inputs())
            if subject.kind == "system":
                module.predict(*subject.inputs())
        after = {name: part.training for name, part in module.named_modules()}
        changed = [name or "the module" for name in before if after.get(name) != before[name]]
        assert not changed, f"a call changed the training flag of {', '.join(changed[:5])}"


def deployable(subject: Subject) -> None:
    """``deployable`` is a module that maps images, and training the procedure changes it."""
    procedure = subject.make().train()
    model = procedure.deployable()
    assert isinstance(model, nn.Module), f"deployable returns a module, got {type(model).__name__}"
    before = clone(dict(model.state_dict()))
    optimizer = torch.optim.SGD([p for p in procedure.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        subject.objective(procedure, subject.inputs(), seed=step).backward()
        optimizer.step()
        if hasattr(procedure, "after_step"):
            procedure.after_step()
    assert same_bits(before, dict(procedure.deployable().state_dict())), (
        "two training steps left the deployable model as it was"
    )


def players(subject: Subject) -> None:
    """The players' parameters are disjoint, and each player's loss reaches its own."""
    module, inputs = subject.make().train(), subject.inputs()
    groups = {name: list(parameters) for name, parameters in module.players().items()}
    assert len(groups) >= 2, f"two players or more, got {list(groups)}"
    ids = [id(p) for group in groups.values() for p in group]
    assert len(ids) == len(set(ids)), "a parameter belongs to two players"
    argument = inputs[0] if len(inputs) == 1 else inputs
    for name, group in groups.items():
        module.zero_grad()
        with seeded():
            losses = module.losses(argument, subject.targets(inputs), name)
        torch.stack([value.reshape(()) for value in losses.values()]).sum().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in group), (
            f"the loss of {name} does not reach its parameters"
        )


def require_tensor_inputs(subject: Subject) -> None:
    """Leave checks that need one stacked tensor.

    Raises:
        NotApplicableError: the inputs are a list of images.
    """
    if subject.is_detection:
        raise NotApplicableError("the inputs are a list of images")
