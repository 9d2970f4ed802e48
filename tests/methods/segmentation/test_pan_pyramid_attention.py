"""Pyramid attention network: loop references, the common library's blocks on copied weights, reductions, sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchive
from torchive.methods.segmentation.pan_pyramid_attention import (
    FeaturePyramidAttention,
    GlobalAttentionUpsample,
    PyramidAttentionNetwork,
)
from torchive.nn.fcn import FCN

REPOSITORY, COMMIT = "qubvel-org/segmentation_models.pytorch", "5006616357631a48c7c8e11977cf5abb00803590"


def shaken(module: nn.Module) -> nn.Module:
    """All weights and statistics away from their start, in eval mode."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return module.eval()


def convolved(layer: nn.Sequential, x: Tensor) -> Tensor:
    """Convolution, norm and ReLU of one image (C, H, W), number by number."""
    conv, norm = layer[0], layer[1]
    k, stride = conv.kernel_size[0], conv.stride[0]
    channels, height, width = x.shape
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    y = x.new_zeros(conv.out_channels, rows, columns)
    values, weight = x.tolist(), conv.weight.tolist()
    for o in range(conv.out_channels):
        for i in range(rows):
            for j in range(columns):
                total = 0.0
                for c in range(channels):
                    for di in range(k):
                        for dj in range(k):
                            a, b = i * stride + di - k // 2, j * stride + dj - k // 2
                            if 0 <= a < height and 0 <= b < width:
                                total += weight[o][c][di][dj] * values[c][a][b]
                scale = norm.weight[o].item() / math.sqrt(norm.running_var[o].item() + norm.eps)
                y[o, i, j] = max((total - norm.running_mean[o].item()) * scale + norm.bias[o].item(), 0.0)
    return y


def halved(x: Tensor, pool: str) -> Tensor:
    if pool == "stride":
        return x
    channels, height, width = x.shape
    y = x.new_zeros(channels, math.ceil(height / 2), math.ceil(width / 2))
    for c in range(channels):
        for i in range(y.shape[1]):
            for j in range(y.shape[2]):
                part = x[c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten().tolist()
                y[c, i, j] = max(part) if pool == "max" else sum(part) / len(part)
    return y


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners aligned."""
    channels, height, width = x.shape
    y = x.new_zeros(channels, *size)
    for c in range(channels):
        for i in range(size[0]):
            for j in range(size[1]):
                a = i * (height - 1) / (size[0] - 1) if size[0] > 1 else 0.0
                b = j * (width - 1) / (size[1] - 1) if size[1] > 1 else 0.0
                top, left = min(int(a), max(height - 2, 0)), min(int(b), max(width - 2, 0))
                low, right = min(top + 1, height - 1), min(left + 1, width - 1)
                p, q = a - top, b - left
                y[c, i, j] = (1 - p) * ((1 - q) * x[c, top, left] + q * x[c, top, right]) + p * (
                    (1 - q) * x[c, low, left] + q * x[c, low, right]
                )
    return y


def fpa_reference(block: FeaturePyramidAttention, x: Tensor, pool: str) -> Tensor:
    result = []
    for image in x:
        maps = [image]
        for down in block.down:
            maps.append(convolved(down[1], halved(maps[-1], pool)))
        y = torch.zeros(())
        for level in (3, 2, 1):
            y = convolved(block.across[level - 1], maps[level]) + y
            y = enlarged(y, tuple(maps[level - 1].shape[1:]))
        out = convolved(block.master, image) * y
        mean = image.flatten(1).mean(1)[:, None, None]
        result.append(out if block.context is None else out + convolved(block.context, mean))
    return torch.stack(result)


@pytest.mark.parametrize("pool", ["max", "average", "stride"])
@pytest.mark.parametrize(
    ("pyramid_channels", "global_branch", "kernels"), [(1, True, (7, 5, 3)), (2, False, (3, 3, 3))]
)
def test_pyramid_equals_the_loop_reference(double, record, pool, pyramid_channels, global_branch, kernels):
    block = shaken(
        FeaturePyramidAttention(
            3, 2, pyramid_channels=pyramid_channels, global_branch=global_branch, pool=pool, kernels=kernels
        )
    )
    x = torch.randn(2, 3, 9, 6)
    difference = (block(x) - fpa_reference(block, x, pool)).abs().max().item()
    assert difference < 1e-12
    if (pool, global_branch) == ("max", True):
        record("pan_pyramid_attention", "referenced", largest_difference=difference, dtype="float64")


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("gate", ["channel", "spatial", "none"])
@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_upsampling_equals_the_loop_reference(double, gate, act, fusion):
    block = shaken(GlobalAttentionUpsample(3, 4, gate=gate, act=act, fusion=fusion))
    low, high = torch.randn(2, 3, 5, 4), torch.randn(2, 4, 3, 2)
    squash = (lambda v: 1 / (1 + math.exp(-v))) if act is nn.Sigmoid else (lambda v: max(v, 0.0))
    result = []
    for fine, coarse in zip(low, high, strict=True):
        skip = convolved(block.skip, fine)
        up = enlarged(coarse, (5, 4))
        if gate == "channel":
            conv, norm = block.gate[0].weight[:, :, 0, 0].tolist(), block.gate[1]
            mean = [plane.mean().item() for plane in coarse]
            for c in range(4):
                value = sum(a * b for a, b in zip(conv[c], mean, strict=True)) - norm.running_mean[c].item()
                value = value / math.sqrt(norm.running_var[c].item() + norm.eps) * norm.weight[c].item()
                skip[c] *= squash(value + norm.bias[c].item())
        elif gate == "spatial":
            phi = torch.einsum("oc,chw->ohw", block.phi.weight[:, :, 0, 0], coarse) + block.phi.bias[:, None, None]
            theta = torch.einsum("oc,chw->ohw", block.theta.weight[:, :, 0, 0], skip)
            hidden = (theta + enlarged(phi, (5, 4))).clamp(min=0)
            last = block.gate[1]
            for i in range(5):
                for j in range(4):
                    skip[:, i, j] *= squash((last.weight[0, :, 0, 0] @ hidden[:, i, j] + last.bias[0]).item())
        result.append(up + skip if fusion == "add" else convolved(block.fuse, torch.cat([up, skip])))
    assert (block(low, high) - torch.stack(result)).abs().max() < 1e-12


def copied(weight: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The library's weights under our names; a bias in front of a norm only moves the mean that the norm takes off."""
    state: dict[str, Tensor] = {}
    for theirs, mine in names.items():
        state[f"{mine}.0.weight"] = weight[f"{theirs}.conv.weight"]
        for key in ("weight", "bias", "running_var"):
            state[f"{mine}.1.{key}"] = weight[f"{theirs}.bn.{key}"]
        state[f"{mine}.1.running_mean"] = weight[f"{theirs}.bn.running_mean"] - weight[f"{theirs}.conv.bias"]
        state[f"{mine}.1.num_batches_tracked"] = torch.tensor(0)
    return state


FPA_NAMES = {"branch1.1": "context", "mid.0": "master", "down1.1": "down.0.1", "down2.1": "down.1.1",
             "down3.1": "down.2.1", "down3.2": "across.2", "conv2": "across.1", "conv1": "across.0"}  # fmt: skip
GAU_NAMES = {"conv1.1": "gate", "conv2": "skip"}


def test_matches_the_common_library(double, record, parity):
    """Output in training and evaluation, gradients of both maps, and the output after one SGD step; four blocks."""
    stored = parity("pan_pyramid_attention")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for case, channels in (("fpa.a", (6, 4)), ("fpa.b", (3, 5)), ("gau.a", (5, 4)), ("gau.b", (3, 6))):
        given = {k.removeprefix(f"{case}:"): v for k, v in stored.items() if k.startswith(f"{case}:")}
        weight = {k.removeprefix(f"{case}."): v for k, v in stored.items() if k.startswith(f"{case}.")}
        block: nn.Module = (
            FeaturePyramidAttention(*channels)
            if case.startswith("fpa")
            else GlobalAttentionUpsample(*channels, act=nn.Sigmoid)
        )
        block.load_state_dict(copied(weight, FPA_NAMES if case.startswith("fpa") else GAU_NAMES))
        inputs = [given[name].clone().requires_grad_() for name in ("x0", "x1") if name in given]
        found = {"output": [(block.eval()(*inputs), given["eval"])]}
        y = block.train()(*inputs)
        y.backward(given["g"])
        found["output"].append((y, given["y"]))
        found["gradient"] = [(x.grad, given[f"dx{i}"]) for i, x in enumerate(inputs)]
        torch.optim.SGD(block.parameters(), lr=0.05).step()
        found["optimiser_step"] = [(block(*inputs), given["next"])]
        for key, pairs in found.items():
            worst[key] = max(worst[key], *(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs))
    assert max(worst.values()) < 1e-11
    record(
        "pan_pyramid_attention",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=4,
        **worst,
    )


def fix(layer: nn.Sequential, value: float) -> None:
    """A convolution, norm and ReLU that give this number everywhere."""
    nn.init.zeros_(layer[1].weight)
    nn.init.constant_(layer[1].bias, value)


def test_a_pyramid_of_ones_is_a_convolution_and_a_context(double):
    block = shaken(FeaturePyramidAttention(6, 4))
    fix(block.across[0], 1.0)
    fix(block.across[1], 0.0)
    fix(block.across[2], 0.0)
    x = torch.randn(2, 6, 9, 7)
    assert torch.equal(block.attention(x), torch.ones(2, 1, 9, 7))
    expected = block.master(x) + block.context(x.mean((2, 3), keepdim=True))
    assert (block(x) - expected).abs().max() < 1e-14


def test_gates_of_one_and_of_zero(double):
    block, plain = shaken(GlobalAttentionUpsample(3, 4)), GlobalAttentionUpsample(3, 4, gate="none").eval()
    plain.skip.load_state_dict(block.skip.state_dict())
    low, high = torch.randn(2, 3, 9, 7), torch.randn(2, 4, 5, 4)
    up = F.interpolate(high, size=(9, 7), mode="bilinear", align_corners=True)
    fix(block.gate, 1.0)
    assert (block(low, high) - (up + block.skip(low))).abs().max() < 1e-14
    assert (block(low, high) - plain(low, high)).abs().max() < 1e-14
    fix(block.gate, 0.0)
    assert torch.equal(block(low, high), up)


def test_one_weighs_positions_and_the_other_channels():
    """What the note asks: the pyramid weighs positions, equally for all channels; the decoder the other way."""
    pyramid, step = shaken(FeaturePyramidAttention(6, 4)), shaken(GlobalAttentionUpsample(3, 4, act=nn.Sigmoid))
    a = pyramid.attention(torch.randn(1, 6, 16, 16))
    w = step.attention(torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4))
    assert a.shape == (1, 1, 16, 16)
    assert a.std() > 1e-3
    assert w.shape == (1, 4, 1, 1)
    assert w.std() > 1e-3
    spatial = shaken(GlobalAttentionUpsample(3, 4, gate="spatial", act=nn.Sigmoid))
    assert spatial.attention(torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)).shape == (1, 1, 8, 8)
    counts = [
        sum(p.numel() for p in GlobalAttentionUpsample(64, 64, gate=g).parameters()) for g in ("channel", "spatial")
    ]
    assert counts[1] / counts[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (2, 5), (8, 8)])
def test_every_size_keeps_its_shape(size):
    block = FeaturePyramidAttention(6, 4).eval()
    assert block(torch.randn(2, 6, *size)).shape == (2, 4, *size)
    network = PyramidAttentionNetwork("timm/test_efficientnet", num_classes=3, options={}).eval()
    assert network(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_encoder_and_decoder_of_the_paper():
    with torch.device("meta"):
        network = PyramidAttentionNetwork(num_classes=21)
    levels = network.backbone.levels
    assert [level.stride for level in levels][-4:] == [4, 8, 16, 16]
    assert [level.channels for level in levels][-4:] == [256, 512, 1024, 2048]
    assert [step.skip_channels for step in network.decoder] == [1024, 512, 256]
    assert network.classifier.weight.shape == (21, 21, 1, 1)


@pytest.mark.parametrize("gate", ["channel", "spatial", "none"])
@pytest.mark.parametrize("fusion", ["add", "concat"])
def test_every_decoder_trains(gate, fusion):
    network = PyramidAttentionNetwork(
        "timm/test_efficientnet", num_classes=3, width=8, gate=gate, fusion=fusion, pyramid_channels=8, options={}
    )
    images, classes = torch.rand(2, 3, 32, 48), torch.randint(3, (2, 32, 48))
    network.losses(images, classes)["loss"].backward()
    assert all(p.grad is not None for p in network.parameters())


def test_prediction_at_several_scales():
    network = shaken(PyramidAttentionNetwork("timm/test_efficientnet", num_classes=3, options={}))
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        plain = network.predict(images)
        same = network.predict(images, scales=(1.0, 1.0))
        both = network.predict(images, scales=(0.75, 1.25), flip=True)
        mirrored = network.predict(images.flip(3), scales=(0.75, 1.25), flip=True)
    assert torch.allclose(plain[0].scores, same[0].scores, atol=1e-6)
    assert both[1].scores.shape == (3, 32, 48)
    assert torch.allclose(both[1].scores, mirrored[1].scores.flip(2), atol=1e-4)
    with pytest.raises(ValueError, match="-1"):
        network.predict(images, scales=(-1.0,))


def test_a_batch_of_one_trains_with_a_norm_of_groups():
    options = {"norm": lambda channels: nn.GroupNorm(1, channels)}
    block = FeaturePyramidAttention(6, 4, **options)
    block(torch.randn(1, 6, 16, 16)).sum().backward()
    GlobalAttentionUpsample(3, 4, **options)(torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4)).sum().backward()
    with pytest.raises(ValueError, match="more than 1 value"):
        FeaturePyramidAttention(6, 4)(torch.randn(1, 6, 8, 8))


def test_enters_networks():
    import timm

    network = timm.create_model("resnet18", num_classes=5)
    report = torchive.convert(network, "pan_pyramid_attention")
    assert [change.name for change in report.changes] == ["layer4"]
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_enters_networks_once():
    """DenseNet has modules called denselayer4, which are no stages."""
    import timm

    for name, place in (("densenet121", "features"), ("regnetx_002", "s4")):
        with torch.device("meta"):
            network = timm.create_model(name)
        report = torchive.convert(network, "pan_pyramid_attention")
        assert [change.name for change in report.changes] == [place]


def test_bad_arguments_are_named():
    for options in ({"pyramid_channels": 3}, {"kernels": (4, 3)}, {"pool": "min"}, {"kernels": ()}):
        with pytest.raises(ValueError, match=str(next(iter(options.values()))).strip("()").split(",")[0] or "odd"):
            FeaturePyramidAttention(6, 4, **options)
    for options in ({"gate": "both"}, {"fusion": "mul"}):
        with pytest.raises(ValueError, match=next(iter(options.values()))):
            GlobalAttentionUpsample(3, 4, **options)
    with pytest.raises(ValueError, match="low with shape"):
        GlobalAttentionUpsample(3, 4)(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4))
    with pytest.raises(ValueError, match="got 1"):
        PyramidAttentionNetwork(num_classes=1)


def animals(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 64, 64) of a body (class 1) with an eye (class 2, 0.4 % of the pixels) among dots that are none."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images, classes = 0.25 * torch.randn(count, 3, 64, 64, generator=draw), torch.zeros(count, 64, 64, dtype=torch.long)
    colours = torch.tensor([[0.5, 0.1, -0.3], [-0.8, 0.4, 0.8], [-0.3, 0.5, 0.5]])[:, :, None]

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(1, generator=draw).item()

    for image, mask in zip(images, classes, strict=True):
        cy, cx, radius = between(16, 48), between(16, 48), between(9, 14)
        ey, ex = cy + between(-0.5, 0.5) * radius, cx + between(-0.5, 0.5) * radius
        for k, (a, b, r) in enumerate(((cy, cx, radius), (ey, ex, 2.3))):
            disc = (y - a) ** 2 + (x - b) ** 2 < r**2
            image[:, disc] += colours[k]
            mask[disc] = k + 1
        for _ in range(4):
            a, b = between(2, 62), between(2, 62)
            if (a - cy) ** 2 + (b - cx) ** 2 > (radius + 4) ** 2:
                image[:, (y - a) ** 2 + (x - b) ** 2 < 2.3**2] += colours[2]
    return images, classes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_are_small_parts_lost_to_the_loss_or_to_the_network(capsys):
    """The notes' first question: IoU of the eye for two networks and two losses, and for other decoders."""
    draw = torch.Generator().manual_seed(0)
    (x, t), (unseen, truth) = animals(384, draw), animals(128, draw)
    balance = t.flatten().bincount().rsqrt()  # weights of classes by the root of their rarity
    balance = balance / balance.mean()
    options = {"num_classes": 3, "width": 16, "options": {"output_stride": 8}}
    arms: dict[str, tuple[type[nn.Module], dict[str, object], Tensor | None]] = {
        "fcn": (FCN, {"drop": 0.0}, None),
        "fcn, balanced": (FCN, {"drop": 0.0}, balance),
        "pan": (PyramidAttentionNetwork, {}, None),
        "pan, balanced": (PyramidAttentionNetwork, {}, balance),
        "addition": (PyramidAttentionNetwork, {"gate": "none"}, balance),
        "concatenation": (PyramidAttentionNetwork, {"gate": "none", "fusion": "concat"}, balance),
        "spatial gate": (PyramidAttentionNetwork, {"gate": "spatial", "act": nn.Sigmoid}, balance),
        "channel gate": (PyramidAttentionNetwork, {"act": nn.Sigmoid}, balance),
    }
    eye = dict.fromkeys(arms, 0.0)
    for name, (build, own, weight) in arms.items():
        for seed in range(3):
            torch.manual_seed(seed)
            network = build("timm/test_resnet", **options, **own)
            optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
            for _ in range(200):
                rows = torch.randint(len(x), (8,))
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), t[rows], weight=weight).backward()
                optimizer.step()
            with torch.no_grad():
                found = network.eval()(unseen).argmax(1)
            both = ((found == 2) & (truth == 2)).sum() / ((found == 2) | (truth == 2)).sum().clamp_min(1)
            eye[name] += both.item() / 3
    with capsys.disabled():
        print({name: round(value, 3) for name, value in eye.items()})
    assert eye["fcn"] < 0.1
    assert eye["pan, balanced"] > eye["pan"] + 0.2  # unweighed 0 or 0.16, by the processor's rounding
    assert eye["pan, balanced"] > eye["fcn, balanced"] + 0.1
