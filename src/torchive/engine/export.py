"""To ONNX and back: export through ``torch.export``, run the file in ONNX Runtime, and say how far it is from PyTorch.

Nothing is believed that was not run: the file is executed at the exported size and at a second batch and image size, on
real samples where a run brings them, and scored like the model it came from.
"""

from __future__ import annotations

import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchive.engine.detector_file import DetectorWithDecoding, decodes, images_at_a_time
from torchive.engine.row_order import rows_in_order
from torchive.nn.pyramid import Pyramid

#: The gap up to which a method may be called ``ship``.
GAP = 1e-4


class ExportError(ValueError):
    """The model cannot be exported, or the exported file does not compute what the model computes."""


@dataclass(frozen=True)
class FileReport:
    """One ONNX file: its size, the largest absolute gap to PyTorch by input shape, latency and score."""

    path: str
    megabytes: float
    gaps: dict[str, float]
    latency_ms: float
    score: dict[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """The largest gap over all shapes."""
        return max(self.gaps.values())


@dataclass(frozen=True)
class ExportReport:
    """What ``export`` made and measured; also written as ``export.json`` beside the files."""

    onnx: FileReport
    torch_latency_ms: float
    torch_score: dict[str, float]
    int8: FileReport | None = None
    detector: FileReport | None = None

    def __str__(self) -> str:
        lines = [f"PyTorch   {self.torch_latency_ms:8.2f} ms  {_scores(self.torch_score)}"]
        for name, file in (("ONNX", self.onnx), ("ONNX int8", self.int8), ("decoded", self.detector)):
            if file is not None:
                about = f"gap {file.gap:.1e}  {file.megabytes:.1f} MB  {file.path}"
                lines.append(f"{name:<9} {file.latency_ms:8.2f} ms  {_scores(file.score)}  {about}")
        return "\n".join(lines)


def _scores(score: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in score.items()) or "not scored"


class OnnxModel:
    """An ONNX file as a callable: image tensors in, what the model's ``forward`` returns out.

    A list of images is taken as a batch, so they must be of one size; an argument that is None is left out, also where
    it is named.

    Args:
        path: the file.
        structure: how ``forward``'s outputs nest, from ``write_onnx``; None gives a list of tensors.
    """

    def __init__(self, path: Path, structure: pytree.TreeSpec | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.structure = structure
        self.names = [node.name for node in self.session.get_inputs()]
        self.calls = 0

    def __call__(self, *inputs: Tensor | Sequence[Tensor] | None, **named: Tensor | None) -> Any:
        self.calls += 1
        given = [value for value in (*inputs, *named.values()) if value is not None]
        tensors = [v if isinstance(v, Tensor) else torch.stack(tuple(v)) for v in given]
        arrays = [value.detach().cpu().contiguous().numpy() for value in tensors]
        outputs = [torch.from_numpy(a) for a in self.session.run(None, dict(zip(self.names, arrays, strict=True)))]
        return outputs if self.structure is None else pytree.tree_unflatten(outputs, self.structure)


def write_onnx(model: nn.Module, example: Tensor, path: Path, *, dynamic: Sequence[int] = (0, 2, 3)) -> pytree.TreeSpec:
    """Write a model's ``forward`` as an ONNX file, atomically.

    Args:
        example: an input; axes in ``dynamic`` stay free in the file and must be at least 2 long in it. Height and
            width do not where the model ``keeps_size``.

    Returns:
        How the outputs nest, for ``OnnxModel``.

    Raises:
        ExportError: ``torch.export`` or the translation refuses; the message holds the first line of the reason.
    """
    free = min(example.ndim, 2) if keeps_size(model) else example.ndim
    axes = {axis: torch.export.Dim.AUTO for axis in dynamic if axis < free}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            structure = pytree.tree_structure(model(example))
            program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=(axes,), verbose=False)
            assert program is not None
            program.save(str(temporary), external_data=False)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"{type(model).__name__} does not export: {_first_line(error)}") from error
    os.replace(temporary, path)
    return structure


def keeps_size(model: nn.Module) -> bool:
    """Whether a part of the model says that its exported file takes images of the example's height and width only."""
    return any(getattr(part, "one_size_in_files", False) for part in model.modules())


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def gap_to_torch(model: nn.Module, onnx: OnnxModel, inputs: Tensor) -> float:
    """The largest absolute difference over all outputs; rows that rounding has swapped are no difference.

    Raises:
        ExportError: shapes differ, or the file does not run at this size.
    """
    try:
        found = onnx(inputs)
    except Exception as error:
        raise ExportError(f"the file does not run at shape {tuple(inputs.shape)}: {_first_line(error)}") from error
    with torch.no_grad():
        wanted = model(inputs)
    eager = [leaf for leaf in pytree.tree_leaves(wanted) if isinstance(leaf, Tensor)]
    exported = pytree.tree_leaves(found)
    shapes = [tuple(t.shape) for t in eager], [tuple(t.shape) for t in exported]
    if shapes[0] != shapes[1]:
        raise ExportError(f"outputs at shape {tuple(inputs.shape)} are {shapes[1]}, PyTorch gives {shapes[0]}")
    if isinstance(wanted, dict) and isinstance(found, dict):
        exported = pytree.tree_leaves(rows_in_order(wanted, found))
    return max(
        (float((a.double() - b.double()).abs().max()) for a, b in zip(eager, exported, strict=True) if a.numel()),
        default=0.0,
    )


def quantize_onnx(source: Path, target: Path, batches: Iterable[Tensor]) -> Path:
    """Static int8 form (QDQ, weights by channel) of an ONNX file, calibrated on real batches.

    Raises:
        ExportError: no batch was given, or the runtime's quantiser refuses.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = OnnxModel(source).names[0]
    arrays = [{name: batch.contiguous().numpy()} for batch in batches]
    if not arrays:
        raise ExportError("int8 needs samples to calibrate on, got none")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(arrays)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    prepared = target.with_name(f".{target.stem}.prepared.onnx")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(temporary),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "MaxPool", "GlobalAveragePool"],
        )
    except Exception as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"{source.name} does not quantise: {_first_line(error)}") from error
    finally:
        prepared.unlink(missing_ok=True)
    os.replace(temporary, target)
    return target


def export_model(
    model: nn.Module,
    out: Path,
    samples: Tensor,
    *,
    second: Tensor | None = None,
    calibration: Iterable[Tensor] | None = None,
    score: Callable[[nn.Module], dict[str, float]] | None = None,
    name: str = "model",
) -> ExportReport:
    """Export a model, run the file at two sizes, score it, and optionally do the same for an int8 form.

    Where the model ``keeps_size``, the two are two batch sizes.

    A detector is also written with its decoding, as ``DetectorWithDecoding``; the gap of that file is one of pixels.

    Args:
        model: any module whose ``forward`` takes one tensor; its mode and device are restored.
        out: the folder of ``NAME.onnx``, ``NAME.int8.onnx``, ``NAME.detector.onnx`` and ``export.json``.
        samples: (N, C, ...) real inputs, N at least 2.
        second: inputs of another batch and image size; by default one sample fewer, 1.5 times the size.
        calibration: batches for the int8 form; None makes none.
        score: metrics of a model whose ``forward`` may be the file's.

    Raises:
        ExportError: the export fails or the file differs in shape; the folder keeps no half-written file.
    """
    if samples.ndim < 3 or len(samples) < 2:
        raise ExportError(f"export needs at least 2 samples of (C, ...), got shape {tuple(samples.shape)}")
    training = model.training
    model = model.eval()
    try:
        path = Path(out) / f"{name}.onnx"
        example = _roomy(model, samples[:2])
        structure = write_onnx(model, example, path)
        second = _other_size(model, samples) if second is None else second
        shapes = [samples, second]
        onnx = _file_report(model, path, structure, shapes, score)
        with torch.no_grad():
            torch_latency = _median_ms(lambda: model(samples[:1]))
        int8 = None
        if calibration is not None:
            quantised = quantize_onnx(path, Path(out) / f"{name}.int8.onnx", calibration)
            int8 = _file_report(model, quantised, structure, shapes, score)
        detector = None
        if decodes(model):
            whole, path = DetectorWithDecoding(model).eval(), Path(out) / f"{name}.detector.onnx"
            most = images_at_a_time(model)
            structure = write_onnx(whole, example[: most or 2], path, dynamic=(0, 2, 3) if most is None else (2, 3))
            detector = _file_report(whole, path, structure, [images[:most] for images in shapes], None)
        report = ExportReport(onnx, torch_latency, score(model) if score else {}, int8, detector)
    finally:
        model.train(training)
    (Path(out) / "export.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return report


def _file_report(
    model: nn.Module,
    path: Path,
    structure: pytree.TreeSpec,
    shapes: Sequence[Tensor],
    score: Callable[[nn.Module], dict[str, float]] | None,
) -> FileReport:
    onnx = OnnxModel(path, structure)
    gaps = {"x".join(map(str, x.shape)): gap_to_torch(model, onnx, x) for x in shapes}
    latency = _median_ms(lambda: onnx(shapes[0][:1]))
    scores: dict[str, float] = {}
    if score is not None:
        before = onnx.calls
        scores = score(with_forward(model, onnx))
        if onnx.calls == before:
            raise ExportError(f"{type(model).__name__}.predict does not call forward, so the file cannot be scored")
    return FileReport(path.name, path.stat().st_size / 1e6, gaps, latency, scores)


def with_forward(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """A copy of the model whose ``forward`` is another callable, so that ``predict`` decodes that one's outputs."""
    twin = copy.deepcopy(model)
    twin.forward = forward
    return twin


def _roomy(model: nn.Module, samples: Tensor) -> Tensor:
    """Samples on which no map of a pyramid is one cell high or wide: an exported file would keep it so at any size.

    They stay as they are where the model ``keeps_size``.
    """
    if keeps_size(model):
        return samples
    backbone, least = getattr(model, "backbone", None), getattr(model, "least_side", None)
    if least is None:
        least = 2 * max(level.stride for level in backbone.levels) if isinstance(backbone, Pyramid) else 1
    size = [max(side, least) for side in samples.shape[2:]]
    return samples if size == list(samples.shape[2:]) else nn.functional.interpolate(samples, size=size)


def _other_size(model: nn.Module, samples: Tensor) -> Tensor:
    """One sample fewer, half as large again in every image axis unless the model ``keeps_size``."""
    if keeps_size(model):
        return samples[:-1]
    size = [side + side // 2 for side in samples.shape[2:]]
    return nn.functional.interpolate(samples[:-1], size=size)


def _median_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)
