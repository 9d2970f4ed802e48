"""Synthetic scenes for the detectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Scenes = tuple[list[Tensor], list[dict[str, Tensor]]]


def draw_scenes(count: int, size: int, generator: torch.Generator, *, classes: int = 1) -> Scenes:
    """Noise images (3, size, size) with one to three bright shapes: 1 filled, 2 a frame, 3 a cross; none overlap."""
    images, targets = [], []
    for _ in range(count):
        image = torch.randn(3, size, size, generator=generator) * 0.3
        boxes: list[list[int]] = []
        labels = []
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            for _ in range(20):
                w, h = (int(v) for v in torch.randint(size // 6, size // 3, (2,), generator=generator))
                x, y = (int(torch.randint(0, size - side, (1,), generator=generator)) for side in (w, h))
                if all(x + w < a or a + c < x or y + h < b or b + d < y for a, b, c, d in boxes):
                    break
            else:
                continue
            label = int(torch.randint(1, classes + 1, (1,), generator=generator))
            patch = torch.zeros(h, w)
            if label == 1:
                patch += 2
            elif label == 2:
                patch[:2], patch[-2:], patch[:, :2], patch[:, -2:] = 2, 2, 2, 2
            else:
                patch[h // 2 - 1 : h // 2 + 1], patch[:, w // 2 - 1 : w // 2 + 1] = 2, 2
            image[:, y : y + h, x : x + w] += patch
            boxes.append([x, y, w, h])
            labels.append(label)
        box = torch.tensor(boxes, dtype=torch.float32)
        box[:, 2:] += box[:, :2]
        images.append(image)
        targets.append({"boxes": box, "labels": torch.tensor(labels)})
    return images, targets


@pytest.fixture
def scenes() -> Callable[..., Scenes]:
    """``scenes(count, size, generator, classes=1)``."""
    return draw_scenes
