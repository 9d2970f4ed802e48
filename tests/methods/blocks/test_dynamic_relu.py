"""Dynamic ReLU: a loop reference, the third-party port on copied weights, its special cases and bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.blocks.dynamic_relu import DynamicReLU, spatial_attention

REPOSITORY, COMMIT = "Islanna/DynamicReLU", "0ba5a33821024d5e7d098f2343e3bb10a4fe4bb9"


def shaken(**options: object) -> DynamicReLU:
    """A layer whose coefficients are far from those of ReLU."""
    layer = DynamicReLU(**{"channels": 6, "reduction": 2, **options})
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def fix(layer: DynamicReLU, residuals: list[float]) -> DynamicReLU:
    """Make the hyper function give these 2K residuals (slopes, then offsets) for every input and channel."""
    first, last = layer.hyper[0], layer.hyper[2]
    first.weight.data.zero_()
    last.weight.data.zero_()
    value = torch.tensor(residuals).clamp(-1 + 1e-15, 1 - 1e-15)
    last.bias.data = ((1 + value) / (1 - value)).log().repeat(last.out_features // len(residuals))
    return layer


def reference(layer: DynamicReLU, x: Tensor) -> Tensor:
    """From the formulas, number by number; x is (N, C, H, W)."""
    w1, b1 = layer.hyper[0].weight.tolist(), layer.hyper[0].bias.tolist()
    w2, b2 = layer.hyper[2].weight.tolist(), layer.hyper[2].bias.tolist()
    pieces, y = layer.pieces, torch.zeros_like(x)
    batch, channels, height, width = x.shape
    positions = [(h, w) for h in range(height) for w in range(width)]
    for n in range(batch):
        mean = [sum(x[n, c, h, w].item() for h, w in positions) / len(positions) for c in range(channels)]
        hidden = [max(sum(a * b for a, b in zip(row, mean, strict=True)) + c, 0) for row, c in zip(w1, b1, strict=True)]
        raw = [sum(a * b for a, b in zip(row, hidden, strict=True)) + c for row, c in zip(w2, b2, strict=True)]
        residual = [2 / (1 + math.exp(-v)) - 1 for v in raw]
        pi = dict.fromkeys(positions, 1.0)
        if layer.attention is not None:
            weight, bias = layer.attention.weight[0].tolist(), layer.attention.bias.item()
            z = {(h, w): sum(weight[c] * x[n, c, h, w].item() for c in range(channels)) + bias for h, w in positions}
            powers = {p: math.exp(v / 10) for p, v in z.items()}
            pi = {p: min(len(positions) / 3 * v / sum(powers.values()), 1.0) for p, v in powers.items()}
        for c in range(channels):
            own = residual if layer.variant == "A" else residual[2 * pieces * c : 2 * pieces * (c + 1)]
            for h, w in positions:
                value = x[n, c, h, w].item()
                lines = []
                for k in range(pieces):
                    slope = (1.0 if k == 0 else 0.0) + 1.0 * own[k] * pi[h, w]
                    lines.append(slope * value + 0.5 * own[pieces + k] * pi[h, w])
                y[n, c, h, w] = max(lines)
    return y


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("variant", ["A", "B", "C"])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_equals_the_loop_reference(double, record, variant, pieces, layout):
    layer = shaken(variant=variant, pieces=pieces)
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=layout)
    expected = reference(layer, x)
    with torch.no_grad():
        difference = (layer(x) - expected).abs().max().item()
    assert difference < 1e-13
    assert (layer(x) - expected).abs().max() < 1e-13  # and with the gradient's own form
    if (variant, pieces, layout) == ("C", 2, torch.contiguous_format):
        record("dynamic_relu", "referenced", largest_difference=difference, dtype="float64")


def test_matches_the_port(double, record, parity):
    """A and B in one and two dimensions, and three pieces: output, gradients, and the output after one step."""
    stored = parity("dynamic_relu")
    cases = [k.removesuffix(":y") for k in stored if k.endswith(":y")]
    assert len(cases) == 5
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for case in cases:
        given = {k.removeprefix(f"{case}:"): v for k, v in stored.items() if k.startswith(f"{case}:")}
        layer = DynamicReLU(8, variant=case[0], pieces=3 if case == "B.3" else 2, reduction=4)
        for mine, name in ((layer.hyper[0], "fc1"), (layer.hyper[2], "fc2")):  # rows of both are (C, 2K)
            mine.weight.data, mine.bias.data = stored[f"{case}.{name}.weight"], stored[f"{case}.{name}.bias"]
        x = given["x"].requires_grad_()
        y = layer(x)
        y.backward(given["g"])
        pairs = {"output": [(y, "y")], "gradient": [(x.grad, "dx"), (layer.hyper[2].weight.grad.clone(), "dw")]}
        torch.optim.SGD(layer.parameters(), lr=0.05).step()
        pairs["optimiser_step"] = [(layer(x), "next")]
        for key, found in pairs.items():
            worst[key] = max(worst[key], *((a - given[name]).abs().max().item() for a, name in found))
    assert max(worst.values()) < 1e-12
    record(
        "dynamic_relu",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=len(cases),
        **worst,
    )


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_zero_residuals_are_relu(variant):
    layer = fix(DynamicReLU(6, variant=variant), [0.0] * 4)
    x = torch.randn(2, 6, 5, 4, requires_grad=True)
    assert torch.equal(layer(x), x.relu())
    grad = torch.randn(2, 6, 5, 4)
    (slope,) = torch.autograd.grad(layer(x), x, grad)
    (expected,) = torch.autograd.grad(x.relu(), x, grad)
    assert torch.equal(slope, expected)


def test_a_new_layer_is_near_relu():
    x = torch.randn(4, 64, 8, 8)
    assert (DynamicReLU(64)(x) - x.relu()).abs().max() < 0.1


@pytest.mark.parametrize("slope", [0.01, 0.2, -0.5])
def test_slopes_one_and_s_are_leaky_relu(double, slope):
    layer = fix(DynamicReLU(6), [0.0, slope, 0.0, 0.0])
    x = torch.randn(2, 6, 5, 4)
    expected = torch.maximum(x, slope * x)
    assert (layer(x) - expected).abs().max() < 1e-14
    if slope > 0:
        assert torch.equal(expected, F.leaky_relu(x, slope))


def test_one_piece_without_offset_is_a_gate(double):
    layer = shaken(pieces=1, offset_range=0.0)
    x = torch.randn(2, 6, 5, 4)
    delta = 2 * layer.hyper(x.mean((2, 3))).sigmoid() - 1
    gate = 1 + delta.unflatten(1, (6, 2))[..., 0]
    assert (layer(x) - x * gate[..., None, None]).abs().max() < 1e-14


def test_attention_weights(double):
    assert torch.allclose(spatial_attention(torch.full((2, 1, 4, 6), 3.0)), torch.tensor(1 / 3))
    peaked = torch.zeros(1, 1, 4, 6)
    peaked[0, 0, 1, 2] = 500.0
    weights = spatial_attention(peaked)
    assert weights[0, 0, 1, 2] == 1
    assert weights.sum() - 1 < 1e-12
    free = spatial_attention(torch.randn(2, 1, 4, 6))
    assert ((free > 0) & (free <= 1)).all()
    assert (free.sum((2, 3)) - 8).abs().max() < 1e-12  # L / 3 while nothing is clipped


@pytest.mark.parametrize("variant", ["A", "B"])
def test_convex_with_bounded_slopes(double, variant):
    """For fixed coefficients: a maximum of lines with slopes in [0, 2] and [-1, 1]."""
    layer = shaken(variant=variant)
    last = layer.hyper[2]
    last.weight.data.zero_()  # the coefficients no longer depend on the input
    nn.init.normal_(last.bias, std=10.0)
    a, b = torch.randn(2, 1, 6, 40) * 3
    for share in (0.1, 0.5, 0.8):
        chord = share * layer(a) + (1 - share) * layer(b)
        assert (layer(share * a + (1 - share) * b) <= chord + 1e-12).all()
    slopes = (layer(a) - layer(b)) / (a - b)
    assert slopes.abs().max() <= 2 + 1e-12
    line = torch.linspace(-1e4, 1e4, 5).expand(1, 6, 5)
    steep = (layer(line)[..., 1:] - layer(line)[..., :-1]) / 5e3
    assert (steep >= -1 - 1e-9).all()
    assert (steep <= 2 + 1e-9).all()


@pytest.mark.parametrize("variant", ["A", "B", "C"])
@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_gradients(double, variant, pieces):
    layer = shaken(channels=4, variant=variant, pieces=pieces)
    x = torch.randn(2, 4, 3, 2, requires_grad=True)  # seeded, no ties
    assert torch.autograd.gradcheck(layer, (x,))
    names = [name for name, _ in layer.named_parameters()]

    def with_weights(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(with_weights, tuple(layer.parameters()))


@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_tokens_lines_and_clips(variant):
    tokens = shaken(variant=variant, channel_dim=-1)
    maps = shaken(variant=variant)
    maps.load_state_dict(tokens.state_dict())
    x = torch.randn(2, 12, 6)
    flat = x.transpose(1, 2)
    expected = tokens(x).transpose(1, 2)
    assert torch.allclose(maps(flat), expected, atol=1e-5)
    assert torch.allclose(maps(flat.unflatten(2, (3, 4))).flatten(2), expected, atol=1e-5)
    assert torch.allclose(maps(flat.unflatten(2, (2, 3, 2))).flatten(2), expected, atol=1e-5)


def test_half_precision():
    layer = shaken(channels=8)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert torch.isfinite(x.grad).all()
    half = shaken(channels=8).bfloat16()
    z = half(x.detach().bfloat16().requires_grad_())
    z.sum().backward()
    assert z.dtype == torch.bfloat16


def test_bad_arguments_are_named():
    for options in ({"variant": "D"}, {"channel_dim": 2}, {"pieces": 0}, {"reduction": 0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            DynamicReLU(4, **options)
    with pytest.raises(ValueError, match="4 channels"):
        DynamicReLU(4)(torch.randn(1, 5, 3, 3))
