"""SAN: a loop reference for every relation, the authors' kernels on copied weights, special cases, the networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.backbones.san_self_attention import (
    SAN,
    PairwiseAttention,
    PatchwiseAttention,
    SANClassifier,
    aggregate,
    load_release,
)
from torchive.methods.backbones.san_self_attention.network import LAYERS, _Bottleneck

REPOSITORY, COMMIT = "hszhao/SAN", "d88b022fc3ec4920d4596f94983f0e5b1ced62c6"
RELATIONS = [
    (PairwiseAttention, "subtraction"),
    (PairwiseAttention, "summation"),
    (PairwiseAttention, "hadamard"),
    (PairwiseAttention, "dot"),
    (PairwiseAttention, "concatenation"),
    (PatchwiseAttention, "concatenation"),
    (PatchwiseAttention, "star"),
    (PatchwiseAttention, "clique"),
]


def shaken(module: nn.Module) -> nn.Module:
    """All weights and running statistics away from their start."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return module


def layer(cls: type, relation: str, **options: object) -> nn.Module:
    return shaken(cls(16, 16, relation=relation, **{"relation_channels": 3, "kernel_size": 3, **options})).eval()


def mirrored(i: int, size: int) -> int:
    """The position that a border reflects."""
    return -i if i < 0 else 2 * (size - 1) - i if i >= size else i


def linear(conv: nn.Conv2d, vector: list[float]) -> list[float]:
    rows = conv.weight[:, :, 0, 0].tolist()
    bias = [0.0] * len(rows) if conv.bias is None else conv.bias.tolist()
    return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in zip(rows, bias, strict=True)]


def mapped(gamma: nn.Sequential, vector: list[float]) -> list[float]:
    """gamma in evaluation, number by number."""
    for part in gamma:
        if isinstance(part, nn.BatchNorm2d):
            columns = (part.running_mean, part.running_var, part.weight, part.bias)
            each = zip(vector, *(c.tolist() for c in columns), strict=True)
            vector = [(v - m) / math.sqrt(s + part.eps) * w + b for v, m, s, w, b in each]
        elif isinstance(part, nn.Conv2d):
            vector = linear(part, vector)
        else:
            vector = [max(v, 0.0) for v in vector]
    return vector


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def reference(attention: nn.Module, x: Tensor) -> Tensor:
    """From the formulas, position by position; x is (N, C, H, W)."""
    at, groups, relation = attention.footprint, attention.groups, attention.relation
    reach = range(-(at.kernel_size // 2), at.kernel_size // 2 + 1)
    _, _, height, width = x.shape
    y = torch.zeros(len(x), attention.out_channels, at.outputs(height), at.outputs(width))
    for n in range(len(x)):
        cells = [(h, w) for h in range(height) for w in range(width)]
        phi, psi, beta = (
            {(h, w): linear(conv, x[n, :, h, w].tolist()) for h, w in cells}
            for conv in (attention.phi, attention.psi, attention.beta)
        )
        place = None
        if isinstance(attention, PairwiseAttention) and attention.place is not None:
            place = {
                (h, w): linear(attention.place, [2 * w / (width - 1) - 1, 2 * h / (height - 1) - 1]) for h, w in cells
            }
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                here = (i * at.stride, j * at.stride)
                around = [
                    (mirrored(here[0] + a * at.dilation, height), mirrored(here[1] + b * at.dilation, width))
                    for a in reach
                    for b in reach
                ]
                if isinstance(attention, PairwiseAttention):
                    logits = []
                    for there in around:
                        mine, theirs = phi[here], psi[there]
                        both = list(zip(mine, theirs, strict=True))
                        delta = {
                            "subtraction": [a - b for a, b in both],
                            "summation": [a + b for a, b in both],
                            "hadamard": [a * b for a, b in both],
                            "dot": [dot(mine, theirs)],
                            "concatenation": mine + theirs,
                        }[relation]
                        if place is not None:
                            delta = delta + [a - b for a, b in zip(place[here], place[there], strict=True)]
                        logits.append(mapped(attention.gamma, delta))  # G numbers
                    alpha = []
                    for g in range(groups):
                        powers = [math.exp(row[g]) for row in logits]
                        alpha.append([p / sum(powers) for p in powers])
                else:
                    if relation == "concatenation":
                        delta = phi[here] + [psi[there][c] for c in range(len(phi[here])) for there in around]
                    elif relation == "star":
                        delta = [dot(phi[here], psi[there]) for there in around]
                    else:
                        delta = [dot(phi[one], psi[two]) for one in around for two in around]
                    numbers = mapped(attention.gamma, delta)
                    alpha = [numbers[g * len(around) : (g + 1) * len(around)] for g in range(groups)]
                for c in range(attention.out_channels):
                    own = zip(alpha[c % groups], around, strict=True)
                    y[n, c, i, j] = sum(a * beta[there][c] for a, there in own)
    return y


@pytest.mark.parametrize(("cls", "relation"), RELATIONS)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_equals_the_loop_reference(double, record, cls, relation, stride, dilation):
    attention = layer(cls, relation, stride=stride, dilation=dilation)
    x = torch.randn(2, 16, 4, 5)
    with torch.no_grad():
        expected = reference(attention, x)
        difference = (attention(x) - expected).abs().max().item()
    scale = expected.abs().max().item()
    assert difference < 1e-13 * max(scale, 1)
    assert (attention(x) - expected).abs().max() < 1e-13 * max(scale, 1)  # and with the gradient's own form
    if (cls, relation, stride, dilation) == (PatchwiseAttention, "concatenation", 1, 1):
        record("san_self_attention", "referenced", largest_difference=difference, dtype="float64")


def formula(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    """The numbers that the authors' weights and inputs were filled with."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) % 9973
    return (scale * (1.7 * i + 0.3 * seed + 0.011 * i * i).sin()).reshape(shape)


def weights_like_theirs(shape: torch.Size, name: str, seed: int) -> Tensor:
    if len(shape) == 1:
        return formula(tuple(shape), seed, 0.3) + (1 if name.endswith("weight") else 0)
    return formula(tuple(shape), seed, (2 / shape[1:].numel()) ** 0.5)


def in_their_order(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Our parameters as theirs are listed: phi, psi, beta, gamma, positions."""
    found = []
    for name in ("norm1", "phi", "psi", "beta", "gamma", "place", "attention", "norm2", "out"):
        part = getattr(module, name, None)
        if name == "attention" and not isinstance(part, nn.Module):
            continue
        if part is not None:
            found += in_their_order(part) if name == "attention" else list(part.named_parameters())
    return found


def thin(x: Tensor, count: int = 150) -> Tensor:
    return x.detach().flatten()[:: max(x.numel() // count, 1)]


CASES = {
    "pair3": (lambda: PairwiseAttention(16, 16, relation_channels=4, kernel_size=3), (2, 16, 6, 8), 0.01),
    "pair5_stride2": (
        lambda: PairwiseAttention(16, 16, relation_channels=4, kernel_size=5, stride=2),
        (2, 16, 6, 8),
        0.01,
    ),
    "pair3_dilated": (
        lambda: PairwiseAttention(16, 16, relation_channels=4, kernel_size=3, dilation=2),
        (2, 16, 6, 8),
        0.01,
    ),
    "patch3": (lambda: PatchwiseAttention(16, 16, relation_channels=4, kernel_size=3), (2, 16, 6, 8), 0.001),
    "patch5": (lambda: PatchwiseAttention(16, 16, relation_channels=4, kernel_size=5), (2, 16, 6, 8), 0.001),
    "block_pair": (lambda: _Bottleneck(32, "pairwise", 3), (2, 32, 5, 6), 0.01),
    "block_patch": (lambda: _Bottleneck(32, "patchwise", 3), (2, 32, 5, 6), 0.001),
}


def test_matches_the_authors_modules(double, record, parity):
    """Their modules with their kernels: output in training and evaluation, gradients, the output after one step."""
    stored = parity("san_self_attention")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for case, (build, shape, rate) in CASES.items():
        module = build().train()
        parameters = in_their_order(module)
        assert len(parameters) == len(list(module.parameters()))
        for i, (name, parameter) in enumerate(parameters):
            parameter.data = weights_like_theirs(parameter.shape, name, i)
        x = formula(shape, 50, 1.0).requires_grad_()
        y = module(x)
        (y * formula(tuple(y.shape), 70, 1.0)).sum().backward()
        pairs = {"output": [(thin(y), "y")], "gradient": [(thin(x.grad), "dx")]}
        for i, (_, parameter) in enumerate(parameters):
            pairs["gradient"].append((thin(parameter.grad, 40), f"g{i}"))
        torch.optim.SGD(module.parameters(), lr=rate).step()
        with torch.no_grad():
            pairs["optimiser_step"] = [(thin(module(x)), "next")]
            pairs["output"].append((thin(module.eval()(x)), "eval"))
        for key, found in pairs.items():
            for mine, name in found:
                theirs = stored[f"{case}:{name}"]
                gap = (mine - theirs).abs().max().item() / max(theirs.abs().max().item(), 1.0)
                worst[key] = max(worst[key], gap)
    assert max(worst.values()) < 1e-11
    record(
        "san_self_attention",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=len(CASES),
        how="their CUDA kernels compiled for the CPU, float64; gaps relative to the largest value",
        **worst,
    )


def their_state(kind: str, layers: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """A network of theirs by name, in their order, filled by the formula."""
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def add(name: str, *shape: int, bias: bool = True) -> None:
        shapes.append((f"{name}.weight", shape))
        if bias:
            shapes.append((f"{name}.bias", (shape[0],)))

    def conv(name: str, out: int, into: int, *, bias: bool = True) -> None:
        add(name, out, into, 1, 1, bias=bias)

    conv("conv_in", 64, 3, bias=False)
    add("bn_in", 64)
    before = 64
    for i, (width, blocks) in enumerate(zip((64, 256, 512, 1024, 2048), layers, strict=True)):
        conv(f"conv{i}", width, before, bias=False)
        add(f"bn{i}", width)
        r, middle, groups = width // 16, width // 4, width // 32
        for j in range(blocks):
            sam = f"layer{i}.{j}.sam"
            add(f"layer{i}.{j}.bn1", width)
            conv(f"{sam}.conv1", r, width)
            conv(f"{sam}.conv2", r, width)
            conv(f"{sam}.conv3", middle, width)
            wide = r + 2 if kind == "pairwise" else 10 * r
            inner = r if kind == "pairwise" else groups
            add(f"{sam}.conv_w.0", wide)
            conv(f"{sam}.conv_w.2", inner, wide, bias=False)
            add(f"{sam}.conv_w.3", inner)
            conv(f"{sam}.conv_w.5", groups if kind == "pairwise" else 9 * groups, inner)
            if kind == "pairwise":
                conv(f"{sam}.conv_p", 2, 2)
            add(f"layer{i}.{j}.bn2", middle)
            conv(f"layer{i}.{j}.conv", width, middle)
        before = width
    add("fc", 10, 2048)
    for i, (name, shape) in enumerate(shapes):
        yield name, weights_like_theirs(torch.Size(shape), name, i)


@pytest.mark.parametrize("kind", ["pairwise", "patchwise"])
def test_their_weights_load_into_the_whole_network(double, parity, kind):
    """A network of five blocks: the same logits as the authors' from the weights under the authors' names."""
    network = SANClassifier(num_classes=10, options={"kind": kind, "layers": (1,) * 5, "kernels": (3,) * 5})
    theirs = dict(their_state(kind, (1,) * 5))
    names = {name: value for name, value in network.state_dict().items() if "running" in name or "tracked" in name}
    back = {name: name for name in names}
    load_release(
        network, {**{f"module.{name}": value for name, value in theirs.items()}, **{back[n]: names[n] for n in names}}
    )
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    x = formula((2, 3, 64, 64), 50, 1.0)
    with torch.no_grad():
        network.train()(x)  # sets the running statistics
        logits = network.eval()(x)
    assert (logits - parity("san_self_attention")[f"san_{kind}:eval"]).abs().max() < 1e-9
    with pytest.raises(RuntimeError, match="Missing key"):
        load_release(network, {})


PAPER = {
    "san10_pairwise": (10.5, 2.2),
    "san10_patchwise": (11.8, 1.9),
    "san15_pairwise": (14.1, 3.0),
    "san15_patchwise": (16.2, 2.6),
    "san19_pairwise": (17.6, 3.8),
    "san19_patchwise": (20.5, 3.3),
}


@pytest.mark.parametrize("name", PAPER)
def test_parameters_and_operations_are_the_papers(name):
    """In millions and in billions of multiply-adds at 224 pixels, as the authors count: norms, ReLU and pooling too."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * (module.in_channels + (module.bias is not None))
        elif isinstance(module, nn.BatchNorm2d):
            total += 3 * output.numel()  # with the ReLU behind each
        elif isinstance(module, nn.MaxPool2d):
            total += inputs[0].numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, PairwiseAttention | PatchwiseAttention):
            taps, cells = module.footprint.kernel_size**2, output.shape[2] * output.shape[3]
            total += output.numel() * taps
            if isinstance(module, PairwiseAttention):
                total += module.width * taps * cells

    with torch.device("meta"):
        network = SANClassifier.named(name).eval()
        for part in network.modules():
            part.register_forward_hook(count)
        with torch.no_grad():
            network(torch.zeros(1, 3, 224, 224))
    parameters = sum(p.numel() for p in network.parameters())
    assert (round(parameters / 1e6, 1), round(total / 1e9, 1)) == PAPER[name]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (3, 1), (2, 2)])
def test_aggregation_is_reflection_unfold_and_interleaved_weights(double, groups, stride, dilation):
    x = torch.randn(2, 8, 7, 9, requires_grad=True)
    height, width = (6 // stride + 1, 8 // stride + 1)
    weight = torch.randn(2, groups, 9, height, width, requires_grad=True)
    y = aggregate(x, weight, kernel_size=3, stride=stride, dilation=dilation)
    columns = F.unfold(nn.ReflectionPad2d(dilation)(x), 3, dilation=dilation, stride=stride)
    columns = columns.view(2, 8, 9, height, width)
    expected = torch.stack([(columns[:, c] * weight[:, c % groups]).sum(1) for c in range(8)], 1)
    assert (y - expected).abs().max() < 1e-13
    g = torch.randn_like(y)
    pairs = zip(torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(expected, (x, weight), g), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) < 1e-13
    with torch.no_grad():
        assert (aggregate(x, weight, kernel_size=3, stride=stride, dilation=dilation) - y).abs().max() < 1e-13


@pytest.mark.parametrize(("cls", "relation"), RELATIONS)
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_same_training(double, cls, relation, chunk):
    """Output, all gradients and the running statistics, in training and in evaluation."""
    whole = layer(cls, relation, stride=2).train()
    parts = copy.deepcopy(whole)
    parts.chunk = chunk
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    found = []
    for attention in (whole, parts):
        y = attention(x)
        g = torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)
        gradients = torch.autograd.grad(y, (x, *attention.parameters()), g)
        found.append([y, *gradients, *attention.buffers(), attention.eval()(x)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-11 * max(a.abs().max().item(), 1)


def test_chunks_bound_the_memory_of_training():
    """What is kept for the backward pass: with chunks less than one relation tensor, whole several of them."""

    def kept(chunk: int | None) -> int:
        attention = PatchwiseAttention(32, 32, kernel_size=7, chunk=chunk)
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(2, 32, 28, 28, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            attention(x)
        return sum(sizes.values())

    relation = 2 * 2 * 50 * 28 * 28 * 4
    assert kept(None) > 4 * relation
    assert kept(4) < 2.5 * relation  # the padded maps, which the whole form keeps too
    assert kept(4) < kept(None) / 3


@pytest.mark.parametrize("relation", ["subtraction", "summation", "hadamard", "dot", "concatenation"])
def test_pairwise_does_not_see_the_order_of_the_footprint_and_patchwise_does(double, relation):
    """At one position whose neighbours trade places; without the code of positions."""
    x = torch.randn(1, 16, 3, 3)
    order = torch.tensor([6, 2, 1, 0, 4, 8, 7, 5, 3])  # the centre stays
    moved = x.flatten(2)[:, :, order].view_as(x)

    def centre(attention: nn.Module, x: Tensor) -> Tensor:
        return attention(x)[:, :, 1, 1]

    free = layer(PairwiseAttention, relation, position=False)
    assert (centre(free, moved) - centre(free, x)).abs().max() < 1e-13
    placed = layer(PairwiseAttention, relation)
    assert (centre(placed, moved) - centre(placed, x)).abs().max() > 1e-4
    patch = layer(PatchwiseAttention, "concatenation")
    assert (centre(patch, moved) - centre(patch, x)).abs().max() > 1e-4


def test_constant_gamma_is_a_known_filter(double):
    """Pairwise: the mean of beta over the footprint. Patchwise: a depthwise convolution with shared kernels."""
    x = torch.randn(2, 16, 6, 7)
    pair, patch = layer(PairwiseAttention, "subtraction"), layer(PatchwiseAttention, "concatenation")
    for attention in (pair, patch):
        attention.gamma[5].weight.data.zero_()
    padded = F.pad(pair.beta(x), (1,) * 4, mode="reflect")
    assert (pair(x) - F.avg_pool2d(padded, 3, 1)).abs().max() < 1e-13
    kernels = patch.gamma[5].bias.view(2, 3, 3)  # G = 2
    weight = torch.stack([kernels[c % 2] for c in range(16)])[:, None]
    padded = F.pad(patch.beta(x), (1,) * 4, mode="reflect")
    assert (patch(x) - F.conv2d(padded, weight, groups=16)).abs().max() < 1e-13


def test_weights_of_the_two_forms():
    x = torch.randn(2, 16, 5, 6)
    pair = layer(PairwiseAttention, "subtraction").attention(x)
    assert pair.shape == (2, 2, 9, 5, 6)
    assert torch.allclose(pair.sum(2), torch.ones(()), atol=1e-5)
    patch = layer(PatchwiseAttention, "concatenation").attention(x)
    assert patch.min() < 0
    free = layer(PairwiseAttention, "subtraction", attention="linear").attention(x)
    assert free.min() < 0


def test_neighbours_compete_in_the_patchwise_form_alone(double):
    """One corner changes: the shares of the other neighbours among themselves stay in the pairwise form, not here."""
    x = torch.randn(1, 16, 3, 3)
    changed = x.clone()
    changed[:, :, 0, 0] += torch.randn(1, 16)
    others = [t for t in range(9) if t != 0]
    apart = {}
    for cls, relation, options in (
        (PairwiseAttention, "subtraction", {"attention": "linear"}),
        (PairwiseAttention, "subtraction", {}),
        (PatchwiseAttention, "concatenation", {}),
    ):
        attention = layer(cls, relation, **options)
        before, after = (attention.attention(v)[0, :, others, 1, 1] for v in (x, changed))
        apart[options.get("attention", cls.__name__)] = (before - after).abs().max()
        if relation == "subtraction":
            ratio = (before / before[:, :1]) - (after / after[:, :1])
            assert ratio.abs().max() < 1e-11  # the soft-max gives all of them one factor
    assert apart["linear"] < 1e-13
    assert apart["PairwiseAttention"] > 1e-5
    assert apart["PatchwiseAttention"] > 1e-2


@pytest.mark.parametrize(("cls", "relation"), RELATIONS)
def test_gradients(double, cls, relation):
    attention = layer(cls, relation)
    x = torch.randn(1, 16, 3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(attention, (x,), fast_mode=True)


@pytest.mark.parametrize("kind", ["pairwise", "patchwise"])
def test_half_precision(kind):
    network = SANClassifier(num_classes=3, options={"kind": kind, "layers": [1], "widths": [32], "kernels": [3]})
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("cls", [PairwiseAttention, PatchwiseAttention])
def test_takes_the_place_of_a_convolution(cls):
    network = timm.create_model("resnet18", num_classes=4)
    report = convert(network, cls, "layer4.1.conv2", replaces=nn.Conv2d, kernel_size=3)
    assert [change.old for change in report.changes] == ["Conv2d"]
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert isinstance(network.layer4[1].conv2, cls)
    mobile = timm.create_model("mobilenetv3_small_100", num_classes=4)
    assert len(convert(mobile, cls, "blocks.[234]*conv_dw", replaces=nn.Conv2d).changes) > 4
    mobile(torch.randn(2, 3, 128, 128)).sum().backward()
    with pytest.raises(ConversionError, match="odd kernels above 1"):
        convert(network, cls, "layer4.0.downsample.0", replaces=nn.Conv2d)


def test_enters_networks_by_name():
    """The last convolutions that it can replace, or all of them; those that it cannot are listed with the reason."""
    network = timm.create_model("resnet18", num_classes=4)
    report = convert(network, "san_self_attention")
    assert [change.name for change in report.changes] == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
    report.undo()
    report = convert(network, "san_self_attention", last=None)
    assert len(report.changes) == 16
    assert [name for name, _ in report.left_alone] == ["conv1"]
    assert "16 channels" in report.left_alone[0][1]
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    report.undo()
    assert not any(isinstance(m, PatchwiseAttention) for m in network.modules())
    regnet = timm.create_model("regnetx_002", num_classes=4)  # grouped
    with pytest.raises(ConversionError, match="one group or one for each channel"):
        convert(regnet, "san_self_attention")
    convnext = timm.create_model("convnext_atto", num_classes=4)
    report = convert(convnext, "san_self_attention", kind="pairwise", relation="dot", last=4)
    assert len(report.changes) == 4
    assert {m.relation for m in convnext.modules() if isinstance(m, PairwiseAttention)} == {"dot"}
    assert {r for _, r in report.left_alone if "2 x 2" in r} == {"a reflected border of 3 does not fit its map, 2 x 2"}
    for options in ({"kind": "hard"}, {"relation": "minus"}, {"chunk": 0}, {"last": 0}):
        with pytest.raises(ConversionError, match=str(next(iter(options.values())))):
            convert(network, "san_self_attention", **options)
    assert not any(isinstance(m, PatchwiseAttention) for m in network.modules())


def test_small_images_and_bad_arguments_are_named():
    with pytest.raises(ValueError, match="128 pixels"):
        SAN(layers=(1, 1, 1, 1, 1), widths=(32,) * 5)(torch.zeros(1, 3, 96, 128))
    with pytest.raises(ValueError, match="at least 4 x 4"):
        PairwiseAttention(16, 16)(torch.zeros(1, 16, 3, 8))
    with pytest.raises(ValueError, match="G a divisor of 4"):
        aggregate(torch.zeros(1, 4, 5, 5), torch.zeros(1, 3, 9, 5, 5), kernel_size=3)
    for options in ({"kernel_size": 4}, {"relation": "minus"}, {"share": 5}, {"chunk": 0}, {"stride": 0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            PatchwiseAttention(16, 16, **options)
    with pytest.raises(ValueError, match="hard"):
        PairwiseAttention(16, 16, attention="hard")
    with pytest.raises(ValueError, match="global"):
        SAN(kind="global")
    with pytest.raises(ValueError, match="length"):
        SAN(layers=(1, 1))
    with pytest.raises(ValueError, match="san12_pairwise"):
        SANClassifier.named("san12_pairwise")
    assert list(LAYERS) == ["san10", "san15", "san19"]
