"""OctConv: a loop reference, the authors' MXNet code and their port on copied weights, costs, grids, whole networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.video import r3d_18

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.blocks.octconv import (
    Octave,
    OctaveConv,
    join,
    oct_mobilenet,
    oct_resnet,
    octavize,
    relative_memory,
    relative_operations,
    split,
)

REPOSITORY, COMMIT = "facebookresearch/OctConv", "87c44f79162f3a2ef316bf924ad3697b8957a463"
PORT = "d-li14/octconv.pytorch at d639428f1772bff0e728aaef1d9741330b9dfebc"
PATHS = ("high_to_high", "low_to_high", "high_to_low", "low_to_low")
# alpha_in, alpha_out, in, out, side, stride, groups, bias, height, width
CASES = {
    "first": (0, 0.5, 6, 8, 3, 1, 1, False, 4, 6),
    "inner": (0.5, 0.5, 6, 8, 3, 1, 1, False, 4, 6),
    "last": (0.5, 0, 6, 8, 3, 1, 1, False, 4, 6),
    "point": (0.25, 0.5, 8, 6, 1, 1, 1, False, 4, 6),
    "strided_first": (0, 0.5, 6, 8, 3, 2, 1, False, 4, 8),
    "strided": (0.5, 0.25, 6, 8, 3, 2, 1, False, 4, 8),
    "strided_plain": (0, 0, 6, 8, 3, 2, 1, False, 4, 8),
    "depthwise": (0.25, 0.25, 8, 8, 3, 1, 8, False, 4, 6),
    "strided_depthwise": (0.5, 0.5, 8, 8, 3, 2, 8, False, 4, 8),
}
AUTHORS_ONLY = {
    "bias": (0.5, 0.5, 6, 8, 3, 1, 1, True, 4, 6),
    "bias_last": (0.5, 0, 6, 8, 3, 1, 1, True, 4, 6),
    "groups": (0.5, 0.25, 8, 16, 3, 1, 2, True, 4, 6),
    "ceiling": (0.5, 0.5, 6, 8, 3, 2, 1, True, 6, 10),
}


def drawer():
    stream = np.random.RandomState(0)
    return lambda *shape: torch.from_numpy(stream.standard_normal(shape))


def parts(value: Tensor | Octave) -> list[Tensor]:
    return [value.high, value.low] if isinstance(value, Octave) else [value]


def flat(values) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values if value is not None])


def layer_of(case, weight: Tensor, bias: Tensor | None) -> OctaveConv:
    alpha_in, alpha_out, c_in, c_out, side, stride, groups, has_bias, _, _ = case
    layer = OctaveConv(
        c_in, c_out, side, alpha_in=alpha_in, alpha_out=alpha_out, stride=stride, groups=groups, bias=has_bias
    )
    layer.load_state_dict({"weight": weight} | ({"bias": bias} if has_bias else {}))  # those of a plain convolution
    return layer


def operations(model: nn.Module, *inputs) -> int:
    """Multiply-adds."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    return counter.get_total_flops() // 2


# -- the formulas


def at(x: Tensor, n: int, c: int, h: int, w: int) -> float:
    inside = 0 <= h < x.shape[2] and 0 <= w < x.shape[3]
    return x[n, c, h, w].item() if inside else 0.0


def averaged(x: Tensor, factor: int) -> Tensor:
    batch, channels, height, width = x.shape
    y = torch.zeros(batch, channels, -(-height // factor), -(-width // factor))
    for n, c, h, w in np.ndindex(*y.shape):
        rows = range(h * factor, min((h + 1) * factor, height))
        columns = range(w * factor, min((w + 1) * factor, width))
        cells = [x[n, c, i, j].item() for i in rows for j in columns]
        y[n, c, h, w] = sum(cells) / len(cells)
    return y


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    side = weight.shape[2]
    y = torch.zeros(len(x), len(weight), *x.shape[2:])
    for n, o, h, w in np.ndindex(*y.shape):
        y[n, o, h, w] = sum(
            weight[o, c, i, j].item() * at(x, n, c, h + i - side // 2, w + j - side // 2)
            for c, i, j in np.ndindex(*weight.shape[1:])
        )
    return y


def doubled(x: Tensor, height: int, width: int) -> Tensor:
    y = torch.zeros(*x.shape[:2], height, width)
    for n, c, h, w in np.ndindex(*y.shape):
        y[n, c, h, w] = x[n, c, h // 2, w // 2]
    return y


def reference(high: Tensor, low: Tensor, weight: Tensor, low_out: int, stride: int) -> tuple[Tensor, Tensor]:
    at_in, at_out = high.shape[1], len(weight) - low_out
    pooled, pooled_low = (averaged(high, 2), averaged(low, 2)) if stride == 2 else (high, low)
    y_high, from_low = convolved(pooled, weight[:at_out, :at_in]), convolved(low, weight[:at_out, at_in:])
    y_high += doubled(from_low, *high.shape[2:]) if stride == 1 else from_low
    y_low = convolved(pooled_low, weight[at_out:, at_in:])
    return y_high, y_low + convolved(averaged(high, 2 * stride), weight[at_out:, :at_in])


def test_equals_the_loop_reference(double, record):
    worst = 0.0
    for stride, size in ((1, (4, 6)), (1, (5, 7)), (2, (4, 6)), (2, (5, 7))):
        layer = OctaveConv(5, 6, 3, alpha_in=0.4, alpha_out=0.5, stride=stride)
        weight = torch.randn(6, 5, 3, 3)
        layer.load_state_dict({"weight": weight})
        high, low = torch.randn(2, 3, *size), torch.randn(2, 2, *(-(-side // 2) for side in size))
        with torch.no_grad():
            found = layer(Octave(high, low))
        expected = reference(high, low, weight, 3, stride)
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(parts(found), expected, strict=True)))
    assert worst < 1e-13
    shifts = {name: round(max(map(abs, grid_shift(name))), 6) for name in ("pool", "strided")}
    record("octconv", "referenced", largest_difference=worst, dtype="float64", low_map_shifted_by_pixels=shifts)


# -- the authors' code, and the port that they name


def compare_layers(stored, prefix: str, cases, worst, draw) -> None:
    for name, case in cases.items():
        if f"{prefix}.{name}.y" not in stored:
            continue
        _, _, c_in, c_out, side, _, groups, _, height, width = case
        weight = draw(c_out, c_in // groups, side, side)
        layer = layer_of(case, weight, draw(c_out) if prefix == "authors" else None)
        at_in = c_in - layer.low_in
        given = [draw(1, at_in, height, width).requires_grad_()]
        if layer.low_in:
            given.append(draw(1, layer.low_in, height // 2, width // 2).requires_grad_())
        x = Octave(*given) if layer.low_in else given[0]
        y = parts(layer(x))
        torch.autograd.backward(y, [draw(*part.shape) for part in y])
        weights = [getattr(layer, path) for path in PATHS]
        pairs = {
            "output": (flat(y), "y"),
            "gradient": (flat(t.grad for t in given), "dx"),
            "weight_gradient": (flat(w.grad for w in weights if w is not None), "dw"),
        }
        torch.optim.SGD(layer.parameters(), lr=0.0625).step()
        pairs["optimiser_step"] = (flat(parts(layer(x))), "next")
        for key, (value, stem) in pairs.items():
            gap = (value - stored[f"{prefix}.{name}.{stem}"]).abs().max().item()
            worst[key] = max(worst.get(key, 0.0), gap)


def test_matches_the_authors_layers_and_the_port(double, record, parity):
    """12 layers of the authors, 9 of the port; squeeze-and-excitation, the adapter, and a network of each."""
    stored, worst = parity("octconv"), {}
    compare_layers(stored, "port", CASES, worst, drawer())
    draw = drawer()
    compare_layers(stored, "authors", CASES | AUTHORS_ONLY, worst, draw)
    high, low = draw(2, 4, 6, 6), draw(2, 2, 3, 3)
    gate = nn.Sequential(nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1), nn.Sigmoid())
    gate[0].weight.data, gate[0].bias.data = draw(3, 6, 1, 1), draw(3)
    first, first_bias, second, second_bias = draw(4, 3, 1, 1), draw(4), draw(2, 3, 1, 1), draw(2)
    gate[2].weight.data, gate[2].bias.data = torch.cat([first, second]), torch.cat([first_bias, second_bias])
    pair = Octave(high, low)
    gated = pair * gate(pair.mean((2, 3), keepdim=True))
    for value, key in ((flat(parts(gated)), "se"), (join(pair).reshape(-1), "adapter")):
        worst["output"] = max(worst["output"], (value - stored[f"authors.{key}.y"]).abs().max().item())
    compare_network(stored, "authors", authors_network(draw), draw(2, 3, 64, 64), worst)
    draw = drawer()
    compare_network(stored, "port", port_network(draw), draw(2, 3, 64, 64), worst)
    assert max(worst.values()) < 1e-10
    figures = {"largest_difference": max(worst.values()), "layers": 21, "networks": 2, **worst}
    record("octconv", "matched", repository=REPOSITORY, commit=COMMIT, port=PORT, **figures)


def authors_network(draw) -> nn.Module:
    """Their ResNet v1b of a bottleneck a stage, alpha 1/4, as timm's network octavized; drawn as their tensors were."""
    network = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, [1] * 4, 5, channels=(8, 16, 32, 32))

    def fill(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        conv.weight.data = draw(*conv.weight.shape) * (2 / conv.weight[0].numel()) ** 0.5
        norm.weight.data, norm.bias.data = 1 + 0.1 * draw(len(norm.weight)), 0.1 * draw(len(norm.weight))

    fill(network.conv1, network.bn1)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        block = stage[0]
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
        for conv, norm in (*pairs, tuple(block.downsample)):
            fill(conv, norm)
    network.fc.weight.data, network.fc.bias.data = draw(*network.fc.weight.shape), draw(5)
    octavize(network, 0.25)
    return network


def port_network(draw) -> nn.Module:
    """The port's Oct-ResNet of a bottleneck a stage, alpha 1/2, as torchvision's network octavized."""
    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5)
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = draw(*value.shape)
        if value.ndim > 1:
            drawn = drawn * (2 / value[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        elif "bn" in name or "downsample.1" in name:
            drawn = drawn * 0.1 + name.endswith("weight")
        value.copy_(drawn)
    octavize(network, 0.5)
    return network


def compare_network(stored, prefix: str, network: nn.Module, x: Tensor, worst) -> None:
    network.train()
    target = torch.tensor([1, 3])
    y = network(x)
    F.cross_entropy(y, target).backward()
    pairs = {"output": [(y, "y")], "gradient": [(network.conv1.weight.grad[:2], "dstem")]}
    low = network.layer2[0].conv2.low_to_low.grad
    pairs["weight_gradient"] = [(low if prefix == "authors" else low[:2, :4], "dll")]
    torch.optim.SGD(network.parameters(), lr=0.0625).step()
    pairs["optimiser_step"] = [(network(x), "next")]
    for key, found in pairs.items():
        worst[key] = max(worst[key], *((a - stored[f"{prefix}.net.{b}"]).abs().max().item() for a, b in found))


# -- special cases of one layer


@pytest.mark.parametrize("ndim", [2, 3])
def test_without_low_channels_it_is_a_plain_convolution(ndim):
    plain = (nn.Conv2d if ndim == 2 else nn.Conv3d)(6, 8, 3, padding=1, dilation=1, groups=2)
    layer = OctaveConv.from_module(plain, alpha_in=0, alpha_out=0)
    x = torch.randn(2, 6, *(7, 5, 6)[:ndim])
    assert torch.equal(layer(x), plain(x))
    strided = OctaveConv.from_module(
        nn.Conv2d(6, 8, 3, stride=2, padding=1), alpha_in=0, alpha_out=0, downsampling="strided"
    )
    assert strided(torch.randn(2, 6, 7, 5)).shape == (2, 8, 4, 3)


def test_all_low_is_a_convolution_at_half_resolution():
    plain = nn.Conv2d(6, 8, 3, padding=1)
    layer = OctaveConv.from_module(plain, alpha_in=1, alpha_out=1)
    high, low = torch.empty(2, 0, 9, 12), torch.randn(2, 6, 5, 6)
    y = layer(Octave(high, low))
    assert torch.equal(y.low, plain(low))
    assert y.high.shape == (2, 0, 9, 12)


def test_constant_maps_give_the_sums_of_the_kernels(double):
    layer = OctaveConv(5, 7, 3, alpha_in=0.4, alpha_out=0.3, bias=True)
    y = layer(Octave(torch.full((1, 3, 16, 16), 2.0), torch.full((1, 2, 8, 8), 3.0)))
    high = 2 * layer.high_to_high.sum((1, 2, 3)) + 3 * layer.low_to_high.sum((1, 2, 3)) + layer.bias[:5]
    low = 2 * layer.high_to_low.sum((1, 2, 3)) + 3 * layer.low_to_low.sum((1, 2, 3)) + layer.bias[5:]
    inner = y.high[0, :, 2:-2, 2:-2] - high[:, None, None]
    assert inner.abs().max() < 1e-12
    assert (y.low[0, :, 1:-1, 1:-1] - low[:, None, None]).abs().max() < 1e-12


@pytest.mark.parametrize("alpha", [0, 0.125, 0.25, 0.5, 0.75, 1])
def test_operations_parameters_and_memory_follow_the_formula(alpha):
    plain = OctaveConv(16, 16, 3, alpha_in=0, alpha_out=0)
    layer = OctaveConv(16, 16, 3, alpha_in=alpha, alpha_out=alpha)
    low = int(16 * alpha)
    x = torch.zeros(1, 16, 32, 32)
    pair = Octave(x[:, low:], torch.zeros(1, low, 16, 16)) if alpha else x
    assert operations(layer, pair) / operations(plain, x) == relative_operations(alpha, alpha)
    assert relative_operations(alpha, alpha) == 1 - 3 / 4 * alpha * (2 - alpha)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in plain.parameters())
    assert sum(part.numel() for part in parts(pair)) / x.numel() == relative_memory(alpha)


def centroid(x: Tensor, step: float, offset: float) -> tuple[float, float]:
    """Of a (H, W) map whose cells stand at ``offset + step i``."""
    rows, columns = (offset + step * torch.arange(side, dtype=x.dtype) for side in x.shape)
    return ((x.sum(1) @ rows) / x.sum()).item(), ((x.sum(0) @ columns) / x.sum()).item()


def grid_shift(downsampling: str) -> list[float]:
    """How far the low map moves the centroid of a blob, in pixels; its cells stand between two pixels, at 2 i + 1/2."""
    grid = torch.arange(40.0)
    blob = torch.exp(-((grid[:, None] - 17.3) ** 2 + (grid - 21.8) ** 2) / 18)
    layer = OctaveConv(1, 1, 1, alpha_in=0, alpha_out=1, downsampling=downsampling)
    nn.init.ones_(layer.high_to_low)
    with torch.no_grad():
        found = centroid(layer(blob[None, None]).low[0, 0], 2, 0.5)
    return [a - b for a, b in zip(found, centroid(blob, 1, 0), strict=True)]


def test_pooling_keeps_the_grids_together_and_striding_does_not(double):
    assert max(abs(shift) for shift in grid_shift("pool")) < 1e-6
    assert all(abs(shift - 0.5) < 1e-3 for shift in grid_shift("strided"))


def test_the_bias_is_added_once():
    for alpha_in, alpha_out in ((0, 0.5), (0.5, 0.5), (0.5, 0), (1, 0.5)):
        layer = OctaveConv(4, 4, 3, alpha_in=alpha_in, alpha_out=alpha_out, bias=True)
        for path in PATHS:
            if getattr(layer, path) is not None:
                nn.init.zeros_(getattr(layer, path))
        low_in = int(4 * alpha_in)
        high = torch.randn(1, 4 - low_in, 4, 4)
        y = layer(Octave(high, torch.randn(1, low_in, 2, 2)) if low_in else high)
        expected = torch.cat([part.mean((0, 2, 3)) for part in parts(y)])
        assert torch.allclose(expected, layer.bias)


def test_without_exchange_the_parts_do_not_see_each_other():
    layer = OctaveConv(6, 6, 3, exchange=False)
    high, low = torch.randn(1, 3, 6, 6), torch.randn(1, 3, 3, 3)
    y, z = layer(Octave(high, low)), layer(Octave(high, 2 * low))
    assert torch.equal(y.high, z.high)
    assert not torch.equal(y.low, z.low)
    assert torch.equal(y.low, layer(Octave(2 * high, low)).low)


def test_clips_keep_their_frames(double):
    """A clip of equal frames gives the frames of the image, for a kernel of one frame."""
    image = OctaveConv(4, 6, 3)
    clip = OctaveConv(4, 6, (1, 3, 3), ndim=3)
    for path in PATHS:
        getattr(clip, path).data = getattr(image, path).data[:, :, None]
    pair = split(torch.randn(1, 4, 7, 6), 2)
    y, z = image(pair), clip(Octave(*(part[:, :, None].expand(-1, -1, 3, -1, -1) for part in (pair.high, pair.low))))
    for a, b in zip(parts(y), parts(z), strict=True):
        assert torch.allclose(a[:, :, None].expand_as(b), b)
    strided = OctaveConv(4, 6, 3, ndim=3, stride=(2, 2, 2), padding=1)
    y = strided(Octave(torch.randn(1, 2, 8, 8, 8), torch.randn(1, 2, 8, 4, 4)))
    assert [tuple(part.shape[2:]) for part in parts(y)] == [(4, 4, 4), (4, 2, 2)]


def test_bad_arguments_are_named():
    for options, said in (
        ({"alpha_in": 1.5}, "1.5"),
        ({"kernel_size": 4}, "odd"),
        ({"padding": 0}, "padding"),
        ({"stride": 3}, "3"),
        ({"groups": 4}, "4 groups"),
        ({"downsampling": "blur"}, "blur"),
        ({"groups": 6, "alpha_in": 0.5, "alpha_out": 0}, "depthwise"),
    ):
        with pytest.raises(ValueError, match=said):
            OctaveConv(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, **options})
    layer = OctaveConv(6, 6, 3)
    with pytest.raises(ValueError, match="expected an Octave"):
        layer(torch.zeros(1, 6, 4, 4))
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        layer(Octave(torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 2, 2)))
    with pytest.raises(TypeError, match="Linear"):
        OctaveConv.from_module(nn.Linear(2, 2))


# -- the pair


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (6, 10), (5, 6)])
def test_pools_keep_the_parts_in_step(size):
    pair = split(torch.randn(2, 6, *size), 2)
    pools = [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.MaxPool2d(3, 1, 1),
    ]
    for pool in (*pools, nn.Upsample(scale_factor=2), nn.Upsample(size=(11, 4), mode="bilinear")):
        y = pool(pair)
        assert y.shape == pool(torch.zeros(2, 6, *size)).shape
        assert all(low == -(-high // 2) for high, low in zip(y.high.shape[2:], y.low.shape[2:], strict=True))


def test_batch_norm_of_a_pair_is_two_batch_norms():
    norm, both = nn.BatchNorm2d(6), (nn.BatchNorm2d(4), nn.BatchNorm2d(2))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    for one, where in zip(both, (slice(None, 4), slice(4, None)), strict=True):
        one.weight.data, one.bias.data = norm.weight.data[where].clone(), norm.bias.data[where].clone()
    for _ in range(3):
        pair = split(torch.randn(3, 6, 8, 8), 2)
        y, expected = norm(pair), [one(part) for one, part in zip(both, parts(pair), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(parts(y), expected, strict=True))
    assert torch.equal(norm.running_var, torch.cat([one.running_var for one in both]))
    groups = nn.GroupNorm(3, 6)
    y = groups(pair)
    assert torch.allclose(y.low, nn.GroupNorm(1, 2)(pair.low))
    assert torch.allclose(y.high, nn.GroupNorm(2, 4)(pair.high))
    assert isinstance(nn.GroupNorm(2, 6)(pair), Tensor)  # a group would hold channels of both


def test_sums_products_and_concatenation():
    pair, plain = split(torch.randn(2, 6, 8, 8), 2), torch.randn(2, 6, 8, 8)
    for y in (pair + plain, plain + pair):
        expected = split(plain, 2)
        assert torch.allclose(y.high, pair.high + expected.high)
        assert torch.allclose(y.low, pair.low + expected.low)
    scaled = torch.ones(6, 1, 1) * pair * torch.full((2, 1, 1, 1), 2.0) / 4 - pair * 0.5
    assert all(part.abs().max() < 1e-6 for part in parts(scaled))
    wide = torch.cat([pair, plain], 1)
    assert (wide.high.shape[1], wide.low.shape[1]) == (8, 4)
    assert torch.equal(pair.flatten(1), join(pair).flatten(1))
    assert torch.allclose(pair.mean((2, 3)), join(pair).mean((2, 3)), atol=1e-6)
    assert torch.equal(F.adaptive_avg_pool2d(pair, 1).flatten(1), pair.mean((-2, -1)))
    assert pair.shape == (2, 6, 8, 8)
    assert pair.dim() == pair.ndim == 4
    assert F.relu(pair).low.min() >= 0
    with pytest.raises(AttributeError, match="nothing"):
        pair.nothing()


# -- whole networks


@pytest.mark.parametrize(
    ("layers", "alpha", "parameters", "giga"),
    [((3, 4, 6, 3), 0.5, 25.557, 2.367), ((3, 4, 23, 3), 0.5, 44.549, 3.991)],
)
def test_resnets_cost_what_the_port_says(layers, alpha, parameters, giga):
    with torch.device("meta"):
        network = oct_resnet(layers, alpha=alpha)
        found = operations(network, torch.zeros(1, 3, 224, 224))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == parameters
    assert round(found / 1e9, 3) == giga


def test_mobilenet_costs_what_the_port_says():
    with torch.device("meta"):
        network = oct_mobilenet()
        found = operations(network, torch.zeros(1, 3, 224, 224))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 3) == 4.232
    assert round(found / 1e6, 1) == 318.2


def network_of(name: str) -> nn.Module:
    if name == "video":
        return r3d_18(num_classes=3)
    return timm.create_model(name, num_classes=3)


@pytest.mark.parametrize("name", ["resnet18", "seresnet18", "mobilenetv3_small_050", "ghostnet_050", "video"])
def test_networks_train_with_pairs_at_any_size(name):
    network = network_of(name)
    before = sum(p.numel() for p in network.parameters())
    report = octavize(network, 0.25)
    assert len(report.changed) > 10
    assert sum(p.numel() for p in network.parameters()) == before
    x = torch.randn(2, 3, 8, 40, 32) if name == "video" else torch.randn(2, 3, 75, 66)
    network(x).square().mean().backward()
    dead = [key for key, p in network.named_parameters() if p.grad is None]
    assert not dead


def test_dense_networks_densely_too():
    network = DenseNet(8, (2, 2, 2), num_init_features=16, num_classes=3)
    octavize(network, 0.25)
    assert network(torch.randn(2, 3, 64, 48)).shape == (2, 3)
    features = timm.create_model("resnet18", features_only=True)
    report = octavize(features, 0.25)
    maps = features.eval()(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    report.undo()
    assert not features._forward_hooks


def test_convert_undoes_selects_and_explains():
    network = timm.create_model("resnet18", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = network(x)
    state = copy.deepcopy(network.state_dict())
    report = convert(network, "octconv", alpha=0.25)
    assert "layer1.0.conv1         Conv2d -> OctaveConv (64 channels)" in str(report)
    network.load_state_dict(state)  # the plain network's checkpoint
    report.undo()
    assert torch.equal(network(x), expected)
    report = convert(network, "octconv", where="layer2.*", alpha=0.5)
    assert {change.name.split(".")[0] for change in report.changes} == {"layer2"}
    assert network(x).shape == expected.shape
    report.undo()
    with pytest.raises(ConversionError, match="it takes alpha, downsampling, exchange"):
        convert(network, "octconv", beta=1)
    with pytest.raises(ConversionError, match=r"in \[0, 1\), got 1.5"):
        convert(network, "octconv", alpha=1.5)
    with pytest.raises(ConversionError, match=r"^octconv: downsampling must be pool or strided, got 'skip'"):
        convert(network, "octconv", downsampling="skip")
    convert(network, "octconv")
    with pytest.raises(ConversionError, match="conv1: it is the first convolution"):
        convert(network, "octconv")  # again
    network = timm.create_model("mobilenetv2_050", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = network(x)
    report = convert(network, "sparse_shift")
    with pytest.raises(ConversionError, match="expected a tensor, got Octave"):
        convert(network, "octconv")  # a shift takes no pair
    report.undo()
    with pytest.raises(ConversionError, match="nothing in Sequential"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), "octconv")
    assert torch.equal(network(x), expected)


def test_plain_weights_load_and_a_copy_is_independent():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    octave = copy.deepcopy(plain)
    octavize(octave, 0.5)
    assert isinstance(octave[3], OctaveConv) is False  # the last convolution gives the output, the first is the stem
    deep = nn.Sequential(*plain, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    octavize(deep, 0.5)
    assert (deep[3].low_out, deep[5].low_in, deep[5].low_out) == (4, 4, 0)


@pytest.mark.slow
def test_compiles_and_exports_whole(tmp_path):
    from torchive.engine.export import OnnxModel, gap_to_torch, write_onnx

    network = timm.create_model("resnet10t", num_classes=3)
    octavize(network, 0.25)
    network.eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), network(x), atol=1e-5)
    structure = write_onnx(network, x[:2], tmp_path / "model.onnx", dynamic=(0,))
    assert gap_to_torch(network, OnnxModel(tmp_path / "model.onnx", structure), x) < 1e-4
