"""Inception-v4 and Inception-ResNet: branches by hand, the releases and timm on copied weights, lineage, stability."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from torchive.methods.backbones.inception_v4 import (
    LINEAGE,
    Branches,
    Inception,
    ResidualBranches,
    lineage_module,
    load_timm,
)
from torchive.nn import PooledNetwork
from torchive.nn.auxiliary import AuxiliaryClassifier, AuxiliaryHead

#: The authors' TensorFlow files as kept in a copy of research/slim, and a port of Inception-ResNet-v1.
REPOSITORY, COMMIT = (
    "tensorflow/models (research/slim, copy in lizhaoliu-Lec/slim)",
    "63cfbdc0eb81e7f24f357d1442d051cd8dc73f3b",
)
PORT, PORT_COMMIT = "timesler/facenet-pytorch", "787da06156087cd6b616fe6608213722bddc30cd"


def formula(shape: object, phase: float, scale: float) -> Tensor:
    """The numbers that the releases' variables and inputs were filled with."""
    i = (torch.arange(torch.Size(shape).numel()) % 10007).double()  # type: ignore[arg-type]
    return (scale * (1.7 * i + phase + 0.011 * i * i).sin()).reshape(tuple(shape))  # type: ignore[arg-type]


def fill(network: nn.Module, *, norm_weights: bool) -> None:
    """The release's values in its order; without ``norm_weights`` batch norms have no scale, as in TensorFlow."""
    i = 0
    for name, t in network.state_dict().items():
        norm_weight = t.ndim == 1 and name.endswith(".1.weight")
        if name.endswith("tracked"):
            continue
        if norm_weight and not norm_weights:
            t.fill_(1)
            continue
        if t.ndim == 4:
            t.copy_(formula(t.shape, 0.3 * i, (2 / t[0].numel()) ** 0.5))
        elif name.endswith("running_var"):
            t.copy_(1 + formula(t.shape, 0.3 * i, 0.3))
        elif norm_weight:
            t.copy_(1 + formula(t.shape, 0.3 * i, 0.2))
        else:
            t.copy_(formula(t.shape, 0.3 * i, 0.1))
        i += 1


@pytest.mark.parametrize("variant", ["inception_v4", "inception_resnet_v1", "inception_resnet_v2"])
def test_equals_the_release(double, record, parity, variant):
    """The whole network of 20 to 54 million parameters at 75 pixels: inner maps, gradients, and a step of descent."""
    stored = {k.partition(":")[2]: v for k, v in parity("inception_v4").items() if k.startswith(variant + ":")}
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}

    def note(key: str, found: Tensor, name: str) -> None:
        expected = stored[name]
        worst[key] = max(worst[key], ((found - expected).abs().max() / expected.abs().max()).item())

    with torch.device("meta"):
        network = Inception(variant)
    network.to_empty(device="cpu").eval()
    tensorflow = variant != "inception_resnet_v1"
    fill(network, norm_weights=not tensorflow)
    x = formula([2, 3, 75, 75], 0.1, 1.0).requires_grad_()
    maps = network(x)
    y = maps[-1]
    (y * formula(y.shape, 0.5, 1.0)).mean().backward()
    note("output", y[:, :, 0, 0] if tensorflow else y[0, :, 0, 0], "y")
    if variant == "inception_v4":
        note("output", maps[2][0, ::32], "Mixed_5e")
        note("output", maps[3][0, ::8], "Mixed_6h")
    if variant == "inception_resnet_v2":
        note("output", maps[3][0, ::8], "PreAuxLogits")
    note("gradient", x.grad[0, :, ::5, ::5], "dx")
    parameters = dict(network.named_parameters())
    note("gradient", next(iter(parameters.values())).grad[:8], "g0")
    if tensorflow:
        last = list(parameters.values())[-1]
        note("gradient", last.grad, "g1")
        trained = [p for n, p in parameters.items() if not (p.ndim == 1 and n.endswith(".1.weight"))]
    else:
        trained = list(parameters.values())
    torch.optim.SGD(
        trained, lr={"inception_v4": 20.0, "inception_resnet_v1": 1.0, "inception_resnet_v2": 0.05}[variant]
    ).step()
    with torch.no_grad():
        y = network(x)[-1][..., 0, 0]
        note("optimiser_step", y if tensorflow else y[0], "next")
    largest = max(worst.values())
    assert largest < 1e-9, worst
    if variant == "inception_v4":
        record(
            "inception_v4",
            "matched",
            repository=REPOSITORY,
            commit=COMMIT,
            largest_difference=largest,
            also=f"inception_resnet_v2 of the same; inception_resnet_v1 of {PORT}, {PORT_COMMIT}",
            differences="relative to the largest value",
            **worst,
        )


@pytest.mark.parametrize("variant", ["inception_v4", "inception_resnet_v2"])
def test_is_timms_network(variant):
    """timm's weights load, and give timm's logits and parameter counts."""
    classifier = timm.create_model(variant).eval()
    for part in classifier.modules():  # away from the start, where the signal dies without batch statistics
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 1.0, 2.0)
            nn.init.normal_(part.bias)
    network = load_timm(Inception(variant), classifier.state_dict()).eval()
    x = torch.randn(1, 3, 107, 91)
    with torch.no_grad():
        expected = classifier.forward_features(x)
        assert (network(x)[-1] - expected).abs().max() <= 1e-5 * expected.abs().max()
    with torch.device("meta"):
        count = sum(p.numel() for p in PooledNetwork(Inception(variant)).parameters())
    assert count == sum(p.numel() for p in classifier.parameters())
    assert count == {"inception_v4": 42_679_816, "inception_resnet_v2": 55_843_464}[variant]
    with pytest.raises(ValueError, match="expected"):
        load_timm(Inception(variant, layers=[1, 1, 1]), classifier.state_dict())


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution of one image, as sums of shifted products."""
    (top, left), (step, _), weight = conv.padding, conv.stride, conv.weight.detach()
    padded = nn.functional.pad(x, (left, left, top, top))
    _, _, kh, kw = weight.shape
    rows, columns = (padded.shape[2] - kh) // step + 1, (padded.shape[3] - kw) // step + 1
    y = torch.zeros(len(x), len(weight), rows, columns)
    for o in range(len(weight)):
        for i in range(rows):
            for j in range(columns):
                window = padded[:, :, i * step : i * step + kh, j * step : j * step + kw]
                y[:, o, i, j] = (window * weight[o]).sum((1, 2, 3))
    return y if conv.bias is None else y + conv.bias.detach()[:, None, None]


def unit(x: Tensor, layer: nn.Module) -> Tensor:
    """Convolution, batch norm of evaluation and ReLU, or a pool that leaves the border out of its mean."""
    if isinstance(layer, nn.AvgPool2d):
        y = torch.zeros_like(x)
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                y[:, :, i, j] = x[:, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((2, 3))
        return y
    conv, norm = layer[0], layer[1]
    y = convolve(x, conv)
    normed = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-3).sqrt()
    return (normed * norm.weight[:, None, None] + norm.bias[:, None, None]).detach().clamp(min=0)


def shaken(module: nn.Module) -> nn.Module:
    fill(module, norm_weights=True)
    return module.eval()


def test_equations_by_hand(double, record):
    """A block with a pool and a fork, and a residual block, written out."""
    x = torch.randn(1, 3, 5, 6)
    block = shaken(Branches(3, ["1x1:2", "1x1:2 1x3:3|3x1:2", "avg 1x1:2"]))
    one, two, three = block.branches
    inner = unit(x, two[0])
    expected = [unit(x, one), *(unit(inner, side) for side in two[1].branches), unit(unit(x, three[0]), three[1])]
    worst = (block(x) - torch.cat(expected, 1)).abs().max().item()
    assert block.out_channels == 9
    residual = shaken(ResidualBranches(3, ["1x1:2", "1x1:2 1x7:2 7x1:3"], residual_scale=0.17))
    one, two = residual.branches.branches
    inner = x
    for layer in two:
        inner = unit(inner, layer)
    joined = convolve(torch.cat([unit(x, one), inner], 1), residual.linear)
    worst = max(worst, (residual(x) - (x + 0.17 * joined).clamp(min=0)).abs().max().item())
    assert worst < 1e-13
    record("inception_v4", "referenced", largest_difference=worst, dtype="float64")


def test_scale_zero_is_relu():
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(ResidualBranches(8, ["1x1:4"], residual_scale=0.0)(x), x.relu())
    last = ResidualBranches(8, ["1x1:4"], residual_scale=0.0, act=False)
    assert torch.equal(last(x), x)


def test_unscaled_residuals_swell_and_pass_on_larger_gradients():
    """What the scales are for, at the start of training: spread over the blocks A, gradient of the first layer."""
    found = []
    for scale in (None, 1.0):
        torch.manual_seed(0)
        network = Inception(
            "inception_resnet_v2", multiplier=0.25, layers=[10, 5, 2], residual_scale=scale, padding="same"
        )
        spread: list[Tensor] = []
        blocks = [m for m in network.stages[2].modules() if isinstance(m, ResidualBranches)]
        blocks[0].register_forward_pre_hook(lambda _, inputs, spread=spread: spread.append(inputs[0].std()))
        blocks[-1].register_forward_hook(lambda _, inputs, y, spread=spread: spread.append(y.std()))
        network(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
        gradient = next(network.parameters()).grad.norm()
        found.append((float(spread[1] / spread[0]), float(gradient)))
    scaled, plain = found
    assert 0.9 < scaled[0] < 1.1
    assert plain[0] > 1.4
    assert plain[1] > 2 * scaled[1]


def test_factorisation(double):
    """An outer product 7x7 is 7x1 then 1x7; two 3x3 see 5x5 pixels."""
    column, row = torch.randn(7), torch.randn(7)
    x = torch.randn(1, 1, 11, 12)
    whole = nn.functional.conv2d(x, (column[:, None] * row)[None, None], padding=3)
    split = nn.functional.conv2d(
        nn.functional.conv2d(x, column.view(1, 1, 7, 1), padding=(3, 0)), row.view(1, 1, 1, 7), padding=(0, 3)
    )
    assert (whole - split).abs().max() < 1e-12
    pair = shaken(Branches(1, ["3x3:2 3x3:2"]))
    x.requires_grad_()
    pair.train()(x)[0, :, 5, 5].sum().backward()
    pair.eval()
    x.grad = None
    pair(x)[0, :, 5, 5].sum().backward()
    seen = x.grad[0, 0].nonzero()
    assert seen.min(0).values.ge(3).all()
    assert seen.max(0).values.le(7).all()


def test_channel_sums_and_sizes():
    with torch.device("meta"):
        x = torch.empty(1, 3, 299, 299)
        for variant, channels in (
            ("inception_v4", [64, 192, 384, 1024, 1536]),
            ("inception_resnet_v1", [64, 192, 256, 896, 1792]),
            ("inception_resnet_v2", [64, 192, 320, 1088, 1536]),
        ):
            network = Inception(variant, layers=[1, 1, 1])
            assert [(m.shape[1], m.shape[2]) for m in network(x)] == list(
                zip(channels, [147, 71, 35, 17, 8], strict=True)
            )
            same = Inception(variant, layers=[1, 1, 1], padding="same")
            assert [m.shape[-1] for m in same(x)] == [150, 75, 38, 19, 10]
            assert [p.shape for p in same.parameters()] == [p.shape for p in network.parameters()]
            assert [level.channels for level in Inception(variant, multiplier=0.25).levels][:2] == [16, 48]


def test_lineage():
    """Modules of the papers before: widths, and the same maps as a plain call of their layers."""
    widths = {"v1": 256, "v2_a": 288, "v2_b": 768, "v2_c": 2048}
    for kind, channels in ((kind, widths[kind]) for kind in LINEAGE):
        module = lineage_module(kind, 24)
        assert module.out_channels == channels
        assert module(torch.randn(2, 24, 9, 9)).shape == (2, channels, 9, 9)
        assert lineage_module(kind, 24, multiplier=0.25).out_channels == channels // 4
    with pytest.raises(ValueError, match="v9"):
        lineage_module("v9", 8)


def test_auxiliary_head():
    """Half of the loss is its own; it is not part of the prediction; its head covers 17 x 17."""
    backbone = Inception("inception_resnet_v1", multiplier=0.125, layers=[1, 1, 1], padding="same")
    system = AuxiliaryClassifier(backbone, num_classes=3, weight=0.3, pool=1, kernel_size=1, widths=(8, 16))
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    losses = system.losses(x, y)
    assert set(losses) == {"loss", "auxiliary"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in system.parameters())
    with torch.no_grad():
        inner = system.eval().backbone(x)[-2]
        expected = 0.3 * nn.functional.cross_entropy(system.auxiliary(inner), y)
        assert torch.allclose(system.losses(x, y)["auxiliary"], expected)
        before = system(x)
        for p in system.auxiliary.parameters():
            p.zero_()
        assert torch.equal(system(x), before)
    plain = AuxiliaryClassifier(backbone, num_classes=3, weight=0.0)
    assert set(plain.losses(x, y)) == {"loss"}
    assert AuxiliaryHead(8, 3).eval()(torch.randn(1, 8, 17, 17)).shape == (1, 3)
    assert AuxiliaryHead(8, 3, kernel_size=4).eval()(torch.randn(1, 8, 14, 14)).shape == (1, 3)
    with pytest.raises(ValueError, match="at least 17, got"):
        AuxiliaryHead(8, 3)(torch.randn(1, 8, 14, 14))


def test_what_is_refused():
    for call, match in (
        (lambda: Inception("inception_v5"), "inception_v5"),
        (lambda: Inception(multiplier=0), "got 0"),
        (lambda: Inception(layers=[1, 2]), r"\(1, 2\)"),
        (lambda: Inception(padding="reflect"), "reflect"),
        (lambda: Inception(multiplier=0.05)(torch.randn(1, 3, 74, 90)), "at least 75.*74"),
        (lambda: Inception(multiplier=0.05)(torch.randn(1, 4, 75, 90)), r"\(N, 3, H, W\).*4, 75"),
        (lambda: Branches(3, ["1x1:4 5y5:3"]), "5y5:3"),
        (lambda: AuxiliaryClassifier(Inception(multiplier=0.05), weight=-1.0), "-1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
