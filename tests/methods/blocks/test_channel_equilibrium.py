"""Channel equilibrium: a loop reference, the authors' block over steps, Newton's root, decorrelation, folding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torchive.methods.blocks.channel_equilibrium import (
    ChannelEquilibrium,
    ce_resnet,
    fold,
    inhibited_channels,
    newton_root,
)

REPOSITORY, COMMIT = "Tangshitao/CENet", "8781e406938320239c841e22961297e167627503"
SIZES = {"resnet50": 29331926}  # of the release's class
NAMES = {
    "x_weight": "balance",
    "AR.fc.0.weight": "squeeze.weight",
    "AR.fc.1.weight": "norm.weight",
    "AR.fc.1.bias": "norm.bias",
    "AR.fc.3.weight": "expand.weight",
    "running_mean": "running_mean",
    "running_wm": "running_root",
    "AR.running_scale": "running_scale",
}


def product(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    return [[sum(r[k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))] for r in a]


def dots(weight: list[list[float]], v: list[float]) -> list[float]:
    return [sum(w * a for w, a in zip(row, v, strict=True)) for row in weight]


def reference(block: ChannelEquilibrium, x: Tensor) -> Tensor:
    """A training pass number by number, from the formulas."""
    samples, channels, d = len(x), x.shape[1], block.group_channels
    values, w = x.flatten(2).tolist(), {k: v.tolist() for k, v in block.state_dict().items()}
    places = len(values[0][0])
    lam = 1 / (1 + math.exp(-w["balance"][0]))
    means = [[sum(row) / places for row in sample] for sample in values]
    v = [
        [sum((a - means[n][c]) ** 2 for a in values[n][c]) / (places - 1) for c in range(channels)]
        for n in range(samples)
    ]
    s = math.sqrt(sum(map(sum, v)) / (samples * channels))
    y = torch.zeros_like(x).flatten(2)
    for group in range(0, channels, d):
        mean = [sum(means[n][group + i] for n in range(samples)) / samples for i in range(d)]
        total = samples * places
        sigma = [[block.eps * (i == j) for j in range(d)] for i in range(d)]
        for i in range(d):
            for j in range(d):
                for n in range(samples):
                    pairs = zip(values[n][group + i], values[n][group + j], strict=True)
                    sigma[i][j] += sum((a - mean[i]) * (b - mean[j]) for a, b in pairs) / total
        trace = sum(sigma[i][i] for i in range(d))
        p = [[float(i == j) for j in range(d)] for i in range(d)]
        for _ in range(block.iterations):
            cube = product(product(product(p, p), p), sigma)
            p = [[1.5 * p[i][j] - 0.5 * cube[i][j] / trace for j in range(d)] for i in range(d)]
        for n in range(samples):
            for i in range(d):
                for at in range(places):
                    mixed = sum(p[i][j] * values[n][group + j][at] for j in range(d))
                    y[n, group + i, at] = lam * mixed
    for n in range(samples):
        hidden = dots(w["squeeze.weight"], v[n])
        mean_h = sum(hidden) / len(hidden)
        spread = math.sqrt(sum((h - mean_h) ** 2 for h in hidden) / len(hidden) + 1e-5)
        scaled = [(h - mean_h) / spread for h in hidden]
        active = [max(h * a + b, 0.0) for h, a, b in zip(scaled, w["norm.weight"], w["norm.bias"], strict=True)]
        for c, logit in enumerate(dots(w["expand.weight"], active)):
            gate = 1 / (1 + math.exp(-logit))
            y[n, c] += torch.tensor([(1 - lam) * gate / s * a for a in values[n][c]])
    return y.view_as(x)


def shaken(block: ChannelEquilibrium) -> ChannelEquilibrium:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.6)
    return block


def correlated(*shape: int) -> Tensor:
    """A batch whose channels depend on each other, with a mean."""
    channels = shape[1]
    mixing = torch.eye(channels) + 0.3 * torch.randn(channels, channels)
    return torch.einsum("cd,nd...->nc...", mixing, torch.randn(shape)) + torch.randn(channels, 1, 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_loop_reference(double, record, layout):
    worst = 0.0
    for channels, group in ((8, 4), (6, 16), (4, 1)):
        block = shaken(ChannelEquilibrium(channels, group_channels=group))
        x = correlated(3, channels, 4, 5).contiguous(memory_format=layout)
        y = block(x)
        assert y.is_contiguous(memory_format=layout)
        worst = max(worst, (y - reference(block, x)).abs().max().item())
    assert worst < 1e-12
    record("channel_equilibrium", "referenced", largest_difference=worst, dtype="float64")


def test_matches_the_authors_block(double, record, parity):
    """Three optimiser steps and then evaluation, with groups, one group, and a pooled covariance."""
    stored = parity("channel_equilibrium")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0, "state": 0.0, "evaluation": 0.0}
    cases = sorted({key.partition(":")[0] for key in stored})
    assert len(cases) == 3

    def compare(kind: str, found: Tensor, expected: Tensor) -> None:
        worst[kind] = max(worst[kind], (found - expected.view_as(found)).abs().max().item())

    for case in cases:
        given = {key.removeprefix(f"{case}:"): v for key, v in stored.items() if key.startswith(f"{case}:")}
        width = 4 if case != "whole" else 16
        options = {"pooled": True, "eps": 5e-5} if case == "pooled" else {}  # 4 maxima, 20 positions
        block = ChannelEquilibrium(given["e.x"].shape[1], group_channels=width, **options)
        starts = {NAMES[k[2:]]: v for k, v in given.items() if k.startswith("w.")}
        assert not block.load_state_dict(starts, strict=False).unexpected_keys
        own = dict(block.named_parameters())
        optimizer = torch.optim.SGD(own.values(), lr=0.05)
        for t in range(3):
            x = given[f"{t}.x"].requires_grad_()
            optimizer.zero_grad()
            y = block(x)
            y.backward(given[f"{t}.g"])
            compare("output", y, given[f"{t}.y"])
            compare("gradient", x.grad, given[f"{t}.dx"])
            for name in own.keys() & set(NAMES.values()):
                theirs = next(k for k, v in NAMES.items() if v == name)
                compare("gradient", own[name].grad, given[f"{t}.d.{theirs}"])
            optimizer.step()
        for key, value in given.items():
            if key.startswith("b."):
                compare("state", block.get_buffer(NAMES[key[2:]]), value)
            if key.startswith("n."):
                compare("optimiser_step", own[NAMES[key[2:]]], value)
        compare("evaluation", block.eval()(given["e.x"]), given["e.y"])
    assert max(worst.values()) < 1e-10
    record(
        "channel_equilibrium",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=len(cases),
        **worst,
    )


def test_newtons_root(double):
    values = torch.tensor([0.5, 1.0, 2.0, 4.0])
    root = newton_root(torch.diag(values)[None], 40)[0]
    assert (root - torch.diag((values / values.sum()).rsqrt())).abs().max() < 1e-8
    a = torch.randn(3, 5, 5)
    sigma = 0.2 * a @ a.mT + torch.eye(5)
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    gaps = []
    for iterations in (1, 2, 3, 5, 8):
        p = newton_root(sigma, iterations)
        gaps.append((p @ p @ sigma / trace - torch.eye(5)).norm().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-8


def test_balance_chooses_between_both_branches(double):
    x = correlated(4, 8, 5, 6)
    block = shaken(ChannelEquilibrium(8, group_channels=1))
    nn.init.constant_(block.balance, math.inf)
    ratio = block(x) / x  # d = 1: one factor for each channel
    factors = ratio.mean((0, 2, 3))
    assert (ratio - factors.view(-1, 1, 1)).abs().max() < 1e-9
    nn.init.constant_(block.balance, -math.inf)
    v = x.var((2, 3))
    expected = x * (block._gate(v) / v.mean().sqrt())[:, :, None, None]
    assert (block(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("unit_variance", [False, True])
def test_what_comes_out_is_decorrelated(double, unit_variance):
    block = ChannelEquilibrium(8, group_channels=8, iterations=10, centred=True, unit_variance=unit_variance)
    nn.init.constant_(block.balance, math.inf)
    x = correlated(16, 8, 12, 12)
    rows = x.transpose(0, 1).flatten(1)
    trace = 1.0 if unit_variance else rows.var(1, correction=0).sum()
    y = block(x).transpose(0, 1).flatten(1)
    assert y.mean(1).abs().max() < 1e-10
    assert (y @ y.T / y.shape[1] / trace - torch.eye(8)).abs().max() < 1e-3
    before = torch.corrcoef(rows) - torch.eye(8)
    assert before.abs().max() > 0.1
    uncentred = ChannelEquilibrium(8, group_channels=8, iterations=10, unit_variance=unit_variance)
    nn.init.constant_(uncentred.balance, math.inf)
    assert (uncentred(x) - block(x)).std((0, 2, 3)).max() < 1e-10  # they differ by a constant of each channel


def test_evaluation_before_training_and_flat_maps_are_finite():
    block, x = ChannelEquilibrium(8), torch.randn(2, 8, 5, 4)
    assert block.eval()(x).isfinite().all()
    assert int(block.running_scale == 0)
    block.train()
    for flat in (torch.ones(2, 8, 5, 4), torch.randn(2, 8, 1, 1), torch.zeros(2, 8, 3, 3)):
        flat.requires_grad_()
        block(flat).sum().backward()
        assert flat.grad is not None
        assert flat.grad.isfinite().all()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    assert block(torch.randn(0, 8, 4, 4)).shape == (0, 8, 4, 4)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_other_axes_and_half_precision():
    block = shaken(ChannelEquilibrium(8, group_channels=4)).eval()
    x = torch.randn(2, 8, 3, 4)
    assert torch.allclose(block(x.flatten(2)), block(x).flatten(2), atol=1e-6)
    assert torch.allclose(block(x[..., None])[..., 0], block(x), atol=1e-6)
    block.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert block.running_root.dtype == torch.float32
    exact = ChannelEquilibrium(8, group_channels=4)
    exact.load_state_dict(block.state_dict())
    assert (y.float() - exact(x)).abs().max() < 0.05 * y.float().abs().max()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_pure_decorrelation_folds(double, centred, bias):
    conv, norm = nn.Conv2d(3, 8, 3, 2, 1, bias=bias, padding_mode="reflect"), nn.BatchNorm2d(8)
    block = ChannelEquilibrium(8, group_channels=4, centred=centred)
    model = nn.Sequential(conv, norm, block)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"lam = 0\.5"):
        fold(conv, norm, block)
    nn.init.constant_(block.balance, math.inf)
    x = torch.randn(2, 3, 9, 7)
    assert (fold(conv, norm, block)(x) - model.eval()(x)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="one group, got 2"):
        fold(nn.Conv2d(4, 8, 1, groups=2), norm, block)
    with pytest.raises(ValueError, match="running statistics"):
        fold(conv, nn.BatchNorm2d(8, track_running_stats=False), block)


def test_statistics_of_all_processes_together(double, monkeypatch):
    """Two halves of a batch, each told the other's sums, give the whole batch's statistics and output."""
    x = correlated(4, 8, 3, 5)
    whole = shaken(ChannelEquilibrium(8, group_channels=4))
    expected = whole(x)
    halves = [ChannelEquilibrium(8, group_channels=4, sync=True) for _ in range(2)]
    for half in halves:
        half.load_state_dict(whole.state_dict())
        half.running_mean.zero_()
        half.running_scale.zero_()
        half.running_root.copy_(torch.eye(4).expand(2, 4, 4))
    mean = x.mean((0, 2, 3)).view(2, 4, 1)
    rows = x.transpose(0, 1).flatten(1).unflatten(0, (2, 4)) - mean
    sums = [
        torch.stack([x.var((2, 3)).sum(), torch.tensor(32.0)]),
        torch.cat([x.sum((0, 2, 3)), torch.tensor([60.0])]),
        rows @ rows.mT,
    ]
    for half, part in zip(halves, x.chunk(2), strict=True):
        calls: list[Tensor] = []

        def summed(value: Tensor, calls: list[Tensor] = calls) -> Tensor:
            assert value.shape == sums[len(calls)].shape
            calls.append(value)
            return sums[len(calls) - 1]

        monkeypatch.setattr(half, "_summed", summed)
        y = half(part)
        half.seen = calls
        assert (y - expected[:2] if half is halves[0] else y - expected[2:]).abs().max() < 1e-12
        for name, value in whole.named_buffers():
            assert (half.get_buffer(name) - value).abs().max() < 1e-12
    for one, other, total in zip(halves[0].seen, halves[1].seen, sums, strict=True):
        assert (one + other - total).abs().max() < 1e-10


def test_networks_have_the_authors_sizes():
    for name, parameters in SIZES.items():
        with torch.device("meta"):
            model = ce_resnet(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        blocks = {k: m for k, m in model.named_modules() if isinstance(m, ChannelEquilibrium)}
        assert len(blocks) == 14
        assert blocks["bn1.1"].group_channels == 64
        assert {m.group_channels for k, m in blocks.items() if k != "bn1.1"} == {16}
        assert not any(k.startswith("layer4") for k in blocks)
    assert ce_resnet("resnet18", num_classes=5)(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_inhibited_channels_are_counted():
    model = nn.Sequential(nn.BatchNorm2d(6), nn.BatchNorm1d(2), nn.BatchNorm2d(3, affine=False))
    nn.init.constant_(model[1].weight, -5e-3)
    assert inhibited_channels(model) == 0.25
    assert inhibited_channels(model, below=1e-3) == 0
    with pytest.raises(ValueError, match="Linear"):
        inhibited_channels(nn.Linear(2, 2))


def test_bad_arguments_are_named():
    for options in ({"group_channels": 0}, {"reduction": 0}, {"iterations": -1}, {"momentum": 1.5}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            ChannelEquilibrium(8, **options)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 3\)"):
        ChannelEquilibrium(8)(torch.zeros(2, 4, 3, 3))
