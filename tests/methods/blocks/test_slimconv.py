"""SlimConv: a loop reference, the authors' layers and network on copied weights, the gate's special cases, costs."""

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
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.resnet import Bottleneck, ResNet

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.blocks.slimconv import SlimConv, fold_channels, slim, slim_resnet

REPOSITORY, COMMIT = "JiaxiongQ/SlimConv", "da81d832505e1a2037f88c286988f769cbad6cf4"
# channels, stride, groups, dilation, height, width
CASES = {
    "plain": (32, 1, 1, 1, 5, 6),
    "strided": (64, 2, 1, 1, 7, 6),
    "dilated": (32, 1, 1, 2, 7, 5),
    "groups": (64, 2, 4, 1, 5, 5),
    "strided_dilated": (32, 2, 2, 2, 8, 7),
}


def operations(network: nn.Module, side: int = 224) -> int:
    """Multiply-adds for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2


# -- the formulas


def normed(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm by running statistics."""
    y = torch.zeros_like(x)
    for c in range(x.shape[1]):
        deviation = math.sqrt(norm.running_var[c].item() + norm.eps)
        y[:, c] = (x[:, c] - norm.running_mean[c]) / deviation * norm.weight[c] + norm.bias[c]
    return y


def convolved(x: Tensor, conv: nn.Conv2d) -> Tensor:
    (step, _), (pad, _), (gap, _) = conv.stride, conv.padding, conv.dilation
    reach = gap * (conv.kernel_size[0] - 1)
    sides = [(side + 2 * pad - reach - 1) // step + 1 for side in x.shape[2:]]
    y = torch.zeros(len(x), conv.out_channels, *sides)
    per_in, per_out = conv.in_channels // conv.groups, conv.out_channels // conv.groups
    weight = conv.weight.detach()
    for n, o, h, w in np.ndindex(*y.shape):
        total = 0.0 if conv.bias is None else conv.bias[o].item()
        for c, i, j in np.ndindex(*weight.shape[1:]):
            row, column = h * step - pad + i * gap, w * step - pad + j * gap
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                total += weight[o, c, i, j].item() * x[n, o // per_out * per_in + c, row, column].item()
        y[n, o, h, w] = total
    return y


def reference(layer: SlimConv, x: Tensor) -> Tensor:
    """The layer in evaluation, number by number."""
    n, channels, folds = len(x), layer.channels, layer.folds
    means = torch.tensor([[[[x[i, c].sum().item() / x[i, c].numel()]] for c in range(channels)] for i in range(n)])
    hidden = normed(convolved(means, layer.gate[0]), layer.gate[1]).clamp(min=0)
    logits = convolved(hidden, layer.gate[3])
    run = channels // folds
    top, bottom = torch.zeros(n, run, *x.shape[2:]), torch.zeros(n, run, *x.shape[2:])
    for i, c in np.ndindex(n, channels):
        own, flipped = (1 / (1 + math.exp(-logits[i, k].item())) for k in (c, channels - 1 - c))
        top[i, c % run] += own * x[i, c]
        bottom[i, c % run] += flipped * x[i, c]
    upper = normed(convolved(top, layer.upper[0]), layer.upper[1])
    squeezed = normed(convolved(bottom, layer.lower[0]), layer.lower[1]).clamp(min=0)
    return torch.cat([upper, normed(convolved(squeezed, layer.lower[3]), layer.lower[4])], 1)


def shaken(layer: nn.Module) -> nn.Module:
    """Statistics and weights away from their start."""
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return layer.eval()


def test_equals_the_loop_reference(double, record):
    worst = 0.0
    for options in (
        {"channels": 8},
        {"channels": 8, "stride": 2, "groups": 2},
        {"channels": 12, "folds": 3, "dilation": 2, "groups": 4, "lower_groups": 2},
        {"channels": 16, "folds": 4, "stride": 2, "dilation": 2},
    ):
        layer = shaken(SlimConv(**options, reduction=4))
        x = torch.randn(2, options["channels"], 5, 6)
        with torch.no_grad():
            worst = max(worst, (layer(x) - reference(layer, x)).abs().max().item())
    assert worst < 1e-13
    record("slimconv", "referenced", largest_difference=worst, dtype="float64")


# -- the authors' code


def fill(module: nn.Module, draw) -> None:
    """Weights as the authors' modules had them, by the order of the names."""
    state = {name: v for name, v in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    for name in sorted(state):
        drawn = draw(*state[name].shape)
        if drawn.ndim > 1:
            drawn = drawn * (2 / drawn[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            drawn = drawn.abs() + 0.5
        else:
            drawn = drawn * 0.1 + (not name.endswith(("running_mean", "bias")))
        state[name].copy_(drawn)


def test_matches_the_authors_layers_and_network(double, record, parity):
    """Five layers, and an Sc-ResNeXt of a bottleneck a stage: evaluation, training, gradients, an optimiser step."""
    stored, worst = parity("slimconv"), dict.fromkeys(["output", "gradient", "optimiser_step"], 0.0)
    stream = np.random.RandomState(0)

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(stream.standard_normal(shape))

    def meet(kind: str, value: Tensor, name: str) -> None:
        expected = stored[name]
        gap = (value - expected).abs().max() / expected.abs().max()
        worst[kind] = max(worst[kind], gap.item())

    for case, (channels, stride, groups, dilation, height, width) in CASES.items():
        layer = SlimConv(channels, stride=stride, groups=groups, dilation=dilation)
        fill(layer, draw)
        x = draw(3, channels, height, width).requires_grad_()
        meet("output", layer.eval()(x)[:1], f"{case}.eval")
        y = layer.train()(x)
        y.backward(draw(*y.shape))
        meet("output", y[:2], f"{case}.y")
        meet("gradient", x.grad[1:2], f"{case}.dx")
        meet("gradient", layer.gate[0].weight.grad.flatten(), f"{case}.dgate")
        meet("gradient", layer.lower[0].weight.grad[:2].flatten(), f"{case}.dlower")
        torch.optim.SGD(layer.parameters(), lr=0.0625).step()
        meet("optimiser_step", layer(x)[:1], f"{case}.next")

    network = slim_resnet((1, 1, 1, 1), num_classes=5, groups=2, width_per_group=32)
    names = [name for name, _ in network.named_modules() if name.endswith("bn2")]
    assert all(isinstance(network.get_submodule(name), nn.Identity) for name in names)
    fill(network, draw)
    x, target = draw(4, 3, 64, 64), torch.tensor([0, 3, 1, 4])
    meet("output", network.eval()(x), "net.eval")
    y = network.train()(x)
    F.cross_entropy(y, target).backward()
    meet("output", y, "net.y")
    meet("gradient", network.conv1.weight.grad[:2], "net.dstem")
    meet("gradient", network.layer2[0].conv2.gate[3].weight.grad.flatten(), "net.dgate")
    torch.optim.SGD(network.parameters(), lr=0.0625).step()
    meet("optimiser_step", network(x), "net.next")
    assert max(worst.values()) < 1e-10
    figures = {"largest_difference": max(worst.values()), "relative": True, "layers": len(CASES), "networks": 1}
    record("slimconv", "matched", repository=REPOSITORY, commit=COMMIT, **figures, **worst)


# -- the gate


def opened(layer: SlimConv, weight: Tensor) -> SlimConv:
    """A layer whose gate gives these weights for every image."""
    nn.init.zeros_(layer.gate[3].weight)
    layer.gate[3].bias.data = torch.logit(weight)
    return layer


@pytest.mark.parametrize("weight", [torch.full((8,), 0.5), torch.tensor([0.1, 0.3, 0.7, 0.9, 0.9, 0.7, 0.3, 0.1])])
def test_constant_and_palindromic_gates_give_both_paths_the_same(weight):
    layer = opened(SlimConv(8, reduction=4).eval(), weight)
    seen = []
    for path in (layer.upper, layer.lower):
        path.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 8, 5, 5)
    layer(x)
    assert torch.allclose(*seen)
    assert torch.allclose(seen[0], (weight[:, None, None] * x).unflatten(1, (2, 4)).sum(1), atol=1e-6)
    lop = opened(layer, weight * torch.linspace(0.5, 1, 8))
    seen.clear()
    lop(x)
    assert not torch.allclose(*seen)


def test_flipping_swaps_the_paths_inputs():
    """Flipping is an involution: with a flipped gate, top becomes what bottom was."""
    weight, x = torch.rand(2, 12, 1, 1), torch.randn(2, 12, 4, 3)
    for folds in (1, 2, 3):
        top, bottom = fold_channels(x, weight, folds), fold_channels(x, weight.flip(1), folds)
        assert torch.equal(fold_channels(x, weight.flip(1).flip(1), folds), top)
        assert top.shape == (2, 12 // folds, 4, 3)
        assert not torch.allclose(top, bottom)
    assert torch.equal(fold_channels(x, weight, 1), weight * x)


def test_the_gate_learns_from_both_paths(double):
    """Its gradient is the sum of what each path alone gives it, and neither is zero."""
    layer, x = SlimConv(8, reduction=4), torch.randn(3, 8, 5, 5)
    grads = []
    for parts in ((0, 1), (0,), (1,)):
        layer.zero_grad()
        y = layer(x).split([4, 2], 1)
        sum(y[i].pow(3).sum() for i in parts).backward()
        grads.append(layer.gate[3].weight.grad.clone())
    assert all(grad.abs().max() > 1e-6 for grad in grads)
    assert torch.allclose(grads[0], grads[1] + grads[2])


# -- shapes and arguments


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("folds", [2, 3, 4])
def test_shapes_are_those_of_a_plain_convolution(stride, dilation, folds):
    plain = nn.Conv2d(48, 48, 3, stride=stride, padding=dilation, dilation=dilation, groups=2)
    layer = SlimConv.from_module(plain, folds=folds).eval()
    x = torch.randn(1, 48, 11, 8)
    assert layer(x).shape[2:] == plain(x).shape[2:]
    assert layer(x).shape[1] == layer.out_channels == 48 * 3 // (2 * folds)  # C / k
    assert layer.upper[0].groups == layer.lower[3].groups == 2


def test_layer_norm_takes_a_batch_of_one():
    x = torch.randn(1, 8, 5, 5)
    with pytest.raises(ValueError, match='batch of 2 or more, got 1; gate_norm="layer" takes it'):
        SlimConv(8, reduction=4)(x)
    assert SlimConv(8).eval()(x).shape == (1, 6, 5, 5)
    narrow = SlimConv(8, gate_norm="layer")  # with a norm over one number the gate would not see its input
    other = narrow(torch.cat([x, torch.randn(1, 8, 5, 5)]))
    assert narrow.gate[0].out_channels == 2
    assert other.shape == (2, 6, 5, 5)
    layer = SlimConv(8, reduction=4, gate_norm="layer")
    many = torch.cat([x, torch.randn(3, 8, 5, 5)])
    weights = [layer.gate(images.mean((2, 3), keepdim=True)) for images in (x, many)]
    assert torch.allclose(weights[0], weights[1][:1], atol=1e-6)
    layer(x).sum().backward()


def test_weights_start_as_the_release_says():
    layer = SlimConv(256)
    conv = layer.upper[0]
    assert math.isclose(conv.weight.std().item(), (2 / (9 * 128)) ** 0.5, rel_tol=0.02)  # fan out
    norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 4
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


def test_bad_arguments_are_named():
    for options, said in (
        ({"channels": 10}, "multiple of 4 for 2 folds, got 10"),
        ({"channels": 8, "folds": 3}, "multiple of 6"),
        ({"channels": 0}, "0"),
        ({"channels": 8, "groups": 3}, "3 and 3 groups"),
        ({"channels": 8, "gate_norm": "none"}, "none"),
    ):
        with pytest.raises(ValueError, match=said):
            SlimConv(**options)
    with pytest.raises(ValueError, match=r"expected \(N, 8, H, W\)"):
        SlimConv(8)(torch.zeros(1, 4, 5, 5))
    with pytest.raises(TypeError, match="Linear"):
        SlimConv.from_module(nn.Linear(8, 8))
    for plain in (nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 5, padding=2)):
        with pytest.raises(ValueError, match="3x3"):
            SlimConv.from_module(plain)


# -- whole networks


@pytest.mark.parametrize(
    ("options", "mega", "giga"),
    [
        ({}, 16.76, 2.65),
        ({"folds": 4}, 12.10, 1.88),
        ({"layers": (4, 8, 18, 3), "folds": 3, "lower_groups": 16, "groups": 32, "width_per_group": 3}, 23.70, 4.58),
    ],
)
def test_networks_cost_what_the_release_says(options, mega, giga):
    """Sc-ResNet-50 of k = 4/3 and 8/3 and Sc-ResNeXt-101 (32x3d, k = 2), to every digit of the README."""
    with torch.device("meta"):
        network = slim_resnet(**options)
        found = operations(network)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == mega
    assert round(found / 1e9, 2) == giga


@pytest.mark.parametrize("name", ["resnet18", "resnet26", "seresnet18", "resnext26ts", "vovnet39a"])
def test_networks_train_at_any_size(name):
    network = timm.create_model(name, num_classes=3)
    before = sum(p.numel() for p in network.parameters())
    slim(network)
    assert sum(p.numel() for p in network.parameters()) < before
    network(torch.randn(2, 3, 75, 66)).square().mean().backward()
    dead = [key for key, p in network.named_parameters() if p.grad is None]
    assert not dead


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("densenet121", "128 channels become 32"),
        ("seresnet33ts", "its map does not go into one other convolution alone"),
        ("mobilenetv2_050", "it is depthwise"),
    ],
)
def test_places_without_room_are_left_alone(name, said):
    report = slim(timm.create_model(name, num_classes=3))
    assert not report.changed
    assert said in {reason for _, reason in report.left_alone}


def test_a_map_that_the_network_gives_keeps_its_channels():
    """RetinaNet's P6 is read by P7 alone, but it is a level of the pyramid, too."""
    network = retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone.eval()
    x = torch.randn(1, 3, 64, 64)
    shapes = [level.shape for level in network(x).values()]
    report = slim(network)
    assert [level.shape for level in network(x).values()] == shapes
    assert ("fpn.extra_blocks.p6", "its map does not go into one other convolution alone") in report.left_alone
    assert len(report.changed) == 16


def test_the_rest_of_the_network_is_kept_and_undo_restores_it():
    network = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3).eval()
    original, x = copy.deepcopy(network), torch.randn(2, 3, 64, 64)
    report = convert(network, "slimconv", where="layer[12].*", folds=4)
    assert [change.name for change in report.changes] == ["layer1.0.conv2", "layer2.0.conv2"]
    assert "layer1.0.conv2  Conv2d -> SlimConv (64 channels)" in str(report)
    kept = original.layer1[0].conv3.weight[:, :24]
    assert torch.equal(network.layer1[0].conv3.weight, kept)
    assert isinstance(network.layer1[0].bn2, nn.Identity)
    assert isinstance(network.layer3[0].bn2, nn.BatchNorm2d)
    assert network(x).shape == (2, 3)
    report.undo()
    assert torch.equal(network(x), original(x))
    for options in ({"folds": 0}, {"gate_norm": "group"}, {"reduction": 0}):
        with pytest.raises(ConversionError, match=f"^slimconv: .*{next(iter(options.values()))}"):
            convert(network, "slimconv", **options)
    with pytest.raises(ConversionError, match="it takes folds, lower_groups, reduction, gate_norm"):
        convert(network, "slimconv", k=2)
    with pytest.raises(ConversionError, match="it is depthwise"):
        convert(timm.create_model("mobilenetv3_small_050"), "slimconv")
    assert torch.equal(network(x), original(x))


@pytest.mark.slow
def test_exports_whole(tmp_path):
    from torchive.engine.export import OnnxModel, gap_to_torch, write_onnx

    network = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, [1] * 4, 3, channels=(8, 16, 32, 32))
    slim(network)
    network.eval()
    x = torch.randn(3, 3, 64, 64)
    structure = write_onnx(network, x[:2], tmp_path / "model.onnx", dynamic=(0,))
    assert gap_to_torch(network, OnnxModel(tmp_path / "model.onnx", structure), x) < 1e-4
