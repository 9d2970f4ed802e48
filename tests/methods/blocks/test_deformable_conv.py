"""Deformable convolution and pooling: loop references, the authors' kernels on copied weights, whole networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import ps_roi_align, roi_align

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.blocks.deformable_conv import (
    ChannelModulation,
    DeformablePSRoIPool,
    DeformableRoIPool,
    DeformConv2d,
    deform_conv,
    deformable_resnet,
    deformable_roi_pool,
    deformize,
    effective_dilation,
    effective_receptive_field,
    field_radius,
    sampled_locations,
    total_variation,
)

REPOSITORY, COMMIT = "msracver/Deformable-ConvNets", "6aeda878a95bcb55eadffbe125804e730574de8d"
BOXES = torch.tensor([[0, 3.2, 5, 100.4, 90], [1, -20, 30.6, 60.5, 250], [1, 100, 100, 101, 103], [0, 0, 0, 143, 127]])
MODES = ("plain", "operator")


def shaken(*args: int, scale: float = 0.4, **options: object) -> DeformConv2d:
    """A layer whose offsets and masks are away from their start."""
    layer = DeformConv2d(*args, **options)
    for parameter in layer.offset.parameters():
        nn.init.normal_(parameter, std=scale)
    return layer


def pushed(x: Tensor, weight: Tensor, dy: float, dx: float, **options: object) -> Tensor:
    """The convolution with the same offset at every tap of every position."""
    plain = F.conv2d(x, weight, **options)
    taps = weight.shape[2] * weight.shape[3]
    offset = x.new_tensor([dy, dx]).repeat(taps).view(1, -1, 1, 1).expand(len(x), -1, *plain.shape[2:])
    pairs = {key: (value, value) for key, value in options.items()}
    return deform_conv(x, offset, weight, mode="plain", **pairs)


# -- the formulas


def sampled(plane: Tensor, y: float, x: float) -> float:
    """Equations 3 and 4."""
    total = 0.0
    for q_y, q_x in product(range(plane.shape[0]), range(plane.shape[1])):
        total += max(0.0, 1 - abs(q_y - y)) * max(0.0, 1 - abs(q_x - x)) * plane[q_y, q_x].item()
    return total


def reference(layer: DeformConv2d, x: Tensor) -> Tensor:
    """Equation 2, number by number."""
    offset, mask = layer.offsets(x)
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    share = layer.in_channels // layer.offset_groups
    inner, outer = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    y = torch.zeros(len(x), layer.out_channels, *offset.shape[2:])
    for n, c, i, j in product(range(len(x)), range(layer.in_channels), range(y.shape[2]), range(y.shape[3])):
        for a, b in product(range(kh), range(kw)):
            tap = (c // share * kh + a) * kw + b
            at_y = i * sh - ph + a * dh + offset[n, 2 * tap, i, j].item()
            at_x = j * sw - pw + b * dw + offset[n, 2 * tap + 1, i, j].item()
            value = sampled(x[n, c], at_y, at_x) * (1.0 if mask is None else mask[n, tap, i, j].item())
            for o in range(c // inner * outer, (c // inner + 1) * outer):
                y[n, o, i, j] += layer.weight[o, c % inner, a, b].item() * value
    return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)


def pooled(x: Tensor, boxes: Tensor, offset: Tensor | None, size: int, per_bin: bool, gamma: float) -> Tensor:
    """Equations 5 and 6 with 4 x 4 points in each bin; a point up to a cell outside of the map reads its edge."""
    channels, (height, width) = x.shape[1] // (size**2 if per_bin else 1), x.shape[2:]
    groups = 1 if offset is None else offset.shape[1] // 2
    y = torch.zeros(len(boxes), channels, size, size)
    for r, c, i, j in product(range(len(boxes)), range(channels), range(size), range(size)):
        image, left, top, right, bottom = boxes[r].tolist()
        across, down = (right - left) / 16, (bottom - top) / 16
        k = c // (channels // groups)
        move_x, move_y = (
            (0.0, 0.0) if offset is None else (gamma * v for v in offset[r, 2 * k : 2 * k + 2, i, j].tolist())
        )
        plane = x[int(image), c * size**2 + i * size + j if per_bin else c]
        for s, t in product(range(4), range(4)):
            at_y = top / 16 - 0.5 + ((i + (s + 0.5) / 4) / size + move_y) * down
            at_x = left / 16 - 0.5 + ((j + (t + 0.5) / 4) / size + move_x) * across
            if -1 <= at_y <= height and -1 <= at_x <= width:
                at_y, at_x = min(max(at_y, 0), height - 1), min(max(at_x, 0), width - 1)
                y[r, c, i, j] += sampled(plane, at_y, at_x) / 16
    return y


LAYERS = {
    "v1": {"padding": 1},
    "v2": {"padding": 1, "modulated": True},
    "strided": {"padding": (2, 1), "stride": (2, 1), "dilation": (2, 1), "bias": False},
    "groups": {"padding": 1, "groups": 2, "offset_groups": 4, "modulated": True},
    "depthwise": {"padding": 1, "groups": 4, "offset_groups": 2},
    "tall": {"kernel_size": (3, 1), "padding": (1, 0), "offset_groups": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_loop_reference(double, record, mode):
    worst = 0.0
    for options in LAYERS.values():
        layer = shaken(4, 4, **{"kernel_size": 3, **options}, mode=mode)
        x = torch.randn(2, 4, 5, 6)
        worst = max(worst, (layer(x) - reference(layer, x)).abs().max().item())
    for per_bin in (False, True):
        x, boxes = torch.randn(2, 4 * (4 if per_bin else 1), 8, 9), BOXES.double()
        for offset in (None, torch.randn(4, 2, 2, 2), torch.randn(4, 4, 2, 2)):
            y = deformable_roi_pool(x, boxes, offset, size=2, position_sensitive=per_bin)
            worst = max(worst, (y - pooled(x, boxes, offset, 2, per_bin, 0.1)).abs().max().item())
    assert worst < 1e-12
    if mode == "plain":
        growth = field_growth()
        assert all(0.4 < slope < 0.6 for slope in growth.values())  # the notes' remark: the square root of the depth
        record(
            "deformable_conv",
            "referenced",
            largest_difference=worst,
            dtype="float64",
            receptive_field_grows_with_depth_to_the_power=growth,
        )


def field_growth() -> dict[str, float]:
    """Exponent of the effective receptive field's radius over the depth, from 4 to 16 layers."""
    found = {}
    for kind in ("plain", "deformable"):
        logs = []
        for depth in (4, 8, 16):
            radii = []
            for seed in range(4):
                torch.manual_seed(seed)
                layers = [
                    nn.Conv2d(4, 4, 3, padding=1, bias=False)
                    if kind == "plain"
                    else shaken(4, 4, 3, padding=1, scale=0.1)
                    for _ in range(depth)
                ]
                for layer in layers:
                    nn.init.normal_(layer.weight, std=1 / 6)
                field = effective_receptive_field(nn.Sequential(*layers), torch.randn(2, 4, 49, 49))
                radii.append(field_radius(field))
            logs.append((math.log(depth), math.log(sum(radii) / len(radii))))
        found[kind] = round((logs[-1][1] - logs[0][1]) / (logs[-1][0] - logs[0][0]), 3)
    return found


# -- the authors' code


def cases(stored: dict[str, Tensor], mode: str) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    for case in ("v1.1.3.1.1.1", "v1.2.3.2.2.2", "v2.1.3.1.1.1", "v2.2.3.2.1.2"):
        version, groups, side, padding, stride, dilation = case.split(".")
        layer = DeformConv2d(
            4,
            5,
            int(side),
            padding=int(padding),
            stride=int(stride),
            dilation=int(dilation),
            offset_groups=int(groups),
            modulated=version == "v2",
            bias=False,
            mode=mode,
        )
        yield case, layer, ()
    yield "roi", DeformableRoIPool(4, size=3, points="release"), (stored["boxes"],)
    yield "psroi", DeformablePSRoIPool(3, 4, offset_groups=2, size=3, points="release"), (stored["boxes"],)


def test_matches_the_authors_kernels(double, record, parity):
    """Output, every gradient and the output after one SGD step, of the kernels compiled for the CPU."""
    stored = parity("deformable_conv")
    worst = {"output": 0.0, "gradient": 0.0, "weight_gradient": 0.0, "optimiser_step": 0.0}
    for mode in MODES:
        for case, module, boxes in cases(stored, mode):
            given = {k.removeprefix(f"{case}:"): v for k, v in stored.items() if k.startswith(f"{case}:")}
            prefix = f"{case}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
            x = given["x"].clone().requires_grad_()
            y = module(x, *boxes)
            y.backward(given["g"])
            pairs = {"output": [(y, given["y"])], "gradient": [(x.grad, given["dx"])]}
            pairs["weight_gradient"] = [(p.grad.clone(), given[f"d {name}"]) for name, p in module.named_parameters()]
            torch.optim.SGD(module.parameters(), lr=0.05).step()
            pairs["optimiser_step"] = [(module(x, *boxes), given["next"])]
            for key, found in pairs.items():
                worst[key] = max(worst[key], *((a - b).abs().max().item() for a, b in found))
    assert max(worst.values()) < 1e-11
    record(
        "deformable_conv",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        how="the CUDA kernels' text compiled for the CPU; the matrix products around them are PyTorch's",
        largest_difference=max(worst.values()),
        cases=6,
        **worst,
    )


# -- both forms of the convolution


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_both_forms_agree(options, layout):
    """Values and gradients in float32, on a larger map."""
    layer = shaken(16, 16, **{"kernel_size": 3, **options}, mode="plain").to(memory_format=layout)
    nn.init.normal_(layer.offset.weight, std=0.1)
    x = torch.randn(2, 16, 19, 23).contiguous(memory_format=layout).requires_grad_()
    results = []
    for mode in MODES:
        layer.mode = mode
        y = layer(x)
        gradients = torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])
        results.append((y, *gradients))
        assert y.is_contiguous(memory_format=layout)
    assert (results[0][0] - results[1][0]).abs().max() < 1e-5
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item())


def test_gradients_between_cells(double):
    """Away from whole numbers, where the bilinear kernel has a corner."""
    for options in ({}, {"modulated": True}, {"groups": 2, "offset_groups": 2, "stride": 2}):
        layer = DeformConv2d(2, 2, 3, padding=1, **options, mode="plain")
        x = torch.randn(1, 2, 4, 5, requires_grad=True)
        shape = layer.offset(x).shape
        taps = 2 * layer.offset_groups * 9
        offset = (torch.randint(-2, 2, shape) + 0.2 + 0.6 * torch.rand(shape))[:, :taps].requires_grad_()
        mask = torch.rand(1, taps // 2, *shape[2:], requires_grad=True) if layer.modulated else None
        arguments = [x, offset, layer.weight, layer.bias, mask]

        def run(*values: Tensor, layer: DeformConv2d = layer) -> Tensor:
            return deform_conv(*values, stride=layer.stride, padding=layer.padding, mode="plain")

        assert torch.autograd.gradcheck(run, arguments)


def test_a_new_layer_is_the_plain_convolution(double):
    x = torch.randn(2, 6, 9, 7)
    for old in (
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 8, (3, 5), stride=2, padding=(2, 1), dilation=(2, 1), groups=2, bias=False),
        nn.Conv2d(6, 6, 3, padding="same", groups=6, dilation=2),
        nn.Conv2d(6, 6, 3, padding="valid"),
    ):
        for modulated in (False, True):
            new = DeformConv2d.from_module(old, modulated=modulated)
            assert (new(x) - old(x)).abs().max() < 1e-12
            new.mode = "operator"
            assert (new(x) - old(x)).abs().max() < 1e-12


def test_offsets_are_shifts_and_dilations(double):
    x, weight = torch.randn(2, 3, 10, 11), torch.randn(4, 3, 3, 3)
    plain = F.conv2d(x, weight)
    assert (pushed(x, weight, 2, -1)[:, :, :-2, 1:] - plain[:, :, 2:, :-1]).abs().max() < 1e-12  # whole shifts
    half = F.conv2d((x[:, :, :-1] + x[:, :, 1:]) / 2, weight)
    assert (pushed(x, weight, 0.5, 0)[:, :, :-1] - half).abs().max() < 1e-12  # half a cell: the mean of two
    for dilation in (2, 3, 4):
        wide = F.conv2d(x, weight, dilation=dilation, padding=dilation)
        taps = torch.tensor([[a, b] for a in (-1, 0, 1) for b in (-1, 0, 1)], dtype=x.dtype) * (dilation - 1)
        offset = taps.reshape(1, -1, 1, 1).expand(2, -1, 10, 11)
        assert (deform_conv(x, offset, weight, padding=(1, 1), mode="plain") - wide).abs().max() < 1e-12
    # offsets that all positions share, as in active convolution, are a sum of shifted 1 x 1 convolutions
    shared = torch.randn(1, 18, 1, 1)
    parts = [
        pushed(x, weight[:, :, a : a + 1, b : b + 1], a + dy, b + dx)[:, :, :8, :9]
        for (a, b), (dy, dx) in zip(product(range(3), range(3)), shared.view(9, 2).tolist(), strict=True)
    ]
    assert (deform_conv(x, shared.expand(2, -1, 8, 9), weight, mode="plain") - sum(parts)).abs().max() < 1e-12


def test_far_offsets_read_nothing_and_not_a_number_stays():
    weight = torch.ones(1, 1, 3, 3)
    for far in (-50.0, 50.0, 1e8, float("inf")):
        assert pushed(torch.ones(1, 1, 5, 5), weight, far, 0.0).abs().max() == 0, far
    assert pushed(torch.ones(1, 1, 5, 5), weight, float("nan"), 0.0).isnan().all()


# -- regions


@pytest.mark.parametrize("modulated", [False, True])
def test_new_pooling_is_plain_pooling(double, modulated):
    x, boxes = torch.randn(2, 6, 8, 9), BOXES.double()
    expected = roi_align(x, boxes, 3, 1 / 16, sampling_ratio=4, aligned=True)
    y = DeformableRoIPool(6, size=3, modulated=modulated)(x, boxes)
    assert (y * (2 if modulated else 1) - expected).abs().max() < 1e-12


def test_new_position_sensitive_pooling_is_plain(double):
    module = DeformablePSRoIPool(5, 4, size=3)
    x, boxes = torch.randn(2, 5, 8, 9), BOXES[[0, 3]].double()
    expected = ps_roi_align(module.score(x), boxes, 3, 1 / 16, sampling_ratio=4)
    assert (module(x, boxes) - expected).abs().max() < 1e-12
    assert module.offset.out_channels == 2 * 4 * 9  # 2 k^2 for each class, the background included


def test_bins_move_by_shares_of_the_box(double):
    """On a ramp a bin's value is its place: gamma dp (w, h)."""
    ramp = torch.stack([torch.arange(40.0).expand(40, 40), torch.arange(40.0)[:, None].expand(40, 40)])[None]
    boxes = torch.tensor([[0.0, 160, 192, 320, 288]])  # 10 x 6 cells
    offset = torch.zeros(1, 2, 2, 2)
    offset[0, :, 0, 1] = torch.tensor([0.5, -1.0])
    moved = deformable_roi_pool(ramp, boxes, offset, size=2) - deformable_roi_pool(ramp, boxes, size=2)
    expected = torch.zeros(1, 2, 2, 2)
    expected[0, :, 0, 1] = torch.tensor([0.1 * 0.5 * 10, -0.1 * 6])
    assert (moved - expected).abs().max() < 1e-12


def test_pooling_gradients_and_rates(double):
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    boxes = torch.tensor([[0.0, 11, 13, 71, 83], [0, 30, 22, 61, 53]])
    offset = torch.randn(2, 4, 2, 2, requires_grad=True)
    mask = torch.rand(2, 2, 2, 2, requires_grad=True)

    def run(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return deformable_roi_pool(x, boxes, offset, mask, size=2, position_sensitive=True)

    assert torch.autograd.gradcheck(run, (x, offset, mask))
    assert DeformableRoIPool(4).parameter_rules()["offset.weight"] == {"lr": 0.01}
    assert DeformableRoIPool(4)(torch.randn(1, 4, 5, 5), torch.zeros(0, 5)).shape == (0, 4, 7, 7)


# -- networks


def test_the_papers_network():
    with torch.device("meta"):
        counts = {last: named(deformable_resnet("resnet101", last=last)) for last in (1, 2, 3, 6)}
    tail = [f"layer4.{block}.conv2" for block in (0, 1, 2)]
    assert [counts[last] for last in (1, 2, 3)] == [tail[2:], tail[1:], tail]
    assert counts[6] == [f"layer3.{block}.conv2" for block in (20, 21, 22)] + tail
    network = deformable_resnet("resnet50", num_classes=5).eval()
    assert [(m.dilation, m.padding, m.rate) for m in network.modules() if isinstance(m, DeformConv2d)] == [
        ((2, 2), (2, 2), 1.0)
    ] * 3
    assert network.forward_features(torch.randn(1, 3, 64, 96)).shape == (1, 2048, 4, 6)


def named(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, DeformConv2d)]


@pytest.mark.parametrize("options", [{}, {"modulated": True, "offset_groups": 4}, {"last": None}])
def test_networks_compute_the_same_until_trained(options):
    network = timm.create_model("resnet10t", num_classes=3, zero_init_last=False).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = network(x)
    report = convert(network, "deformable_conv", **options)
    assert len(report.changes) == (11 if "last" in options else 3)
    assert torch.allclose(network(x), expected, atol=1e-5)
    network.train()(x).square().mean().backward()
    assert all(m.offset.weight.grad.abs().max() > 0 for m in network.modules() if isinstance(m, DeformConv2d))
    report.undo()
    assert named(network) == []
    convert(network, "deformable_conv")
    convert(network, "deformable_conv", last=None)  # the rest, but not what moves the taps of the first ones
    assert not [name for name in named(network) if name.endswith(".offset")]


def test_convert_selects_and_explains():
    network = timm.create_model("resnet10t", num_classes=3)
    report = convert(network, "deformable_conv", where="layer2.*", last=1)
    assert named(network) == ["layer2.0.conv2"]
    report.undo()
    with pytest.raises(ConversionError, match="it takes last, offset_groups, modulated, rate, mode"):
        convert(network, "deformable_conv", beta=1)
    with pytest.raises(ConversionError, match="last must be at least 1 or None, got 0"):
        convert(network, "deformable_conv", last=0)
    with pytest.raises(ConversionError, match="no convolution with a window above 1 x 1"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "deformable_conv")
    reflecting = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="padding_mode is 'reflect'"):
        deformize(reflecting)
    assert named(network) == []


@pytest.mark.slow
def test_exports_whole(tmp_path):
    from torchive.engine.export import OnnxModel, gap_to_torch, write_onnx

    network = timm.create_model("resnet10t", num_classes=3)
    deformize(network, modulated=True)
    for layer in network.modules():
        if isinstance(layer, DeformConv2d):
            nn.init.normal_(layer.offset.weight, std=0.02)
    network.eval()
    x = torch.randn(3, 3, 64, 64)
    structure = write_onnx(network, x[:2], tmp_path / "model.onnx", dynamic=(0,))
    assert gap_to_torch(network, OnnxModel(tmp_path / "model.onnx", structure), x) < 1e-4


# -- what it looks at


def test_effective_dilation_and_sampled_locations():
    x = torch.randn(2, 4, 9, 8)
    for dilation in (1, 2, 3):
        layer = DeformConv2d(4, 4, 3, padding=dilation, dilation=dilation, offset_groups=2)
        assert torch.allclose(effective_dilation(layer, x), torch.full((2, 2, 9, 8), float(dilation)))
    spread = DeformConv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        spread.offset.bias.copy_(torch.tensor([[a, b] for a in (-1, 0, 1) for b in (-1, 0, 1)]).flatten() * 1.5)
    assert torch.allclose(effective_dilation(spread, x), torch.tensor(2.5))
    places = sampled_locations([DeformConv2d(4, 4, 3, padding=1).positions(x)] * 3, (4, 4))
    assert places.shape == (9**3, 2)
    assert torch.equal(places.unique(dim=0), torch.cartesian_prod(torch.arange(1.0, 8), torch.arange(1.0, 8)))
    moved = sampled_locations([spread.positions(x)], (4, 3))
    assert {tuple(p) for p in moved.tolist()} == {(4 + a, 3 + b) for a in (-2.5, 0, 2.5) for b in (-2.5, 0, 2.5)}
    with pytest.raises(ValueError, match="one tap"):
        effective_dilation(DeformConv2d(4, 4, 1), x)


def test_channel_modulation_does_what_one_gate_for_the_image_cannot():
    """Half of the channels are kept on bright cells, half on dark ones: a gate must differ from cell to cell."""
    from torchvision.ops import SqueezeExcitation

    assert total_variation(torch.ones(1, 2, 5, 6)) == 0
    assert total_variation(torch.arange(12.0).view(1, 1, 3, 4)) == pytest.approx((8 * 4 + 9) / 17)
    x = torch.randn(8, 8, 12, 12)
    x[:, 0] = F.avg_pool2d(x[:, :1], 5, 1, 2)[:, 0] * 5
    bright = (x[:, :1] > 0).float()
    target = torch.cat([x[:, :4] * bright, x[:, 4:] * (1 - bright)], 1)
    losses, roughness = {}, {}
    for name, factor in (("se", 0.0), ("free", 0.0), ("smooth", 0.3)):
        torch.manual_seed(0)
        module = SqueezeExcitation(8, 8) if name == "se" else ChannelModulation(8, groups=2)
        if name != "se":
            assert torch.equal(module(x), x)
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(120):
            loss = (module(x) - target).square().mean()
            optimizer.zero_grad()
            (loss + factor * module.penalty(x) if factor else loss).backward()
            optimizer.step()
        losses[name] = loss.item()
        roughness[name] = 0.0 if name == "se" else module.penalty(x).item()
    assert losses["free"] < 0.5 * losses["se"]
    assert losses["smooth"] < 0.7 * losses["se"]
    assert roughness["smooth"] < 0.7 * roughness["free"]


# -- what it is for


def outlines(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outlines of squares and discs, radius 4 to 20, in noise: images (N, 1, 48, 48), classes, radii and middles.

    The inside has the class of its outline, so how far a cell must look depends on the object's size.
    """
    generator = torch.Generator().manual_seed(seed)
    radius, angle = 4 + 16 * torch.rand(count, generator=generator), math.pi * torch.rand(count, generator=generator)
    kind = torch.randint(0, 2, (count,), generator=generator)
    centre = 24 + (torch.rand(count, 2, generator=generator) - 0.5) * 2 * (23 - radius)[:, None]
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    radius_, angle, kind = (v[:, None, None] for v in (radius, angle, kind))
    dy, dx = rows - centre[:, 0, None, None], columns - centre[:, 1, None, None]
    u, v = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
    far = torch.where(kind == 0, torch.maximum(u.abs(), v.abs()) / 0.85, (u.square() + v.square()).sqrt()) / radius_
    inside = far < 1
    edge = inside & ((1 - far) * radius_ < 2)
    images = edge + 0.3 * torch.randn(count, 48, 48, generator=generator)
    return images[:, None], torch.where(inside, kind + 1, 0), radius, centre


def segmenter(kind: str, width: int) -> nn.Sequential:
    def block() -> nn.Module:
        if kind == "deformable":
            return DeformConv2d(width, width, 3, padding=1)
        dilation = 2 if kind == "dilated" else 1
        return nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)

    layers = [nn.Conv2d(1, width, 3, 2, 1), nn.Conv2d(width, width, 3, 2, 1), block(), block()]
    parts = [part for layer in layers for part in (layer, nn.BatchNorm2d(width), nn.ReLU())]
    return nn.Sequential(*parts, nn.Conv2d(width, 3, 1), nn.Upsample(scale_factor=4, mode="bilinear"))


@pytest.mark.slow
def test_segments_objects_of_any_size_better_at_equal_parameters():
    """Against plain and dilated networks of slightly more parameters; the second layer spreads with the object."""
    images, classes, _, _ = outlines(512, seed=0)
    test_images, test_classes, radius, centre = outlines(256, seed=1)
    score, size = {}, {}
    for kind, width in (("plain", 30), ("dilated", 30), ("deformable", 24)):
        torch.manual_seed(0)
        network = segmenter(kind, width)
        size[kind] = sum(p.numel() for p in network.parameters())
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
        for _ in range(200):
            pick = torch.randint(0, 512, (16,))
            optimizer.zero_grad()
            F.cross_entropy(network(images[pick]), classes[pick]).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            found = network.eval()(test_images).argmax(1)
        hits = [
            ((found == k) & (test_classes == k)).sum() / ((found == k) | (test_classes == k)).sum() for k in range(3)
        ]
        score[kind] = float(sum(hits) / 3)
    assert size["deformable"] < size["plain"] == size["dilated"]
    assert score["deformable"] > score["dilated"] + 0.04
    assert score["dilated"] > score["plain"]
    with torch.no_grad():
        spread = effective_dilation(network[9], network[:9](test_images))[:, 0]
    cell = (centre / 4).round().long().clamp(0, 11)
    spread = spread[torch.arange(256), cell[:, 0], cell[:, 1]]
    assert torch.corrcoef(torch.stack([spread, radius]))[0, 1] > 0.3


# -- what is refused


def test_bad_arguments_are_named():
    for options, text in (
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "-1"),
        ({"groups": 3}, "3 and 1 for 4"),
        ({"offset_groups": 3}, "1 and 3 for 4"),
        ({"mode": "fast"}, "'fast'"),
    ):
        with pytest.raises(ValueError, match=text):
            DeformConv2d(4, 4, 3, **options)
    with pytest.raises(ValueError, match="window of 5 does not fit on 4"):
        DeformConv2d(4, 4, 3, dilation=2)(torch.randn(1, 4, 4, 9))
    with pytest.raises(TypeError, match="Linear"):
        DeformConv2d.from_module(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="uneven"):
        DeformConv2d.from_module(nn.Conv2d(3, 4, 4, padding="same"))
    with pytest.raises(ValueError, match="points must be centres or release"):
        DeformableRoIPool(4, points="middle")
    with pytest.raises(ValueError, match="expected offsets"):
        deformable_roi_pool(torch.randn(1, 4, 5, 5), torch.zeros(2, 5), torch.zeros(2, 2, 3, 3))
    with pytest.raises(ValueError, match="do not divide"):
        deformable_roi_pool(torch.randn(1, 50, 5, 5), torch.zeros(2, 5), position_sensitive=True)
    with pytest.raises(ValueError, match="3 offset_groups do not divide 4"):
        DeformablePSRoIPool(4, 4, offset_groups=3)
    with pytest.raises(ValueError, match="groups must divide"):
        ChannelModulation(6, groups=4)
