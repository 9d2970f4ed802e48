"""The released weights: constants of a TensorFlow Lite file, read without that library.

A file is a FlatBuffer: tables whose fields are found by a table of offsets. Of its model the tensors of the first
subgraph are read, those that have a buffer of numbers.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchive.methods.faces.blazeface.model import BlazeFace
from torchive.methods.faces.blazeface.network import DoubleBlazeBlock

_TYPES = {0: "<f4", 1: "<f2", 2: "<i4", 4: "<i8"}
_SUBGRAPHS, _BUFFERS = 2, 4  # fields of the model
_SHAPE, _TYPE, _BUFFER, _NAME = 0, 1, 2, 3  # fields of a tensor


def read_tflite(content: bytes) -> dict[str, Tensor]:
    """Every constant of a TensorFlow Lite file by name, floating ones as float32, in the file's own axes.

    Raises:
        ValueError: the bytes are no such file, or it ends too early.
    """
    if content[4:8] != b"TFL3":
        raise ValueError(f"expected a TensorFlow Lite file (TFL3), got {content[4:8]!r}")
    try:
        model = _Table(content, _offset(content, 0))
        buffers = model.tables(_BUFFERS)
        found = {}
        for tensor in model.tables(_SUBGRAPHS)[0].tables(0):
            data = buffers[tensor.number(_BUFFER, "<I")].vector(0)
            kind = _TYPES.get(tensor.number(_TYPE, "<b"))
            if data is None or kind is None:
                continue
            start, count = data
            values = np.frombuffer(content, kind, count // np.dtype(kind).itemsize, start)
            shape = tensor.vector(_SHAPE)
            sides = () if shape is None else np.frombuffer(content, "<i4", shape[1], shape[0])
            values = values.astype(np.float32 if kind[1] == "f" else np.int64).reshape(tuple(sides))
            found[tensor.text(_NAME)] = torch.from_numpy(values)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"a damaged TensorFlow Lite file: {error}") from error
    return found


def from_tflite(content: bytes) -> BlazeFace:
    """The short-range detector, in evaluation mode, with the weights of its released file.

    Raises:
        ValueError: no TensorFlow Lite file, or one of another network; the message names the tensor.
    """
    net = BlazeFace(backbone="short_range", norm=None)
    values = read_tflite(content)
    for name, conv in _named(net):
        for part, own in (("Kernel", conv.weight), ("Bias", conv.bias)):
            tensor = values.get(f"{name}/{part}")
            if tensor is None:
                raise ValueError(f"the file has no {name}/{part}; expected the short-range face detector")
            if part == "Kernel":  # (1, k, k, C) of a depthwise convolution, else (C', k, k, C)
                tensor = tensor.permute((3, 0, 1, 2) if name.startswith("depthwise") else (0, 3, 1, 2))
            assert own is not None
            if tensor.shape != own.shape:
                raise ValueError(f"{name}/{part} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}")
            own.data.copy_(tensor)
    return net.eval()


def _named(net: BlazeFace) -> list[tuple[str, nn.Conv2d]]:
    """The file's name of each convolution."""
    rows: list[tuple[str, Any]] = [("conv2d", net.backbone.stem[0])]  # type: ignore[index]
    for number, block in enumerate(net.backbone.blocks):  # type: ignore[arg-type]
        assert not isinstance(block, DoubleBlazeBlock)
        depthwise, pointwise = block.body
        rows.append((f"depthwise_conv2d_{number}" if number else "depthwise_conv2d", depthwise[0]))
        rows.append((f"conv2d_{number + 1}", pointwise[0]))
    for kind, heads in (("classificator", net.classifiers), ("regressor", net.regressors)):
        rows += [(f"{kind}_{stride}", head) for stride, head in zip((8, 16), heads, strict=True)]
    return rows


class _Table:
    """A FlatBuffer table at a place in the bytes."""

    def __init__(self, content: bytes, place: int) -> None:
        self.content, self.place = content, place
        self.fields = place - struct.unpack_from("<i", content, place)[0]
        self.count = (struct.unpack_from("<H", content, self.fields)[0] - 4) // 2

    def field(self, number: int) -> int | None:
        """Where a field lies, None where it is absent."""
        if number >= self.count:
            return None
        shift = struct.unpack_from("<H", self.content, self.fields + 4 + 2 * number)[0]
        return self.place + shift if shift else None

    def number(self, number: int, kind: str) -> int:
        """A plain field, 0 where it is absent."""
        place = self.field(number)
        return 0 if place is None else int(struct.unpack_from(kind, self.content, place)[0])

    def vector(self, number: int) -> tuple[int, int] | None:
        """Where a vector's items begin and how many there are."""
        place = self.field(number)
        if place is None:
            return None
        start = _offset(self.content, place)
        return start + 4, struct.unpack_from("<I", self.content, start)[0]

    def tables(self, number: int) -> list[_Table]:
        """A vector of tables."""
        start, count = self.vector(number) or (0, 0)
        return [_Table(self.content, _offset(self.content, start + 4 * k)) for k in range(count)]

    def text(self, number: int) -> str:
        """A string, empty where it is absent."""
        start, count = self.vector(number) or (0, 0)
        return self.content[start : start + count].decode()


def _offset(content: bytes, place: int) -> int:
    return int(place + struct.unpack_from("<I", content, place)[0])
