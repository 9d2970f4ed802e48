"""Photographed cut-outs in two domains: composed into scenes, as in a user's photograph, and alone on white, as in a
shop's.

A cut-out is an item: ``pair_id`` is its number, ``style`` is 1. In training each scene goes with the shop's image of
its main item; the other splits hold scenes and one shop image of each cut-out. No cut-out and no photograph of one
split occurs in another, and the image ``i`` of a source and a split is a function of the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchive.data.drawing import key_seed
from torchive.data.faults import DataError
from torchive.data.sets import scenes
from torchive.data.sets.registry import SAMPLE_SETS
from torchive.data.sets.scenes import Scenes, box_of, in_front
from torchive.structures import Sample
from torchive.structures.batch import SHOP, USER

_INFO = SAMPLE_SETS["scene-pairs"]
_SCENES = {"train": 600, "val": 100, "test": 200}
_WHITE = 250
_OTHERS = 2  # items beside the main one, at most


def load(split: str) -> ScenePairs:
    """One split."""
    return ScenePairs(scenes.load(split).folder, split)


class ScenePairs(Scenes):
    """Images (3, 320, 320) with boxes, labels, visible masks, ``pair_id``, ``style`` and ``source`` of each item."""

    labels_file = "labels-of-pairs"

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        self.name = _INFO.name
        count, shown = _SCENES[split], len(self.cutouts)
        plan = [(USER, k, k % shown) for k in range(count)]
        if split == "train":
            plan = [(source, k, item) for _, k, item in plan for source in (USER, SHOP)]
        else:
            plan += [(SHOP, item, item) for item in range(shown)]
        self.plan = plan  # of each image its source, its number and its main item
        self.ids = tuple(f"{split}/{('shop', 'user')[source]}/{k:04d}" for source, k, _ in plan)

    @property
    def pair_ids(self) -> list[int]:
        """Images that belong together have one number: those of one main item's scene in training."""
        return [k for _, k, _ in self.plan]

    def with_shares(self, shares: Sequence[float]) -> Scenes:
        """Refused: the items are given, and with them their classes."""
        raise DataError(f"{self.name}: its items are given; classes cannot be drawn with shares {list(shares)}")

    def __getitem__(self, index: int) -> Sample:
        source, _, _ = self.plan[index]
        image, shares, items = self._show(index)
        masks = shares > 0.5
        target = {
            "boxes": torch.from_numpy(np.array([box_of(mask) for mask in masks], np.float32)),
            "labels": torch.tensor([self._label(item) for item in items], dtype=torch.int64),
            "masks": torch.from_numpy(masks.view(np.uint8)),
            "pair_id": torch.tensor(items, dtype=torch.int64),
            "style": torch.ones(len(items), dtype=torch.int64),
            "source": torch.full((len(items),), source, dtype=torch.int64),
        }
        return Sample(torch.from_numpy(image), target, self.ids[index])

    def _label(self, item: int) -> int:
        return self.classes.index(self.cutouts[item]["class"]) + 1

    def _compose(
        self, index: int, *, picture: bool = True
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[int]]:
        image, shares, items = self._show(index, picture=picture)
        return image, shares, [self._label(item) for item in items]

    def _show(
        self, index: int, *, picture: bool = True
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[int]]:
        """Image, shares and items of a sample."""
        source, number, item = self.plan[index]
        draw = np.random.default_rng(key_seed("scene pairs", self.split, source, number))
        wanted = [item]
        canvas = self._background(draw, picture)
        if source == USER:
            others = draw.permutation(len(self.cutouts))[: int(draw.integers(0, _OTHERS + 1))]
            wanted += [int(k) for k in others if k != item]
        else:
            canvas = np.full_like(canvas, _WHITE)
        shares: list[np.ndarray[Any, Any]] = []
        own: list[float] = []
        shown: list[int] = []
        for k in wanted:
            colour, alpha = self._cutout(self.cutouts[k], draw, picture)
            found = in_front(alpha, shares, own, draw)
            if found is None:
                continue
            shares, own, (top, left) = found
            shown.append(k)
            if picture:
                part = canvas[top : top + alpha.shape[0], left : left + alpha.shape[1]]
                part += alpha[..., None] * (colour - part)
        image = np.ascontiguousarray(canvas.round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1))
        return image, np.stack(shares), shown
