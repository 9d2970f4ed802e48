"""Prepared samples kept in memory, so that each image is decoded and resized once and not once an epoch.

Images of one size with a class each go into one block of shared memory that the caller and all its workers fill and
read together. Other samples are kept by each process for itself, up to its part of the limit.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from torchive.structures import Sample


def worker_context() -> str | None:
    """How workers start: forked where that is safe, so that they share memory with the caller; else as the platform
    does it.
    """
    return "fork" if sys.platform.startswith("linux") else None


class SampleMemory:
    """Prepared samples by index, up to ``limit`` bytes in all; it never drops what it holds."""

    def __init__(self, ids: Any, example: Sample, limit: int, processes: int) -> None:
        self.ids = ids
        self.room = limit // max(processes, 1)
        self.own: dict[int, Sample] = {}
        self.block: Tensor | None = None
        image = example.image
        together = processes == 0 or worker_context() == "fork"
        if (
            together
            and isinstance(example.target, int)
            and image.dtype == torch.uint8
            and image.numel() * len(ids) <= limit
        ):
            self.block = _zeros(len(ids) * image.numel(), torch.uint8).view(len(ids), *image.shape)
            self.labels = _zeros(len(ids), torch.int64)  # label + 1; 0 where an image is not there yet

    def get(self, index: int) -> Sample | None:
        """The prepared sample, or None where it is not held. Its tensors must not be changed in place."""
        if self.block is not None and (label := int(self.labels[index])) > 0:
            return Sample(self.block[index], label - 1, self.ids[index])
        return self.own.get(index)

    def put(self, index: int, sample: Sample) -> None:
        """Hold a sample if there is room."""
        if self.block is not None and sample.image.shape == self.block.shape[1:]:
            self.block[index] = sample.image
            self.labels[index] = sample.target + 1  # written last: a label says that the image is whole
            return
        size = _bytes(sample)
        if size <= self.room:
            self.room -= size
            self.own[index] = sample


def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros in anonymous memory, which forked workers share; the system gives pages only when they are written."""
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)


def _bytes(sample: Sample) -> int:
    target = sample.target.values() if isinstance(sample.target, dict) else (sample.target,)
    tensors = [value for value in (sample.image, *target) if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
