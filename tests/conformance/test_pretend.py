"""The pretended device refuses what a GPU refuses, lets through what it lets through, and changes no value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.testing import PretendedDevice

REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda there, here: there + here,
    "sum in place": lambda there, here: there.add_(here),
    "sum in place on the CPU": lambda there, here: here.add_(there),
    "list": lambda there, here: torch.cat([there, here]),
    "keyword": lambda there, here: F.cross_entropy(there, there.argmax(1), weight=here[0]),
    "index of the device into the CPU": lambda there, here: here[there > 0],
    "values of the CPU put in by tensors": lambda there, here: there.__setitem__(there.argmax(0), here[:1]),
    "gather": lambda there, here: there.gather(0, here[:1].long()),
    "parameter": lambda there, here: nn.Linear(4, 2)(there),
    "half-precision copy": lambda there, here: there.half() * here.half(),
    "registered operator": lambda there, here: torchvision.ops.nms(there, here[:, 0], 0.5),
    "pooled regions": lambda there, here: torchvision.ops.roi_align(there[None, None], here[:, :1].expand(-1, 5), 2),
    "fused lists": lambda there, here: torch._foreach_add([there], [here]),
    "draw": lambda there, here: torch.rand(3, device="cuda", generator=torch.Generator()),
    "draw in place": lambda there, here: there.normal_(generator=torch.Generator()),
    "array": lambda there, here: there.numpy(),
    "array by NumPy": lambda there, here: np.asarray(there),
}

ALLOWED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "number": lambda there, here: there + torch.tensor(2.0),
    "index of the CPU": lambda there, here: there[torch.tensor([0, 1])],
    "value": lambda there, here: there.__setitem__(0, torch.tensor(1.0)),
    "slice filled from the CPU": lambda there, here: there.__setitem__(slice(0, 1), here[:1]),
    "copy to": lambda there, here: there.copy_(here),
    "copy from": lambda there, here: here.copy_(there),
    "fetched": lambda there, here: there.cpu() + here,
    "fetched array": lambda there, here: there.detach().cpu().numpy(),
    "like": lambda there, here: there + torch.zeros_like(there) + there.new_ones(4),
    "sent along": lambda there, here: there + here.to(there),
    "sent by type": lambda there, here: there + here.to(there.device.type),
    "list of numbers": lambda there, here: (there.tolist(), float(there.sum())),
    "draw by the device": lambda there, here: torch.rand(3, 4, device=there.device) + there,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_a_gpu_refuses(name: str) -> None:
    with PretendedDevice():
        there, here = torch.rand(3, 4).to("cuda"), torch.rand(3, 4)
        with pytest.raises((RuntimeError, TypeError), match=r"CPU|cpu"):
            REFUSED[name](there, here)


@pytest.mark.parametrize("name", ALLOWED)
def test_lets_through_what_a_gpu_lets_through(name: str) -> None:
    with PretendedDevice():
        there, here = torch.rand(3, 4).to("cuda"), torch.rand(3, 4)
        ALLOWED[name](there, here)
        assert (there.device.type, here.device.type) == ("cuda", "cpu")


def test_tensors_are_where_they_were_sent_and_moving_copies() -> None:
    x = torch.rand(3, 4)
    with PretendedDevice("cuda:1") as pretended:
        y = x.to("cuda")
        assert y.device == y.sum().device == y[0].device == pretended.device == torch.device("cuda", 1)
        assert y.is_cuda
        assert not y.is_cpu
        assert x.device.type == y.cpu().device.type == "cpu"
        y.zero_()
    assert x.any()


def test_a_training_step_stays_on_the_device_and_equals_the_cpu_bit_for_bit() -> None:
    def step(device: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        x, y = torch.rand(5, 3, 8, 8).to(device), (torch.arange(5) % 2).to(device)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        held = [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters())]
        assert {t.device.type for t in held if t is not None} == {device}
        return network.state_dict()

    expected = step("cpu")
    with PretendedDevice():
        found = step("cuda")
        assert {t.device.type for t in found.values()} == {"cuda"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
