"""A trial pass leaves every module's mode as it was, and its input fits the network's first convolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchive.methods.blocks.ternarynet import ternarize
from torchive.nn.passes import as_inputs, eval_mode


def test_a_frozen_part_stays_in_its_mode() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    network[1].eval()
    before = [module.training for module in network.modules()]
    with eval_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before
    ternarize(network)
    assert [module.training for module in network.modules()] == before


def test_examples() -> None:
    flat, deep = nn.Sequential(nn.Conv2d(5, 4, 3)).double(), nn.Sequential(nn.Conv3d(2, 4, 3))
    assert as_inputs(flat)[0].shape == (1, 5, 64, 64)
    assert as_inputs(flat)[0].dtype == torch.float64
    assert as_inputs(deep, dims=(2, 3))[0].shape == (1, 2, 16, 64, 64)
    given = torch.zeros(1), torch.ones(2)
    assert as_inputs(flat, given) is given
    assert as_inputs(flat, given[0]) == (given[0],)
    with pytest.raises(ValueError, match=r"^Sequential has no 2-D convolution$"):
        as_inputs(deep)
    with pytest.raises(ValueError, match=r"^Linear has no convolution$"):
        as_inputs(nn.Linear(2, 2), dims=(2, 3))
