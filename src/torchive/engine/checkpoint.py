"""Checkpoints: one safetensors file with tensors by name and JSON beside them, written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

FORMAT = "torchive/1"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used: one clear line with file and reason."""


@dataclass
class Checkpoint:
    """Tensors by name (``model.*``, ``optimizer.*``) and plain values beside them."""

    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment either the old or the new content is there, also after a loss of power.

    Raises:
        CheckpointError: the disk is full or the folder refuses; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        before = "; what was saved before is intact" if path.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}{before}") from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Not every file system can; the file itself is on the disk already."""
    if os.name == "posix":
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors and plain values as one safetensors file, atomically.

    Raises:
        CheckpointError: as ``write_atomically``.
    """
    seen: set[int] = set()
    flat = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in seen:  # shared memory, which the format refuses
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        flat[name] = tensor
    metadata = {"format": FORMAT, "torch": torch.__version__, **{k: json.dumps(v) for k, v in values.items()}}
    write_atomically(Path(path), save(flat, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or a foreign file of weights (``.pt``, ``.pth``: tensors only; their code is never run).

    Raises:
        CheckpointError: missing, truncated, damaged, or a pickle that holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    with open(path, "rb") as file:
        head = file.read(9)
    if _is_pickle(head):
        return Checkpoint({f"model.{k}": v for k, v in _foreign(path).items()})
    try:
        with safe_open(path, "pt") as source:
            metadata = source.metadata() or {}
            tensors = {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or no safetensors file: {error}") from error
    try:
        values = {k: json.loads(v) for k, v in metadata.items() if k not in ("format", "torch")}
    except (ValueError, RecursionError):
        values = {}
    if metadata.get("format") != FORMAT:
        return Checkpoint({f"model.{k}": v for k, v in tensors.items()})
    return Checkpoint(tensors, values)


def _is_pickle(head: bytes) -> bool:
    """Whether a file's first bytes are those of ``torch.save``: a zip archive, or a bare pickle of protocol 2 to 5.

    A safetensors file starts with the length of its header, which may have any low byte, and then the header's brace.
    """
    if head[8:9] == b"{":
        return False
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def _foreign(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(), open(path, "rb") as file:  # opened, lest torch judge it by its name
            warnings.simplefilter("ignore")  # of unusual pickle protocols, which are refused below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: a pickle that holds more than tensors; it could run code, so it is refused. "
            "Save its state_dict, best as safetensors"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: truncated or damaged: {reason}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: holds no table of tensors by name")
    return content


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors by name into a model; names and shapes must all agree.

    Raises:
        CheckpointError: they do not; the message lists the first differences and counts them. The model is unchanged.
    """
    own = model.state_dict()
    missing = [f"{name} is missing" for name in own if name not in tensors]
    extra = [f"{name} is unknown" for name in tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    faults = [*shapes, *missing, *extra]
    if faults:
        rest = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(f"{path}: a checkpoint of another model: {'; '.join(faults[:4])}{rest}")
    model.load_state_dict(dict(tensors))


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by name and plain values by name."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else plain)[f"{prefix}.{index}.{key}"] = value
    return tensors, plain


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], prefix: str
) -> None:
    """Restore what ``optimizer_tensors`` gave, each tensor in the memory layout of its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *plain.items()):
        if name.startswith(f"{prefix}."):
            index, _, key = name.removeprefix(f"{prefix}.").partition(".")
            parameter = parameters[int(index)]
            if isinstance(value, Tensor):
                same = value.shape == parameter.shape
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value).detach() if same else value.clone()
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
