"""Normalisation with two images at a time, on real digits: batch norm breaks down, MABN follows the full batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchive.methods.blocks.mabn import CenConv2d, MABN2d


def network(conv: Callable[..., nn.Module], norm: Callable[[int], nn.Module]) -> nn.Module:
    """8 x 8 images down to 1 x 1: the last norm sees one number an image."""
    layers: list[nn.Module] = []
    width = 1
    for out, stride in ((16, 2), (16, 1), (32, 2), (32, 1), (32, 2), (32, 1)):
        layers += [conv(width, out, 3, stride=stride, padding=1, bias=False), norm(out), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 10))


def accuracy(model: nn.Module, micro: int, data: tuple[Tensor, Tensor], steps: int = 400) -> float:
    """Train by batches of 32 that pass the network ``micro`` at a time; score on what was held out."""
    x, y = data
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(1200, (32,), generator=draw)
        optimiser.zero_grad()
        for part in chosen.split(micro):
            (nn.functional.cross_entropy(model(x[part]), y[part]) * len(part) / 32).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(x[1200:]).argmax(1) == y[1200:]).float().mean().item()


@pytest.mark.slow
def test_two_images_at_a_time() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    data = x, torch.tensor(digits.target)[order]
    scores = {}
    for name, conv, norm, micro in (
        ("full", nn.Conv2d, nn.BatchNorm2d, 32),
        ("batch norm", nn.Conv2d, nn.BatchNorm2d, 2),
        ("mabn", CenConv2d, MABN2d, 2),
    ):
        torch.manual_seed(0)
        scores[name] = accuracy(network(conv, norm), micro, data)
    assert scores["batch norm"] < scores["full"] - 0.2, scores
    assert scores["mabn"] > scores["full"] - 0.01, scores
