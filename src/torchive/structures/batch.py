"""Samples and batches, typed by task.

The target of one sample, by task:

- classification: an ``int``, 0 to K - 1;
- segmentation: an int64 tensor (H, W) of class indices, 255 where a pixel is ignored;
- detection: a dict with ``boxes`` (L, 4) float32 xyxy in pixels, ``labels`` (L,) int64 from 1 to K (0 is background, as
  in torchvision), and optionally ``masks`` (L, H, W) uint8, ``iscrowd`` (L,) and ``area`` (L,), and ``semantic``
  (H, W) int64, the class of every pixel: 0 background, 1 to K the things as in ``labels``, above K what else there is,
  255 where nothing is known (a system that needs it and finds none reads the masks), and ``keypoints`` (L, P, 3), x, y
  and 0 for not marked, 1 for hidden, 2 for visible, zeros where a class has no such point; items that are sought in
  other images have ``pair_id``, ``style`` and ``source`` (L,), 0 a shop's and 1 a user's photograph: two are one item
  where pair and style agree and the style is above 0; where only some images have boxes, each also has ``has_boxes``
  () bool and ``image_labels`` (K,) float, 1 for each class that it shows; ``rotated`` (L, 5), centre x and y, two
  sides in pixels and the angle in radians, is read where anchors are oriented, and ``depth`` (L,), above zero, or
  (H, W) where objects are told apart by it; ``ignored`` (H, W) bool is no annotation, but what ``training_targets``
  leaves of the crowds that it takes out: the pixels of their masks;
- self-supervised: ``None``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Target = Any

#: ``source`` of an item that is sought in other images.
SHOP, USER = 0, 1


@dataclass(frozen=True)
class Sample:
    """One image, its target and the name under which every message speaks of it.

    ``image`` is (C, H, W), uint8 as read or normalised float32 after the transforms. ``id`` is stable across runs: the
    file's path relative to the data's root, or the set's own key.
    """

    image: Tensor
    target: Target
    id: str


@dataclass(frozen=True)
class Batch:
    """What a training step receives.

    ``inputs`` is (N, C, H, W) where all images have one size, (N, V, C, H, W) where a procedure sees V views of each
    image, else a list of (C, H, W). ``targets`` is a (N,) tensor for classification, (N, H, W) for segmentation, a list
    of dicts for detection, ``None`` where there are none.
    """

    inputs: Any
    targets: Target
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, *, channels_last: bool = False) -> Batch:
        """The batch on a device; 4-D inputs in channels-last layout if asked for."""
        layout = torch.channels_last if channels_last else torch.preserve_format
        return replace(self, inputs=_move(self.inputs, device, layout), targets=_move(self.targets, device))

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive micro-batches of at most ``size`` samples; tensors are views, nothing is copied."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            targets = None if self.targets is None else self.targets[part]
            yield Batch(self.inputs[part], targets, self.ids[part])


def _move(value: Any, device: torch.device | str, layout: torch.memory_format = torch.preserve_format) -> Any:
    if isinstance(value, Tensor):
        if value.ndim == 4 and layout is torch.channels_last:
            return value.to(device, non_blocking=True, memory_format=layout)
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_move(item, device, layout) for item in value)
    return value
