"""TernaryNet against float64 references, all short vectors of bits, the authors' code and the paper's special cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchive
from torchive.engine.loop import progress_calls
from torchive.methods.blocks.ternarynet import (
    PackedTernaryConv,
    TernaryConv2d,
    TernaryConv3d,
    TernaryTanh,
    TernaryUNet,
    TernaryUnit,
    hard_ternary,
    pack,
    pack_ternary,
    popcount,
    soft_ternary,
    ternarize,
    ternary_cost,
    ternary_dot,
    ternary_weights,
)
from torchive.methods.blocks.ternarynet.bits import count_by_halves, hamming_product
from torchive.methods.blocks.ternarynet.network import slice_stacks
from torchive.nn.pixel_cross_entropy import PixelCrossEntropy

REPOSITORY = "mattiaspaul/TernaryNet"
COMMIT = "df3fd0635d42ee3bbabdaf3fb6d92fd4fe56507a"


def slow_filter(values: list[float]) -> list[float]:
    """One ternary filter from the paper's rule, in plain Python."""
    delta = 0.7 * sum(abs(v) for v in values) / len(values)
    kept = [abs(v) for v in values if abs(v) > delta]
    alpha = sum(kept) / len(kept)
    return [math.copysign(alpha, v) if abs(v) > delta else 0.0 for v in values]


def slow_conv(x: Tensor, weight: Tensor, step: int, border: int) -> Tensor:
    """Ternary convolution with plain loops, (N, I, H, W) by (O, I, k, k)."""
    ternary = torch.stack([torch.tensor(slow_filter(f.flatten().tolist())).view_as(f) for f in weight]).double()
    samples, _, height, width = x.shape
    k = weight.shape[2]
    padded = torch.zeros(samples, x.shape[1], height + 2 * border, width + 2 * border, dtype=x.dtype)
    padded[:, :, border : border + height, border : border + width] = x
    y = torch.zeros(samples, len(weight), *((s + 2 * border - k) // step + 1 for s in (height, width)), dtype=x.dtype)
    for n, o, i, j in itertools.product(*map(range, y.shape)):
        y[n, o, i, j] = (padded[n, :, i * step : i * step + k, j * step : j * step + k] * ternary[o]).sum()
    return y


def slow_tanh(x: float, slope: float) -> float:
    return 0.5 * math.tanh(slope * (2 * x - 1)) + 0.5 * math.tanh(slope * (2 * x + 1))


@pytest.mark.parametrize(("step", "border"), [(1, 0), (1, 1), (2, 1)])
def test_unit_equals_slow_reference(step: int, border: int, double: None, record) -> None:
    conv = TernaryConv2d(3, 4, 3, stride=step, padding=border)
    act = TernaryTanh()
    act.before_step(0.4)
    x = torch.randn(2, 3, 7, 6)
    plain = slow_conv(x, conv.weight.detach(), step, border)
    expected = torch.tensor([slow_tanh(v, 5.0) for v in plain.flatten().tolist()]).view_as(plain)
    worst = 0.0
    for module in (conv, conv.eval()):
        y = module(x).detach()
        worst = max(worst, float((y - plain).abs().max()), float((act(y) - expected).abs().max()))
    assert worst < 1e-12
    assert act.eval()(plain).flatten().tolist() == [(v > 0.5) - (v < -0.5) for v in plain.flatten().tolist()]
    if (step, border) == (2, 1):
        record("ternarynet", "referenced", largest_difference=worst, dtype="float64")


def test_soft_activation(double: None) -> None:
    x = torch.linspace(-3, 3, 1201)
    for slope in (1.0, 3.0, 8.0, 30.0):
        y = soft_ternary(x, slope)
        torch.testing.assert_close(soft_ternary(-x, slope), -y, rtol=0, atol=1e-15)
        assert float(soft_ternary(torch.zeros(1), slope)) == 0
        assert bool((y.diff() >= 0).all())
        assert float(y.abs().max()) <= 1
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(soft_ternary(z, slope).sum(), z)
        rise = slope * ((1 - torch.tanh(slope * (2 * x - 1)) ** 2) + (1 - torch.tanh(slope * (2 * x + 1)) ** 2))
        torch.testing.assert_close(grad, rise, rtol=1e-12, atol=1e-12)
    off = x[((x.abs() - 0.5).abs() > 0.1)]
    assert float((soft_ternary(off, 100.0) - hard_ternary(off)).abs().max()) < 1e-6
    assert hard_ternary(torch.tensor([-0.5, 0.5, -0.51, 0.51])).tolist() == [0, 0, -1, 1]


def test_schedule_and_modes() -> None:
    net = TernaryUNet(width=2)
    acts = [m for m in net.modules() if isinstance(m, TernaryTanh)]
    assert len(progress_calls(net)) == len(acts) == 14
    for progress, slope in ((0.0, 3.0), (0.5, 5.5), (1.0, 8.0), (1.5, 8.0)):
        for call in progress_calls(net):
            call(progress)
        assert {float(act.slope) for act in acts} == {slope}
    x = torch.randn(1000)
    act = TernaryTanh(hard=False).eval()
    assert torch.equal(act(x), soft_ternary(x, 3.0))
    for variant, levels in (("straight_through", [-1, 0, 1]), ("binary", [-1, 1])):
        act = TernaryTanh(variant=variant)
        z = x.clone().requires_grad_()
        y = act(z)
        assert y.unique().tolist() == levels
        assert torch.equal(act.eval()(x), y)
        y.sum().backward()
        assert torch.equal(z.grad, (x.abs() <= 1).float())
    assert torch.equal(TernaryTanh(variant="relu")(x), x.relu())


def test_the_slope_travels_with_the_weights() -> None:
    """A network that was sharpened and saved is as sharp when it is loaded, in training and in soft evaluation."""
    act, x = TernaryTanh(hard=False), torch.randn(50)
    act.before_step(0.5)
    loaded = TernaryTanh(hard=False)
    loaded.load_state_dict(act.state_dict())
    assert torch.equal(loaded(x), soft_ternary(x, 5.5))
    assert torch.equal(loaded.eval()(x), act.eval()(x))


def test_gradient_of_ternary_weight_changes_the_stored_one(double: None) -> None:
    conv = TernaryConv2d(4, 5, 3, padding=1, bias=True)
    x, goal = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 6, 6)
    signs, scale = ternary_weights(conv.weight.detach())
    ternary = (signs * scale.view(-1, 1, 1, 1)).requires_grad_()
    (F.conv2d(x, ternary, conv.bias, padding=1) - goal).square().sum().backward()
    conv.bias.grad = None
    before = conv.weight.detach().clone()
    (conv(x) - goal).square().sum().backward()
    torch.optim.SGD(conv.parameters(), lr=0.1).step()
    torch.testing.assert_close(conv.weight.detach(), before - 0.1 * ternary.grad, rtol=1e-12, atol=1e-12)
    again, _ = ternary_weights(conv.weight.detach())
    assert not torch.equal(again, signs)  # the scale and the signs follow the stored weights


def test_threshold_rule_of_gaussian_weights(double: None) -> None:
    """The squared error is least near 0.75 mean |W|: 0.190 of the variance; 0.192 at 0.7."""
    weight, errors = torch.randn(1, 400_000), {}
    for threshold in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0):
        signs, scale = ternary_weights(weight, threshold)
        errors[threshold] = float((weight - scale * signs).square().mean() / weight.square().mean())
    assert min(errors, key=errors.__getitem__) in (0.75, 0.8)  # the least lies at 0.767
    assert abs(errors[0.75] - 0.190) < 1.5e-3
    assert abs(errors[0.7] - 0.192) < 1.5e-3
    signs, scale = ternary_weights(weight)
    torch.testing.assert_close(scale, (weight * signs).sum(1) / signs.square().sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("length", range(1, 9))
def test_product_of_bits_is_the_float_product_for_all_vectors(length: int) -> None:
    """Exhaustive: each ternary vector with each other, 43 million pairs at the longest; and the binary ones."""
    vectors = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * length).view(-1, length)
    masks, signs = pack(vectors)
    expected = (vectors @ vectors.T).numpy()
    for start in range(0, len(vectors), 512):
        rows = (masks[start : start + 512, None], signs[start : start + 512, None])
        assert np.array_equal(ternary_dot(rows, (masks[None], signs[None])), expected[start : start + 512])
    binary = vectors[(vectors != 0).all(1)]
    words = pack(binary)[1]
    assert np.array_equal(hamming_product(words[:, None], words[None], length), (binary @ binary.T).numpy())


@pytest.mark.parametrize("length", [63, 64, 65, 1000, 4608])
def test_product_of_long_vectors(length: int) -> None:
    a, b = torch.randint(-1, 2, (2, 50, length)).double()
    assert ternary_dot(pack(a), pack(b)).tolist() == (a * b).sum(-1).long().tolist()
    words = pack(a)[0]
    assert np.array_equal(popcount(words), count_by_halves(words))
    with pytest.raises(ValueError, match="expected values in -1, 0 and 1"):
        pack(a * 0.5)


CASES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "dilation": (1, 2), "padding": (0, 3), "bias": True},
    {"kernel_size": 1, "groups": 2, "bias": True},
    {"kernel_size": 5, "padding": "same", "precision": "binary"},
    {"kernel_size": 3, "stride": 2, "groups": 6, "padding": 1},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("channels", [6, 72])
def test_packed_convolution_equals_float_exactly(case: dict, channels: int) -> None:
    conv = TernaryConv2d(channels, 12, **case).eval()
    packed = PackedTernaryConv(conv)
    x = torch.randint(-1, 2, (2, channels, 9, 14)).float()
    maps = [x, torch.zeros_like(x), F.avg_pool2d(x, 2), F.interpolate(x, scale_factor=2, mode="bilinear")]
    with torch.no_grad():
        for m in [*maps, x.contiguous(memory_format=torch.channels_last)]:
            assert torch.equal(packed(m), conv(m))
    with pytest.raises(ValueError, match="steps of 1/16"):
        packed(x * 0.3)
    with pytest.raises(ValueError, match=f"{channels} channels"):
        packed(x[:, 1:])


def test_packed_volume_equals_float_exactly() -> None:
    unit = TernaryUnit(TernaryConv3d(5, 7, (1, 3, 3), padding=1), slopes=(3.0, 8.0)).eval()
    nn.init.normal_(unit.norm.weight)
    x = torch.randint(-1, 2, (2, 5, 4, 6, 5)).float()
    with torch.no_grad():
        assert torch.equal(pack_ternary(unit)(x), unit(x))


@torch.no_grad()
def trained_norms(net: nn.Module, x: Tensor) -> nn.Module:
    """A network with drawn affine parts, some of them negative and one zero, and statistics of its own maps."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, 0.0, 0.4)
            module.weight[0] = 0
    net.train()(x)
    return net.eval()


NETWORKS = [{}, {"padding": 1}, {"reternarise": True}, {"precision": "binary", "variant": "binary"}]


@pytest.mark.parametrize("options", NETWORKS)
def test_packed_network_equals_float_exactly(options: dict) -> None:
    """Batch norm, thresholds, pooled and upsampled maps: bit for bit the float network in evaluation."""
    net = trained_norms(TernaryUNet(width=4, **options), torch.randn(4, 15, 20, 28))
    x = torch.randn(2, 15, 23, 30)
    with torch.no_grad():
        packed = pack_ternary(net)
        assert torch.equal(packed(x), net(x))
        assert sum(type(m).__name__ == "PackedTernaryUnit" for m in packed.modules()) == 12
        assert isinstance(packed.down[0][0].conv, TernaryConv2d)  # the first convolution is as it was
    with pytest.raises(ValueError, match="no ternary convolution"):
        pack_ternary(TernaryUNet(width=2, precision="full", variant="relu"))
    aligned = trained_norms(TernaryUNet(width=2, align_corners=True), torch.randn(2, 15, 16, 16))
    with pytest.raises(ValueError, match="steps of 1/16"):
        pack_ternary(aligned)(x)


def test_memory_and_operations() -> None:
    """Two bits for a weight, sixteen times less; the whole network loses over 90 % as the paper says."""
    conv = TernaryConv2d(64, 64, 3)
    packed = PackedTernaryConv(conv)
    assert conv.weight.numel() * 4 == 16 * 8 * (packed.masks.numel() + packed.signs.numel())
    cost = ternary_cost(conv, torch.zeros(1, 64, 10, 10))
    assert cost.float_bytes - cost.packed_bytes == conv.weight.numel() * 4 * 15 // 16 - 64 * 4
    assert (cost.multiply_adds, cost.kept_multiply_adds, cost.word_operations) == (64 * 64 * 9 * 64, 0, 64 * 64 * 9)
    net = TernaryUNet()
    assert sum(p.numel() for p in net.parameters()) == 2_664_482
    cost = ternary_cost(net, torch.zeros(1, 15, 176, 110))
    assert 1 - cost.packed_bytes / cost.float_bytes > 0.9
    assert cost.kept_multiply_adds < 0.03 * cost.multiply_adds
    assert 60 < (cost.multiply_adds - cost.kept_multiply_adds) / cost.word_operations <= 64
    net.down[0].eval()  # a frozen part
    modes = [m.training for m in net.modules()]
    ternary_cost(net, torch.zeros(1, 15, 16, 16))
    assert [m.training for m in net.modules()] == modes


def in_their_order(net: TernaryUNet) -> list[nn.Module]:
    pairs = [*net.down, net.bottom, *net.up]
    layers = [layer for a, b in pairs for layer in (a.conv, b.conv, a.norm, b.norm)]
    return [*layers, net.classifier]


def theirs(net: TernaryUNet, get) -> Tensor:
    """Values of the network, flat, in the order of the authors' one."""
    return torch.cat([v.detach().flatten() for module in in_their_order(net) for v in get(module)])


def tensors(module: nn.Module) -> list[Tensor]:
    return [v for k, v in module.state_dict(keep_vars=True).items() if "num_batches" not in k]


def test_activation_and_weights_equal_authors_code(parity) -> None:
    t = parity("ternarynet")
    for slope in (1.0, 3.0, 8.0):
        x = t["act/x"].clone().requires_grad_()
        y = soft_ternary(x, slope)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        torch.testing.assert_close(y, t[f"act/{slope}/y"], rtol=0, atol=1e-14)
        torch.testing.assert_close(grad, t[f"act/{slope}/dx"], rtol=0, atol=1e-12)
    assert torch.equal(hard_ternary(t["act/x"]), t["act/0.5/y"])
    signs, scale = ternary_weights(t["w/in"])
    torch.testing.assert_close(signs * scale.view(-1, 1, 1, 1), t["w/out"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("aligned", [False, True])
def test_network_equals_authors_code(aligned: bool, double: None, parity, record) -> None:
    """Soft and hard outputs, training output, weighted loss, gradients, one Adam step, output after it."""
    t = parity("ternarynet")
    case = {k.removeprefix(f"net{int(aligned)}/"): v for k, v in t.items() if k.startswith(f"net{int(aligned)}/")}
    net, start = TernaryUNet(width=2, align_corners=aligned), 0
    for module in in_their_order(net):
        for value in tensors(module):
            value.data.copy_(t["net/weights"][start : start + value.numel()].view_as(value))
            start += value.numel()
    assert start == len(t["net/weights"])
    x, target = t["net/x"].double(), t["net/t"].long()

    def evaluated(hard: bool) -> Tensor:
        for act in net.modules():
            act.hard = hard
        with torch.no_grad():
            return net.eval()(x)[:, :, ::2, ::2]

    found = {"soft": evaluated(False), "hard": evaluated(True)}
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0025)
    found["train"] = net(x)[:, :, ::2, ::2].detach()
    for module in net.modules():  # that pass moved the statistics once; take it back
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    found["loss"] = net.losses(x, target)["loss"].view(1)
    found["loss"].backward()
    found["gradients"] = theirs(net, lambda m: [p.grad for p in m.parameters()])[::4]
    optimizer.step()
    found["stepped"] = theirs(net, lambda m: m.parameters())[::4]
    found["after"] = evaluated(False)
    gaps = {name: float((value.detach() - case[name]).abs().max()) for name, value in found.items()}
    assert max(gaps.values()) < 2e-6, gaps
    if not aligned:
        what = "whole network: soft and hard output, loss, gradients, Adam step, output after it; both upsamplings"
        figures = {"largest_difference": max(gaps.values()), "dtype": "float64", "what": what}
        record("ternarynet", "matched", repository=REPOSITORY, commit=COMMIT, **figures)


@pytest.mark.parametrize(("height", "width"), [(176, 110), (1, 1), (37, 50)])
def test_any_size(height: int, width: int) -> None:
    for padding in (0, 1):
        net = TernaryUNet(width=1, padding=padding).eval()
        assert net(torch.randn(1, 15, height, width)).shape == (1, 2, height, width)
    assert TernaryUNet(width=1)._frame(176) == (30, 30)  # the release's own numbers
    assert TernaryUNet(width=1)._frame(110) == (31, 31)
    for wrong in ({"num_classes": 1}, {"width": 0}, {"padding": 2}, {"precision": "int"}, {"variant": "hard"}):
        with pytest.raises(ValueError, match="got"):
            TernaryUNet(**wrong)


def test_weighted_loss_leaves_ignored_pixels_out() -> None:
    x, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    target[0] = 255
    weight = [0.5, 2.5, 1.0]
    expected = F.cross_entropy(x, target, torch.tensor(weight), ignore_index=255)
    torch.testing.assert_close(PixelCrossEntropy(weight=weight)(x, target), expected)
    assert float(PixelCrossEntropy(weight=weight)(x[:1], target[:1])) == 0


def blob_volume(seed: int) -> tuple[Tensor, Tensor]:
    """A noisy volume (24, 24, 45) with one ellipsoid, and its mask."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.tensor([12.0, 12.0, 22.0]) + 6 * (torch.rand(3, generator=g) - 0.5)
    radii = torch.tensor([4.0, 5.0, 14.0]) + 2 * torch.rand(3, generator=g)
    grid = torch.cartesian_prod(*[torch.arange(float(s)) for s in (24, 24, 45)]).view(24, 24, 45, 3)
    mask = (((grid - centre) / radii).square().sum(-1) < 1).long()
    return mask + 0.8 * torch.randn(mask.shape, generator=g), mask


@torch.no_grad()
def dice(net: nn.Module, x: Tensor, mask: Tensor) -> float:
    found = net.eval()(x).argmax(1)
    return float(2 * (found * mask).sum() / (found.sum() + mask.sum()))


def test_learns_organs_in_volumes() -> None:
    """The 2.5-D network on stacks of 15 slices: packed, it finds the ellipsoid of another volume."""
    torch.manual_seed(0)
    stacks = [(slice_stacks(volume), mask) for volume, mask in map(blob_volume, range(5))]
    assert stacks[0][0][0].shape == (17, 15, 24, 24)
    x = torch.cat([s[0] for s, _ in stacks])
    y = torch.cat([mask[:, :, s[1]].permute(2, 0, 1) for s, mask in stacks])
    assert torch.equal(x[0, 7], blob_volume(0)[0][:, :, 14])  # the middle slice of the first stack
    net = TernaryUNet(width=4, padding=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.0025)
    for step in range(60):
        for call in progress_calls(net):
            call(step / 60)
        part = torch.randperm(4 * 17)[:10]
        optimizer.zero_grad()
        net.train().losses(x[part], y[part])["loss"].backward()
        optimizer.step()
    score = dice(pack_ternary(net), x[4 * 17 :], y[4 * 17 :])
    assert score == dice(net, x[4 * 17 :], y[4 * 17 :])
    assert score > 0.7, score


def test_enters_a_classifier() -> None:
    import timm

    net = timm.create_model("resnet18", num_classes=3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = torchive.convert(net, "ternarynet")
    assert type(net.conv1) is nn.Conv2d
    assert ("conv1", "it is the first convolution") in report.left_alone
    assert type(net.layer4[1].act2) is nn.ReLU  # behind the last convolution
    assert sum(c.new == "TernaryConv2d" for c in report.changes) == 19
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if not k.endswith(".slope"))
    net.load_state_dict(before)  # the plain network's weights still load
    x = torch.randn(2, 3, 64, 64)
    trained_norms(net, x)
    with torch.no_grad():
        torch.testing.assert_close(pack_ternary(net)(x), net(x), rtol=1e-5, atol=1e-5)
        assert pack_ternary(net)(x[:0]).shape == (0, 3)
    report.undo()
    assert type(net.layer1[0].conv1) is nn.Conv2d
    weights_only = ternarize(net, variant="relu")
    assert {type(new) for *_, new in weights_only.changed} == {TernaryConv2d}
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match="0: it is the first convolution"):
        torchive.convert(plain, "ternarynet")
