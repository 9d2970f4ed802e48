"""Leaving Python: torch.compile, torch.export and ONNX, each compared at a second size."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn

from torchive.testing.report import NotApplicableError
from torchive.testing.subject import Subject, seeded
from torchive.testing.tree import close, tensors


class _Flat(nn.Module):
    """The exportable call with its tensors in a flat tuple."""

    def __init__(self, module: nn.Module, listed: bool) -> None:
        super().__init__()
        self.module, self.listed = module, listed

    def forward(self, x: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(self.module([x[0]]) if self.listed else self.module(x, *more)))


def compiles(subject: Subject) -> None:
    """One graph without breaks for every size: another size gives the eager values and does not compile again."""
    if subject.is_detection and "export_inputs" not in subject.tiny:
        raise NotApplicableError("the inputs are a list of images; exports tells whether the network can be traced")
    module, first, others = _cases(subject)
    torch._dynamo.reset()
    calls: list[tuple[Any, ...]] = []
    seen: tuple[Any, ...] = first

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        calls.append(seen)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    config: Any = torch.fx.experimental._config  # a square first input must not tie height to width
    try:
        with torch.no_grad(), _quiet(), config.patch(use_duck_shape=False):
            for inputs in (first, *others):
                seen = inputs
                try:
                    output = compiled(*inputs)
                except Exception as error:
                    raise AssertionError(f"shape {_shapes(inputs)} does not compile: {_line(error)}") from error
                fault = close(list(tensors(output)), list(tensors(module(*inputs))))
                assert not fault, f"compiled, shape {_shapes(inputs)}: {fault}"
    finally:
        torch._dynamo.reset()
    again = [_shapes(inputs) for inputs in calls if inputs is not first]
    assert not again, (
        f"compiled for shape {_shapes(first)}, and again for {' and '.join(again)}; one graph should serve all"
    )


def exports(subject: Subject) -> None:
    """torch.export with free batch and size gives the eager values at a second size."""
    program, wrapper, _, others = _program(subject)
    for inputs in others:
        with torch.no_grad():
            fault = close(program.module()(*inputs), wrapper(*inputs))
        assert not fault, f"exported, shape {_shapes(inputs)}: {fault}"


def onnx(subject: Subject) -> None:
    """The ONNX file gives the eager values in ONNX Runtime, at a second size where the size is free."""
    try:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]
        import onnxscript  # noqa: F401  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise NotApplicableError(f"{error.name} is not installed; pip install 'torchive[export]'") from None
    program, wrapper, first, others = _program(subject)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "model.onnx"
        try:
            made = torch.onnx.export(program, dynamo=True, verbose=False)
            assert made is not None
            made.save(str(path))
        except Exception as error:
            raise AssertionError(f"no ONNX form: {_line(error)}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for inputs in (first, *others):
        try:
            found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=False)})
        except Exception as error:
            raise AssertionError(f"ONNX Runtime, shape {_shapes(inputs)}: {_line(error)}") from error
        with torch.no_grad():
            fault = close([torch.from_numpy(value) for value in found], list(wrapper(*inputs)))
        assert not fault, f"ONNX Runtime, shape {_shapes(inputs)}: {fault}"


def _cases(subject: Subject) -> tuple[nn.Module, tuple[Any, ...], list[tuple[Any, ...]]]:
    """The callable that a user would compile or export, its first inputs, and inputs of other sizes."""
    module = subject.evaluated(perturbed=True)
    if subject.kind == "procedure":
        module = module.deployable().eval()
    if "export_inputs" in subject.tiny:
        shape = tuple(subject.tiny["export_inputs"][0])
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return module, (drawn,), [(drawn.flip(-1),)]
    if subject.is_detection:
        inputs = (subject.inputs()[0][0][None],)
        return module, inputs, [(inputs[0].flip(-1),)]
    first = subject.inputs(shape=(max(2, subject.shape[0]), *subject.shape[1:]))
    if subject.kind == "loss":
        others = [subject.inputs(1, shape=(subject.shape[0] + 3, *subject.shape[1:]))]
    elif subject.size_axes:
        larger = subject.resized(2)
        others = [subject.inputs(1, shape=(3, *larger[0][1:])), subject.inputs(2, shape=(5, *larger[1][1:]))]
    else:
        others = [subject.inputs(1, shape=(5, *subject.shape[1:]))]
    return module, first, others


def _program(
    subject: Subject,
) -> tuple[torch.export.ExportedProgram, nn.Module, tuple[Any, ...], list[tuple[Any, ...]]]:
    if "program" not in subject.cache:
        module, first, others = _cases(subject)
        wrapper = _Flat(module, subject.is_detection and "export_inputs" not in subject.tiny).eval()
        fixed_size = subject.is_detection and not subject.tiny.get("dynamic", False)
        free = None if fixed_size else _free_axes(subject, first)
        try:
            with torch.no_grad(), _quiet(), seeded():
                program = torch.export.export(wrapper, first, dynamic_shapes=free, strict=False)
        except Exception as error:
            raise AssertionError(f"torch.export fails: {_line(error)}") from error
        subject.cache["program"] = (program, wrapper, first, others)
    found: tuple[torch.export.ExportedProgram, nn.Module, tuple[Any, ...], list[tuple[Any, ...]]] = subject.cache[
        "program"
    ]
    return found


def _free_axes(subject: Subject, inputs: tuple[Any, ...]) -> Any:
    divisor = int(subject.tiny.get("divisor", 1))
    free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    for axis in subject.size_axes:
        free[axis] = divisor * torch.export.Dim(f"size{axis}", max=4096) if divisor > 1 else torch.export.Dim.DYNAMIC
    rest = [{0: torch.export.Dim.DYNAMIC} for _ in inputs[1:]]
    return {"x": free, "more": tuple(rest)} if rest else {"x": free}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters report to the terminal; their errors reach the row instead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _shapes(inputs: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors(list(inputs)))


def _line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: " + " ".join(str(cause).split())[:300]
