"""Weights in Darknet's binary layout: a header, then each convolution in the order of its network file.

With batch norm a convolution is shift, scale, mean, variance, weights; without, bias, weights; all little-endian
float32. The header is three int32, the version, and the number of images seen, int64 from version 0.2 on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

_VERSION = (0, 2, 0)


def read_darknet(network: nn.Module, path: Path | str, *, partial: bool = False) -> int:
    """Fill a network, in its order of modules, from a file of Darknet's; returns the number of images seen.

    Args:
        network: a ``YOLOv3`` or its backbone.
        path: the file.
        partial: whether the file may end before the network does, as a backbone's does for a detector, or after it.

    Raises:
        ValueError: the file has more or fewer numbers than the network; nothing is changed then.
    """
    content = Path(path).read_bytes()
    major, minor, _ = np.frombuffer(content[:12], "<i4")
    long = major * 10 + minor >= 2
    seen = int(np.frombuffer(content[12 : 20 if long else 16], "<i8" if long else "<i4")[0])
    body = content[20 if long else 16 :]
    values = torch.from_numpy(np.frombuffer(body[: len(body) // 4 * 4], "<f4").astype(np.float32))
    tensors = list(_tensors(network))
    wanted = sum(t.numel() for t in tensors)
    if len(body) % 4 or (len(values) != wanted and not partial):
        raise ValueError(f"{path}: expected {wanted} numbers for {type(network).__name__}, got {len(body) / 4:g}")
    start = 0
    with torch.no_grad():
        for tensor in tensors:
            if start + tensor.numel() > len(values):
                break
            tensor.copy_(values[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
    return seen


def write_darknet(network: nn.Module, path: Path | str, *, seen: int = 0) -> None:
    """Write a network's convolutions and batch norms as Darknet does; ``seen`` images it was trained on."""
    header = np.array(_VERSION, "<i4").tobytes() + np.array([seen], "<i8").tobytes()
    values = [t.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes() for t in _tensors(network)]
    Path(path).write_bytes(header + b"".join(values))


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Every tensor of the file in its order."""
    waiting: nn.Conv2d | None = None
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and waiting is not None:
            yield from (module.bias, module.weight, module.running_mean, module.running_var, waiting.weight)  # type: ignore[misc]
            waiting = None
        elif isinstance(module, nn.Conv2d):
            if module.bias is not None:
                yield from (module.bias, module.weight)
            else:
                waiting = module
