"""Sparse shift: loop references, the authors' kernels and FE-Net on copied weights, relatives, sparsity, folding."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.blocks.sparse_shift import (
    FEBlock,
    FENet,
    FoldedShift,
    ShiftClassifier,
    ShiftUnit,
    SparseShift,
    fold_shifts,
    moved_share,
    round_half_away,
    shift_depthwise,
    shift_layers,
    translate,
)
from torchive.methods.blocks.sparse_shift.shift import _by_runs, _follow, _index, runs_of

PORT = "DeadAt0m/ActiveSparseShifts-PyTorch at 218c6beb83956c8be53b07fe7919f6de27cebb74"
REPOSITORY, COMMIT = "hikvision-research/SparseShiftLayer", "7663601061295de6e097baafc2dbb53627b80343"


def layer_of(shift: Tensor, **options) -> SparseShift:
    layer = SparseShift(len(shift), **options)
    layer.shift.data = shift.clone()
    return layer


def at(x: Tensor, n: int, c: int, h: int, w: int) -> float:
    inside = 0 <= h < x.shape[2] and 0 <= w < x.shape[3]
    return x[n, c, h, w].item() if inside else 0.0


# -- the formulas


def reference(x: Tensor, shift: Tensor, step: int) -> Tensor:
    """Forward, number by number; halves are rounded away from zero."""
    y = torch.zeros(*x.shape[:2], -(-x.shape[2] // step), -(-x.shape[3] // step))
    for n, c, h, w in np.ndindex(*y.shape):
        a, b = (math.copysign(math.floor(abs(d) + 0.5), d) for d in shift[c].tolist())
        y[n, c, h, w] = at(x, n, c, step * h + int(a), step * w + int(b))
    return y


def reference_gradients(x: Tensor, shift: Tensor, grad: Tensor, step: int) -> tuple[Tensor, Tensor]:
    dx, dshift = torch.zeros_like(x), torch.zeros_like(shift)
    for n, c, h, w in np.ndindex(*grad.shape):
        g, (a, b) = grad[n, c, h, w].item(), shift[c].tolist()
        i, j = (int(math.copysign(math.floor(abs(d) + 0.5), d)) for d in (a, b))
        if 0 <= step * h + i < x.shape[2] and 0 <= step * w + j < x.shape[3]:
            dx[n, c, step * h + i, step * w + j] += g
        fa, fb = math.floor(a), math.floor(b)
        u, v = a - fa, b - fb
        x00, x01, x10, x11 = (
            at(x, n, c, step * h + fa + p, step * w + fb + q) for p, q in ((0, 0), (0, 1), (1, 0), (1, 1))
        )
        dshift[c, 0] += g * ((1 - v) * (x10 - x00) + v * (x11 - x01))
        dshift[c, 1] += g * ((1 - u) * (x01 - x00) + u * (x11 - x10))
    return dx, dshift


def test_equals_the_loop_reference(double, record):
    worst = 0.0
    for step, shift, size in (
        (1, torch.randn(7, 2) * 1.5, (4, 6)),
        (2, torch.randn(7, 2) * 1.5, (5, 6)),
        (3, torch.randn(5, 2) * 4, (4, 7)),
        (1, torch.tensor([[0.5, -0.5], [1.5, 2.5], [-9.0, 9.0], [0.0, 0.0]]), (3, 4)),
    ):
        layer, x = layer_of(shift, stride=step), torch.randn(2, len(shift), *size, requires_grad=True)
        y = layer(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        with torch.no_grad():
            expected = (reference(x, shift, step), *reference_gradients(x, shift, grad, step))
            found = (y, x.grad, layer.shift.grad)
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(found, expected, strict=True)))
    assert worst < 1e-13
    record("sparse_shift", "referenced", largest_difference=worst, dtype="float64")


# -- the authors' code


def drawer():
    stream = np.random.RandomState(0)
    return lambda *shape: torch.from_numpy(stream.standard_normal(shape))


def test_matches_the_authors_kernels_and_network(double, record, parity):
    """Six layers by their kernel, compiled for the CPU, and FE-Net at half width: all gradients, an optimiser step."""
    stored, draw = parity("sparse_shift"), drawer()
    worst = dict.fromkeys(["output", "gradient", "optimiser_step"], 0.0)

    def meet(kind: str, value: Tensor, name: str) -> None:
        expected = stored[name]
        worst[kind] = max(worst[kind], ((value - expected).abs().max() / expected.abs().max().clamp(min=1)).item())

    halves = torch.tensor([[0.5, -0.5], [1.5, -1.5], [2.5, -2.5], [-0.5, 0], [0, 0.5], [-3.5, 0.25]])
    for case, make, size in (
        ("real", lambda: draw(12, 2) * 1.5, (5, 6)),
        ("whole", lambda: (draw(9, 2) * 1.5).round(), (4, 7)),
        ("far", lambda: draw(8, 2) * 5, (3, 4)),
        ("halves", lambda: halves, (5, 5)),
        ("release_positive", lambda: draw(12, 2).abs() * 1.5, (5, 6)),
        ("release", lambda: draw(12, 2) * 1.5, (5, 6)),
    ):
        layer = layer_of(make())
        x = draw(2, layer.channels, *size).requires_grad_()
        y = layer(x)
        y.backward(draw(*y.shape))
        meet("output", y, f"{case}.y")
        meet("gradient", x.grad, f"{case}.dx")
        if case == "release":  # their kernel as it is: fractions are cut off, which is no floor below zero
            wrong = (layer.shift.grad - stored["release.dshift"]).abs().amax(1) > 1e-9
            fraction = layer.shift.detach() != layer.shift.detach().floor()
            assert not (wrong & ~((layer.shift < 0) & fraction).any(1)).any()
            differs = int(wrong.sum())
            continue
        meet("gradient", layer.shift.grad, f"{case}.dshift")
        torch.optim.SGD(layer.parameters(), lr=0.0625).step()
        meet("optimiser_step", layer(x), f"{case}.next")

    network = FENet(num_classes=5, multiplier=0.5, drop=0.0)
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    for name in sorted(state):
        drawn = draw(*state[name].shape)
        if name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        elif drawn.ndim > 1:
            drawn = drawn if name.endswith("shift") else drawn * (2 / drawn[0].numel()) ** 0.5
        else:
            drawn = drawn * 0.1 + (not name.endswith(("running_mean", "bias")))
        state[name].copy_(drawn)
    x, target = draw(4, 3, 64, 64), torch.tensor([0, 3, 1, 4])
    meet("output", network.eval()(x), "net.eval")
    y = network.train()(x)
    F.cross_entropy(y, target).backward()
    meet("output", y, "net.y")
    meet("gradient", network.stem.weight.grad, "net.dstem")
    for place, unit in ((2, network.blocks[2].units[0]), (4, network.blocks[4].last)):
        meet("gradient", unit.mix.shift.grad[:48], f"net.dshift{place}")
    torch.optim.SGD(network.parameters(), lr=0.0625).step()
    meet("optimiser_step", network(x), "net.next")
    assert max(worst.values()) < 1e-9
    assert differs > 3
    figures = {"largest_difference": max(worst.values()), "relative": True, "layers": 6, "networks": 1, **worst}
    how = "their CUDA kernels compiled for the CPU in float64; five layers and the network with floor for truncation"
    figures["channels_whose_gradient_truncation_spoils"] = f"{differs} of 12"
    record("sparse_shift", "matched", repository=REPOSITORY, commit=COMMIT, port=PORT, how=how, **figures)


def test_matches_the_port_where_it_is_right(double, parity):
    """Its displacements have the other sign, and its active shift reads the fraction the other way again."""
    stored, stream = parity("sparse_shift"), np.random.RandomState(1)
    shift, x, grad = (torch.from_numpy(stream.standard_normal(shape)) for shape in ((6, 2), (2, 6, 5, 7), (2, 6, 5, 7)))
    shift, x = shift * 1.5, x.requires_grad_()
    y = layer_of(-shift)(x)
    y.backward(grad)
    active = layer_of(shift - 2 * shift.floor(), variant="active")(x)
    found = {"sparse.y": y, "sparse.dx": x.grad, "active.y": active}
    assert max((value - stored[f"port.{name}"]).abs().max().item() for name, value in found.items()) < 1e-14


def test_the_releases_grid_has_fractions(parity):
    found, ours = parity("sparse_shift")["grid"], SparseShift(20).shift
    assert (found != found.round()).any()
    assert (ours == ours.round()).all()
    assert torch.equal(ours[18:], torch.zeros(2, 2))
    cells = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert ours[:18].tolist() == [list(map(float, cell)) for cell in cells for _ in range(2)]


# -- special cases


def rolled(x: Tensor, rows: int, columns: int) -> Tensor:
    y = torch.roll(x, (-rows, -columns), (-2, -1))
    height, width = x.shape[-2:]
    h, w = torch.arange(height) + rows, torch.arange(width) + columns
    inside = ((h >= 0) & (h < height))[:, None] & ((w >= 0) & (w < width))
    return y * inside


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whole_steps_are_a_roll_and_a_depthwise_convolution(layout):
    x = torch.randn(2, 9, 7, 6).contiguous(memory_format=layout)
    layer = SparseShift(9)
    y = layer(x)
    for c, (rows, columns) in enumerate(layer.offsets().tolist()):
        assert torch.equal(y[:, c], rolled(x[:, c], rows, columns))
    kernel = torch.zeros(9, 1, 3, 3)
    kernel[range(9), 0, layer.offsets()[:, 0] + 1, layer.offsets()[:, 1] + 1] = 1
    for stride in (1, 2, 3):
        strided = SparseShift(9, stride=stride)
        assert torch.equal(strided(x), F.conv2d(x, kernel, None, stride, 1, 1, 9))
        assert torch.equal(SparseShift(9, stride=stride, variant="grouped")(x), strided(x))
    still = SparseShift(9, start="zero")(x)
    assert torch.equal(still, x)
    with torch.no_grad():
        assert SparseShift(9, start="zero")(x).data_ptr() == x.data_ptr()  # no copy
    assert moved_share(nn.Sequential(SparseShift(9), SparseShift(9, start="zero"))) == 8 / 18


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_runs_and_index_agree(layout, step):
    x = torch.randn(2, 12, 5, 8).contiguous(memory_format=layout)
    for offset in (torch.randint(-2, 3, (12, 2)), torch.randint(-9, 10, (12, 2)), torch.zeros(12, 2).long()):
        for size in ((5, 8), (3, 4), (7, 2)):
            first = _by_runs(x, list(runs_of(offset)), size, step)
            second = _follow(x, _index(x, offset, size, step), size, step)
            assert torch.equal(first, second)
            assert first.is_contiguous(memory_format=layout)
            assert second.is_contiguous(memory_format=layout)
    x[:, :, 0, 0] = float("nan")
    assert not translate(x, torch.full((12, 2), 9)).any()


def test_a_kept_plan_follows_displacements_and_sides():
    layer, x = SparseShift(9).eval(), torch.randn(2, 9, 6, 5)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.shift.data.fill_(1),
            lambda: layer.shift.data.copy_(torch.ones(9, 2)),
        ):
            change()
            for images in (x, x[:, :, :4], x.to(memory_format=torch.channels_last)):
                assert torch.equal(layer(images), translate(images, layer.offsets()))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_rounding_goes_away_from_zero():
    x = torch.tensor([-2.5, -1.5, -0.5, -0.49999997, 0.0, 0.49999997, 0.5, 1.5, 2.5, 3.2])
    assert round_half_away(x).tolist() == [-3, -2, -1, 0, 0, 0, 1, 2, 3, 3]


def test_active_shift_passes_gradcheck(double):
    for stride in (1, 2):
        layer = layer_of(torch.randn(5, 2) * 2, variant="active", stride=stride)
        x = torch.randn(2, 5, 5, 4, requires_grad=True)

        def run(x: Tensor, shift: Tensor, layer: SparseShift = layer) -> Tensor:
            return torch.func.functional_call(layer, {"shift": shift}, (x,))

        assert torch.autograd.gradcheck(run, (x, layer.shift.detach().requires_grad_()))


def test_active_shift_is_a_depthwise_convolution_of_four_taps(double):
    x = torch.randn(1, 4, 6, 7)
    layer = layer_of(torch.rand(4, 2), variant="active")
    u, v = layer.shift.detach().unbind(1)
    kernel = torch.stack([(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v], 1).view(4, 1, 2, 2)
    assert torch.allclose(layer(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), kernel, groups=4))
    whole = torch.randint(-2, 3, (4, 2)).double()
    assert torch.equal(layer_of(whole, variant="active")(x), layer_of(whole)(x))


def test_sparse_shift_learns_as_active_shift_does(double):
    shift, x = torch.randn(6, 2) * 2, torch.randn(3, 6, 5, 6)
    layers = [layer_of(shift, variant=variant) for variant in ("sparse", "active")]
    grad = torch.randn(3, 6, 5, 6)
    for layer in layers:
        layer(x).backward(grad)
    assert torch.allclose(layers[0].shift.grad, layers[1].shift.grad)
    assert not torch.allclose(layers[0](x), layers[1](x))


def smooth(count: int, channels: int) -> Tensor:
    x = torch.randn(count, channels, 24, 24)
    for _ in range(6):
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1)
    return x / x.std()


def test_known_translations_are_learnt():
    """Each channel's own translation, of up to two pixels, is found to half a pixel, and rounded exactly."""
    true = torch.tensor([[-2, 0], [2, 1], [0, -2], [1, -1], [-1, 2], [0, 0], [2, -2], [-2, -1]])
    layer = SparseShift(8, start="zero")
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(120):
        x = smooth(8, 8)
        optimiser.zero_grad()
        (layer(x) - translate(x, true))[:, :, 3:-3, 3:-3].square().mean().backward()
        optimiser.step()
    assert (layer.shift - true).abs().max() < 0.5 + 1e-6
    assert torch.equal(layer.offsets(), true)


@pytest.mark.parametrize("variant", ["sparse", "active"])
@pytest.mark.parametrize("needed", [False, True])
def test_compiles_whole(variant, needed):
    """Without a break in the graph, also as a first layer, whose input has no gradient."""
    torch.compiler.reset()
    layer = SparseShift(9, variant=variant, start="uniform", stride=2)
    x = torch.randn(2, 9, 7, 6, requires_grad=needed)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for run in (layer, compiled):
        y = run(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [layer.shift, x][: 1 + needed])))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_bad_arguments_are_named():
    for options, said in (
        ({"channels": 0}, "0"),
        ({"channels": 4, "kernel_size": 4}, "odd"),
        ({"channels": 4, "variant": "still"}, "still"),
        ({"channels": 4, "start": "far"}, "far"),
        ({"channels": 4, "variant": "grouped", "start": "uniform"}, "grouped"),
    ):
        with pytest.raises(ValueError, match=said):
            SparseShift(**options)
    with pytest.raises(TypeError, match="Linear"):
        SparseShift.from_module(nn.Linear(2, 2))
    for plain in (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 2, groups=4)):
        with pytest.raises(ValueError, match="depthwise"):
            SparseShift.from_module(plain)
    with pytest.raises(ValueError, match="equal ends"):
        ShiftUnit(4, 8, residual=True)
    with pytest.raises(ValueError, match="multiple of 8 channels, got 12"):
        FEBlock(12, 12)
    with pytest.raises(ValueError, match="got 15"):
        FENet(multiplier=0.95)
    with pytest.raises(ValueError, match="32 pixels"):
        FENet(multiplier=0.25)(torch.zeros(1, 3, 24, 40))
    with pytest.raises(ValueError, match=r"1\.5"):
        ShiftClassifier(FENet(multiplier=0.25), freeze_after=1.5)


# -- sparsity and freezing


def train(
    penalty: float, steps: int = 60, freeze_after: float = 1.0, **options
) -> tuple[ShiftClassifier, list[Tensor]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 18, 1), SparseShift(18, **options), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    system = ShiftClassifier(nn.Sequential(network, nn.Linear(18, 3)), penalty=penalty, freeze_after=freeze_after)
    images, classes, seen = torch.randn(6, 3, 8, 8), torch.arange(6) % 3, []
    optimiser = torch.optim.AdamW(system.parameters(), lr=0.05, weight_decay=0.1)
    for step in range(steps):
        system.before_step(step / steps)
        optimiser.zero_grad()
        torch.stack(list(system.losses(images, classes).values())).sum().backward()
        optimiser.step()
        seen.append(next(shift_layers(system)).shift.detach().clone())
    return system, seen


def test_the_penalty_makes_shifts_sparse():
    shares = [moved_share(train(penalty, start="uniform", kernel_size=5)[0]) for penalty in (0.0, 1e-3, 1e-1)]
    assert shares[0] > 0.5
    assert shares[2] == 0
    assert shares[0] >= shares[1] >= shares[2]
    system, _ = train(0.01, steps=1)
    layer = next(shift_layers(system))
    losses = system.losses(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    assert math.isclose(losses["sparsity"].item(), 0.01 * layer.shift.abs().sum().item(), rel_tol=1e-6)
    layer.frozen = True
    assert set(system.losses(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))) == {"loss"}


def test_the_second_half_leaves_shifts_where_they_are():
    system, seen = train(1e-3, steps=20, freeze_after=0.5)
    assert not torch.equal(seen[0], seen[9])
    assert all(torch.equal(shift, seen[9]) for shift in seen[9:])
    assert next(shift_layers(system)).shift.grad is None


def test_decay_and_rate_are_the_displacements_own():
    network = FENet(multiplier=0.25, options={"rate": 10.0, "decay": 4e-5})
    assert all(
        layer.parameter_rules() == {"shift": {"lr": 10.0, "weight_decay": 4e-5}} for layer in shift_layers(network)
    )
    assert not SparseShift(9, variant="grouped").parameter_rules()
    assert not list(SparseShift(9, variant="grouped").parameters())


# -- networks


def cost(network: nn.Module) -> tuple[float, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, 224, 224))
    return round(counter.get_total_flops() / 2e6, 1), sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("multiplier", "expanded", "mega", "parameters"),
    [(1.0, "output", 417.9, 4623408), (1.375, "output", 773.2, 6745470), (1.375, "input", 563.7, 6002486)],
)
def test_fe_net_costs(multiplier, expanded, mega, parameters):
    """Expanding the input's channels gives the abstract's 563 M; the release expands the output's."""
    with torch.device("meta"):
        assert cost(FENet(multiplier=multiplier, expanded=expanded)) == (mega, parameters)


def test_all_mixings_and_downsamplings_train():
    for mixing in ("sparse", "active", "grouped", "depthwise"):
        for downsampling in ("pool", "shift"):
            network = FENet(num_classes=3, multiplier=0.25, mixing=mixing, downsampling=downsampling, feature_dim=16)
            network(torch.randn(2, 3, 64, 64)).square().mean().backward()
            assert all(p.grad is not None for p in network.parameters())
    with pytest.raises(ValueError, match="still"):
        FENet(mixing="still")


def test_a_block_lets_channels_pass():
    """Before its last unit the first half of the channels is as it came in."""
    block, seen = FEBlock(16, 16, units=4, expansion=2).eval(), []
    block.last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 16, 6, 6)
    block(x)
    assert torch.equal(seen[0][:, :8], x[:, :8])
    assert not torch.equal(seen[0][:, 8:], x[:, 8:])
    assert [unit.expand.in_channels for unit in block.units] == [2, 4, 8]


@pytest.mark.parametrize("downsampling", ["pool", "shift"])
def test_folding_changes_nothing(double, downsampling):
    network = FENet(num_classes=3, multiplier=0.25, downsampling=downsampling, feature_dim=16)
    for layer in shift_layers(network):
        nn.init.uniform_(layer.shift, -3, 3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    with pytest.raises(ValueError, match="in training"):
        fold_shifts(network)
    network.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        assert torch.allclose(fold_shifts(network)(x), expected, atol=1e-12)
    assert not list(shift_layers(network))
    assert any(isinstance(module, FoldedShift) for module in network.modules())
    with pytest.raises(ValueError, match="no unit"):
        fold_shifts(network)


def test_depthwise_convolutions_become_shifts():
    network = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    original, x = copy.deepcopy(network), torch.randn(2, 3, 64, 64)
    before = sum(p.numel() for p in network.parameters())
    report = convert(network, "sparse_shift")
    depthwise = [m for m in original.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert len(report.changes) == len(depthwise) == 11
    saved = sum(m.weight.numel() - 2 * m.in_channels for m in depthwise)
    assert sum(p.numel() for p in network.parameters()) == before - saved
    assert network(x).shape == (2, 3)
    assert moved_share(network) > 0.8
    report.undo()
    assert torch.equal(network(x), original(x))
    report = convert(network, "sparse_shift", "blocks.1.*", variant="active", start="uniform", rate=10.0, decay=4e-5)
    assert {(m.variant, m.rate, m.decay) for m in shift_layers(network)} == {("active", 10.0, 4e-5)}
    report.undo()
    with pytest.raises(ConversionError, match="'still'"):
        convert(network, "sparse_shift", variant="still")
    grouped = shift_depthwise(network, variant="grouped", matches=lambda name: name.startswith("blocks.1"))
    assert {name[:8] for name, _, _ in grouped.changed} == {"blocks.1"}
    with pytest.raises(ConversionError, match="no depthwise convolution"):
        convert(timm.create_model("resnet18"), "sparse_shift")
    with pytest.raises(ValueError, match="no shift layer"):
        moved_share(nn.Linear(2, 2))


@pytest.mark.slow
def test_exports_whole(tmp_path):
    from torchive.engine.export import OnnxModel, gap_to_torch, write_onnx

    block = FEBlock(8, 12, units=3, expansion=2, downsampling="shift")
    network = nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    for layer in shift_layers(network):
        nn.init.uniform_(layer.shift, -3, 3)
    x = torch.randn(3, 3, 16, 16)
    structure = write_onnx(network, x[:2], tmp_path / "model.onnx", dynamic=(0,))
    assert gap_to_torch(network, OnnxModel(tmp_path / "model.onnx", structure), x) < 1e-4
