"""Crowds are nobody's to find: an object with ``iscrowd`` moves no loss of any detector of the archive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchive import testing
from torchive.testing.checks import SYSTEMS
from torchive.testing.subject import seeded

#: What reads crowds itself, and losses in which a crowd's pixels count nowhere, which is tested by value.
OWN, MAPS = {"instance_depth_direction"}, ("semantic", "loss_semantic")


def _detectors() -> list[str]:
    subjects = map(testing.subject_of, testing.built_methods())
    return [s.name for s in subjects if s.kind in SYSTEMS and s.is_detection and s.name not in OWN]


def _with_crowd(target: dict[str, Tensor], image: Tensor) -> dict[str, Tensor]:
    """The target and one more object, first of all: it covers the middle of the image and has a class that is there."""
    height, width = image.shape[1:]
    left, top, right, bottom = width // 8, height // 4, width - width // 4, height - height // 8
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    given = {"boxes": torch.tensor([[left, top, right, bottom]]).float(), "masks": mask}
    rows = {key: given.get(key, value[:1]) for key, value in target.items()}
    flags = torch.zeros(len(target["labels"]) + 1, dtype=torch.int64)
    flags[0] = 1
    return {key: torch.cat([rows[key], value]) for key, value in target.items()} | {"iscrowd": flags}


@pytest.mark.parametrize("name", _detectors())
def test_a_crowd_moves_no_loss(name: str) -> None:
    subject = testing.subject_of(name)
    net = subject.make()
    inputs = subject.inputs()
    targets = subject.targets(inputs)
    found = []
    for truth in (targets, [_with_crowd(t, image) for t, image in zip(targets, inputs[0], strict=True)]):
        with seeded(), torch.no_grad():
            found.append(net.losses(*inputs, truth))
    plain, crowded = found
    assert plain.keys() == crowded.keys()
    for key in plain.keys() - set(MAPS):
        torch.testing.assert_close(crowded[key], plain[key], rtol=1e-5, atol=1e-6, msg=f"{key} of {name}")
