"""Synthetic objects with boxes and masks, and how well a model that learnt them segments others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchive.engine.metrics import metrics_of, record_of

Scenes = tuple[list[Tensor], list[dict[str, Tensor]]]


def draw_objects(count: int, size: tuple[int, int], least: float, most: float) -> dict[str, Tensor]:
    """A target of ``count`` boxes of up to three classes, each filled by its mask; sides from least to most pixels."""
    side = least + (most - least) * torch.rand(count, 2)
    corner = torch.rand(count, 2) * (torch.tensor([size[1], size[0]]) - side)
    boxes = torch.cat([corner, corner + side], 1)
    y, x = torch.arange(size[0]).view(1, -1, 1) + 0.5, torch.arange(size[1]).view(1, 1, -1) + 0.5
    x0, y0, x1, y1 = (b.view(-1, 1, 1) for b in boxes.unbind(1))
    masks = ((x > x0) & (x < x1) & (y > y0) & (y < y1)).to(torch.uint8)
    return {"boxes": boxes, "labels": torch.randint(1, 4, (count,)), "masks": masks}


def draw_discs(count: int, seed: int) -> Scenes:
    """``count`` images (3, 64, 64) of two pairs of equal discs, those of a pair overlapping, with visible masks."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.arange(64)[:, None] + 0.5, torch.arange(64) + 0.5
    images, targets = [], []
    for _ in range(count):
        image, masks = 0.1 * torch.randn(3, 64, 64, generator=g), []
        for top in (16, 48):
            left = 14 + 22 * torch.rand((), generator=g)
            for centre in (left, left + 12):
                disc = (x - centre) ** 2 + (y - top) ** 2 < 100
                masks = [m & ~disc for m in masks] + [disc]
                rim = disc & ((x - centre) ** 2 + (y - top) ** 2 > 64)
                image = torch.where(rim, 0.3, torch.where(disc, 1.0, image))
        stack = torch.stack(masks)
        columns, rows = stack.any(1).float(), stack.any(2).float()
        ends = [columns.argmax(1), rows.argmax(1), 64 - columns.flip(1).argmax(1), 64 - rows.flip(1).argmax(1)]
        images.append(image)
        labels = torch.ones(4, dtype=torch.int64)
        targets.append({"boxes": torch.stack(ends, 1).float(), "labels": labels, "masks": stack.to(torch.uint8)})
    return images, targets


def learn_and_score(net: nn.Module, learnt: Scenes, unseen: Scenes, *, steps: int, rate: float) -> dict[str, float]:
    """Detection metrics on ``unseen`` after some steps of four images of ``learnt``."""
    images, targets = learnt
    optimiser = torch.optim.Adam(net.parameters(), lr=rate)
    for step in range(steps):
        some = slice(4 * step % len(images), 4 * step % len(images) + 4)
        optimiser.zero_grad()
        sum(net.losses(images[some], targets[some]).values()).backward()
        optimiser.step()
    with torch.no_grad():
        found = net.eval().predict(unseen[0])
    rows = [record_of("detection", one, truth, 1) for one, truth in zip(found, unseen[1], strict=True)]
    return metrics_of("detection", rows, ["disc"])


@pytest.fixture
def objects() -> Callable[..., dict[str, Tensor]]:
    """``objects(count, size, least, most)``."""
    return draw_objects


@pytest.fixture
def discs() -> Callable[..., Scenes]:
    """``discs(count, seed)``."""
    return draw_discs


@pytest.fixture
def score_after() -> Callable[..., dict[str, float]]:
    """``score_after(net, learnt, unseen, steps=, rate=)``."""
    return learn_and_score
