"""Factorised bilinear layer: explicit quadratic forms, the authors' operators, DropFactor, what a linear head lacks."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.blocks.factorized_bilinear import (
    FactorizedBilinear,
    FactorizedBilinearConv,
    FactorizedBilinearHead,
    FactorizedInception,
    FactorizedResNet,
    slow_start,
)

REPOSITORY, COMMIT = "lyttonhao/mxnet", "d1c5ce4883444d3a400b390e974654a57c0aaf5b"
CASES = [f"op{op}:{phase}:{side}" for op, phase, side in itertools.product((1, 3), ("test", "train"), (1, 3))]


def reference(layer: FactorizedBilinear | FactorizedBilinearHead, x: Tensor) -> Tensor:
    """b + w x + keep sum_i sum_j <f_i, f_j> x_i x_j of the rows of (N, n), number by number."""
    part, keep = layer.factors, 1 - layer.factors.drop
    forms = part.weight.unflatten(0, (-1, part.rank)).tolist()  # K x k x n
    signs = [[1.0] * part.rank] * len(forms) if part.signs is None else part.signs.tolist()
    y = torch.zeros(len(x), len(forms))
    for n, row in enumerate(x.tolist()):
        for k, (form, sign) in enumerate(zip(forms, signs, strict=True)):
            total = layer.linear.bias[k].item()
            total += sum(w * v for w, v in zip(layer.linear.weight[k].tolist(), row, strict=True))
            for i, j in itertools.product(range(len(row)), repeat=2):
                if part.diagonal or i != j:
                    product = sum(s * f[i] * f[j] for s, f in zip(sign, form, strict=True))
                    total += keep * product * row[i] * row[j]
            y[n, k] = total
    return y


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride)  # (N, C side^2, L)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("diagonal", [True, False])
def test_equals_explicit_forms(double, record, diagonal, signed):
    """The layer, the convolution on patches, and the head as a mean over positions."""
    options = {"rank": 3, "diagonal": diagonal, "signed": signed, "drop": 0.4}
    layer = FactorizedBilinear(5, 4, **options).eval()
    x = torch.randn(3, 5)
    worst = (layer(x) - reference(layer, x)).abs().max().item()

    conv = FactorizedBilinearConv(2, 3, kernel_size=3, stride=2, padding=1, **options).eval()
    image = torch.randn(2, 2, 5, 6)
    flat = FactorizedBilinear(18, 3, **options).eval()
    flat.linear.weight.data, flat.linear.bias.data = conv.linear.weight.flatten(1), conv.linear.bias
    flat.factors.weight.data = conv.factors.weight.flatten(1)
    rows = patches(image, conv.linear).transpose(1, 2)  # (N, L, 18)
    expected = reference(flat, rows.flatten(0, 1)).view(2, -1, 3).transpose(1, 2).view(2, 3, 3, 3)
    worst = max(worst, (conv(image) - expected).abs().max().item())
    assert (flat(rows).transpose(1, 2).reshape(2, 3, 3, 3) - expected).abs().max() < 1e-13

    head = FactorizedBilinearHead(5, 4, **options).eval()
    maps = torch.randn(2, 5, 3, 4)
    each = reference(head, maps.tanh().flatten(2).transpose(1, 2).flatten(0, 1)).view(2, 12, 4)
    worst = max(worst, (head(maps) - each.mean(1)).abs().max().item())
    assert worst < 1e-13
    if diagonal and not signed:
        record(
            "factorized_bilinear",
            "referenced",
            largest_difference=worst,
            dtype="float64",
            products_of_signs_accuracy=interaction_accuracies(),
            equal_to_bilinear_pooling=bilinear_difference(),
        )


def bilinear_difference() -> float:
    """FB then mean against b + w mean(x) + <F^T F, X X^T / L>."""
    head = FactorizedBilinearHead(6, 4, rank=3, drop=0.0).double()
    maps = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    x = maps.tanh().flatten(2)
    pooled = x @ x.transpose(1, 2) / 20
    forms = head.factors.weight.unflatten(0, (4, 3))
    quadratic = torch.einsum("kfi,kfj,nij->nk", forms, forms, pooled)
    return (head(maps) - head.linear(x.mean(2)) - quadratic).abs().max().item()


def test_head_is_bilinear_pooling_of_low_rank(double):
    assert bilinear_difference() < 1e-13
    head = FactorizedBilinearHead(6, 4, rank=3, drop=0.0, mode="mean_then_layer")
    layer = FactorizedBilinear(6, 4, rank=3, drop=0.0)
    layer.linear, layer.factors = head.linear, head.factors
    maps = torch.randn(2, 6, 4, 5)
    assert (head(maps) - layer(maps.tanh().mean((2, 3)))).abs().max() < 1e-14
    head.mode = "layer_then_mean"
    for shape in ((20,), (2, 5, 2)):  # tokens and clips
        assert (head(maps.reshape(2, 6, *shape)) - head(maps)).abs().max() < 1e-14
    head.mode = "mean_then_layer"
    same = torch.randn(2, 6, 1, 1).expand(-1, -1, 4, 5)  # without spread over positions the two orders are one
    head.mode, one = "layer_then_mean", head(same)
    assert (head(same) - one).abs().max() < 1e-13


def test_equal_means_are_told_apart_only_behind_the_layer(double):
    """Both orders are blind to the order of positions, but only one sees how features go together."""
    x = torch.randn(3, 6, 20)
    x = x - x.mean(2, keepdim=True) + 0.1
    other = x.clone()
    other[:, 0] = x[:, 0, torch.randperm(20)]  # the same values in each channel, paired differently
    after, before = (
        FactorizedBilinearHead(6, 4, rank=3, act="none", mode=mode).eval()
        for mode in ("layer_then_mean", "mean_then_layer")
    )
    for head in (after, before):
        assert (head(x[..., torch.randperm(20)]) - head(x)).abs().max() < 1e-12
    assert (before(other) - before(x)).abs().max() < 1e-12
    assert (after(other) - after(x)).abs().min() > 1e-4


def test_any_quadratic_form(double):
    """With k = n: a positive one by F = its root, any one with signs."""
    root = torch.randn(4, 5, 5)
    layer = FactorizedBilinear(5, 4, rank=5, drop=0.0)
    layer.factors.weight.data = root.flatten(0, 1)
    nn.init.zeros_(layer.linear.weight)
    nn.init.zeros_(layer.linear.bias)
    x = torch.randn(3, 5)
    assert (layer(x) - torch.einsum("ni,kfi,kfj,nj->nk", x, root, root, x)).abs().max() < 1e-12
    forms = torch.randn(4, 5, 5)
    forms = forms + forms.transpose(1, 2)
    found = FactorizedBilinear.from_forms(forms, drop=0.5).eval()
    assert (found(x) - torch.einsum("ni,kij,nj->nk", x, forms, x)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="K, n, n"):
        FactorizedBilinear.from_forms(forms[0])


def test_matches_the_authors_operators(double, record, parity, monkeypatch):
    """Both operators, in training with their mask and in testing, 1 x 1 and 3 x 3: output, gradients, one step.

    Their gradient of the input lacks a factor x in the part of the squares; ours is the true one, and theirs is
    ours + 2 sum_j g_j sum_f m_f F_jf^2 (x - 1).
    """
    stored = parity("factorized_bilinear")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0, "their_input_gradient_as_explained": 0.0}
    apart = 0.0
    for case in CASES:
        their = {key.rpartition(":")[2]: value for key, value in stored.items() if key.startswith(f"{case}:")}
        side = their["w"].shape[-1]
        options = {"rank": 6, "diagonal": False, "shared_drop": True, "drop": 0.5}
        conv = FactorizedBilinearConv(4, 3, kernel_size=side, padding=side // 2, **options)
        nn.init.zeros_(conv.linear.weight)  # theirs has the quadratic part and the bias
        conv.linear.weight.requires_grad_(False)
        conv.linear.bias.data = their["b"].clone()
        conv.factors.weight.data = their["w"].flatten(0, 1).clone()
        kept = their["mask"].square()
        if "train" in case:
            assert set(kept.round(decimals=6).tolist()) == {0.0, 2.0}
            monkeypatch.setattr(conv.factors, "weights", lambda like, kept=kept: kept.expand(1, 1, -1))
        else:
            conv.eval()
            assert (conv.factors.weights(their["x"]).flatten() - kept).abs().max() < 1e-7
        x = their["x"].clone().requires_grad_()
        y = conv(x)
        y.backward(their["go"])
        own = torch.einsum("kfchw,f->kchw", their["w"].square(), kept)
        missing = F.conv_transpose2d(their["go"], own, padding=side // 2)
        if side == 1:
            explained = x.grad + 2 * missing * (x.detach() - 1)
            check = [("their_input_gradient_as_explained", explained, "gx")]
        else:
            patch = patches(x.detach(), conv.linear)
            weighed = torch.einsum("nkl,kp->npl", their["go"].flatten(2), own.flatten(1))
            back = F.fold(2 * weighed * (patch - 1), x.shape[2:], side, padding=1)
            check = [("their_input_gradient_as_explained", x.grad + back, "gx")]
        apart = max(apart, (x.grad - their["gx"]).abs().max().item())
        check += [("output", y, "y"), ("gradient", conv.factors.weight.grad.view_as(their["w"]), "gw")]
        check += [("gradient", conv.linear.bias.grad, "gb")]
        torch.optim.SGD([conv.factors.weight, conv.linear.bias], lr=0.01).step()
        check.append(("optimiser_step", conv(x), "next"))
        for key, found, name in check:
            worst[key] = max(worst[key], (found - their[name]).abs().max().item())
        if side == 1:  # the head: the operator beside a linear one at each position, then the mean
            head = FactorizedBilinearHead(4, 3, act="none", **options).eval()
            head.linear.bias.data = their["b"]
            head.factors.weight.data = their["w"].flatten(0, 1).flatten(1)
            if "test" in case:
                linear = head.linear(their["x"].mean((2, 3))) - their["b"]
                worst["output"] = max(
                    worst["output"], (head(their["x"]) - linear - their["y"].mean((2, 3))).abs().max().item()
                )
    assert apart > 1  # the fault of theirs is no rounding
    assert max(worst.values()) < 1e-12
    record(
        "factorized_bilinear",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=len(CASES),
        **worst,
    )


@pytest.mark.parametrize("shared_drop", [False, True])
def test_drop_factor(double, shared_drop):
    """Zeros and ones in training, and their mean is the test's value."""
    layer = FactorizedBilinear(4, 3, rank=5, drop=0.3, shared_drop=shared_drop)
    x = torch.randn(2, 4)
    weights = layer.factors.weights(x)
    assert weights.shape == ((1, 1, 5) if shared_drop else (2, 3, 5))
    assert set(weights.flatten().tolist()) <= {0.0, 1.0}
    mean = torch.stack([layer(x) for _ in range(4000)])
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    error = mean.std(0) / 4000**0.5
    assert ((mean.mean(0) - layer(x)).abs() < 4.5 * error).all()
    share = torch.stack([layer.train().factors.weights(x) for _ in range(2000)]).mean()
    assert abs(share - 0.7) < 0.02
    conv = FactorizedBilinearConv(4, 3, rank=5, drop=0.5)
    even = conv(torch.ones(2, 4, 3, 3))  # the same factors at all positions
    assert torch.allclose(even, even[:, :, :1, :1].expand_as(even))
    if not shared_drop:
        assert not torch.allclose(even[0], even[1])


@pytest.mark.parametrize("rank", [0, 2])
def test_no_factors_is_a_linear_layer(double, rank):
    layer = FactorizedBilinear(4, 3, rank=rank, drop=0.0)
    conv = FactorizedBilinearConv(4, 3, kernel_size=3, rank=rank, drop=0.0)
    head = FactorizedBilinearHead(4, 3, rank=rank, drop=0.0, act="relu")
    for part in (layer, conv, head):
        nn.init.zeros_(part.factors.weight)
    x, maps = torch.randn(2, 7, 4), torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), layer.linear(x))
    assert torch.equal(conv(maps), conv.linear(maps))
    assert torch.equal(head(maps), head.linear(maps.relu().mean((2, 3))))


@pytest.mark.parametrize("form", ["layer", "conv", "head"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_gradients(double, form, diagonal):
    options = {"rank": 2, "drop": 0.2, "diagonal": diagonal, "signed": True}
    part = {
        "layer": lambda: FactorizedBilinear(3, 2, **options),
        "conv": lambda: FactorizedBilinearConv(3, 2, kernel_size=2, **options),
        "head": lambda: FactorizedBilinearHead(3, 2, **options),
    }[form]().eval()
    x = torch.randn((2, 3) if form == "layer" else (2, 3, 3, 3), requires_grad=True)
    assert torch.autograd.gradcheck(part, x)
    part(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


def interaction_accuracies() -> dict[str, float]:
    """A class that is the product of two signs: what a linear layer and four factors make of 400 new samples."""
    found = {}
    for name, rank in (("linear", 0), ("rank_4", 4)):
        torch.manual_seed(0)
        x = torch.randn(800, 6, dtype=torch.float64)
        t = (x[:, 0] * x[:, 1] > 0).long()
        layer = FactorizedBilinear(6, 2, rank=rank, drop=0.0).double()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[:400]), t[:400]).backward()
            optimizer.step()
        found[name] = (layer(x[400:]).argmax(1) == t[400:]).double().mean().item()
    return found


def test_learns_what_a_linear_layer_cannot():
    found = interaction_accuracies()
    assert found["linear"] < 0.6
    assert found["rank_4"] > 0.9


def test_networks_have_the_papers_sizes():
    def millions(network: nn.Module) -> float:
        return sum(p.numel() for p in network.parameters()) / 1e6

    plain = {"rank": 0, "act": "relu"}
    with torch.device("meta"):
        assert round(millions(FactorizedResNet(164, options=plain)), 1) == 1.7
        assert millions(FactorizedResNet(164)) - millions(FactorizedResNet(164, options=plain)) == pytest.approx(0.512)
        assert round(millions(FactorizedInception(options=plain)), 1) == 1.7
        assert round(millions(FactorizedInception()), 1) == 2.4
        assert millions(FactorizedResNet(1001, options=plain)) == pytest.approx(10.425892)  # 10.2 in the paper
        assert FactorizedInception().body(torch.zeros(2, 3, 32, 32)).shape == (2, 336, 8, 8)
    with pytest.raises(ValueError, match="depth"):
        FactorizedResNet(50)
    for network in (FactorizedResNet(11, num_classes=3), FactorizedInception(num_classes=3, in_channels=1)):
        first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
        network(torch.randn(2, first.in_channels, 16, 16)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_slow_start_and_rates():
    assert slow_start(0.0) == pytest.approx(0.1)
    assert slow_start(0.015) == pytest.approx(0.55)
    assert slow_start(0.5) == 1.0
    assert slow_start(0.0, share=0) == 1.0
    assert FactorizedBilinearHead(4, 3).parameter_rules() == {}
    assert FactorizedBilinearHead(4, 3, rate=0.1).parameter_rules() == {"factors.weight": {"lr": 0.1}}
    assert FactorizedBilinear(4, 3, rank=0, rate=0.1).parameter_rules() == {}


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "efficientnet_lite0", "convnext_atto"])
def test_conversion_keeps_the_linear_weights(name):
    network = timm.create_model(name, num_classes=5)
    old = network.get_classifier().weight
    report = convert(network, "factorized_bilinear", rank=4)
    assert [change.new for change in report.changes] == ["FactorizedBilinear"]
    assert network.get_classifier().linear.weight is old
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    report.undo()
    assert network.get_classifier().weight is old


def test_other_layers_are_converted_on_request():
    network = timm.create_model("convnext_atto", num_classes=5)
    report = convert(network, "factorized_bilinear", "stages.0.*mlp*", rank=1)
    assert {change.name.rpartition(".")[2] for change in report.changes} == {"fc1", "fc2"}
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    old = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), old)
    convert(network, "factorized_bilinear", "1", example=torch.zeros(1, 3, 8, 8), rank=2, drop=0.0)
    assert isinstance(network[1], FactorizedBilinearConv)
    assert network[1].linear is old
    assert network(torch.zeros(1, 3, 9, 9)).shape == (1, 4, 5, 5)
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ConversionError, match="linear layer"):
        convert(detector.backbone, "factorized_bilinear", example=torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConversionError, match="it takes rank"):
        convert(timm.create_model("resnet18"), "factorized_bilinear", factors=4)
    with pytest.raises(ValueError, match="groups"):
        FactorizedBilinearConv.from_module(nn.Conv2d(4, 4, 3, groups=2), channels=4)
    with pytest.raises(ValueError, match="ReLU"):
        FactorizedBilinear.from_module(nn.ReLU(), channels=4)


def test_bad_arguments_are_named():
    for options in ({"rank": -1}, {"drop": 1.0}, {"act": "gelu"}, {"mode": "max"}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            FactorizedBilinearHead(4, 3, **options)
    for part, x in (
        (FactorizedBilinearHead(4, 3), torch.randn(1, 5, 3, 3)),
        (FactorizedBilinearConv(4, 3), torch.randn(1, 5, 3, 3)),
        (FactorizedBilinear(4, 3), torch.randn(2, 5)),
    ):
        with pytest.raises(ValueError, match="4"):
            part(x)
