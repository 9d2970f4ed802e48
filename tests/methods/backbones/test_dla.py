"""Deep layer aggregation: trees and chains by hand, the release on copied weights, upsampling, decoders, any size."""

from __future__ import annotations

import re
import zlib

import pytest
import timm
import torch
from timm.models.dla import DlaBasic, DlaTree
from torch import Tensor, nn

from torchive.methods.backbones.dla import (
    DLA,
    AggregationNode,
    BilinearUp,
    DLASegmenter,
    DLAUp,
    HierarchicalAggregation,
    IDAUp,
    IterativeAggregation,
)
from torchive.nn import PooledNetwork, Segmenter

REPOSITORY, COMMIT = "ucbdrive/dla", "d477ceb8036ae402f3c7b59ead54963cf864903b"
#: Parameters with 1,000 classes: of the release, and of those the ones that take part.
RELEASE = {
    "dla34": (15_783_832, 15_742_104),
    "dla46_c": (1_309_848, 1_301_400),
    "dla46x_c": (1_076_888, 1_068_440),
    "dla60x_c": (1_336_728, 1_319_832),
    "dla60": (22_334_104, 22_036_632),
    "dla60x": (17_649_816, 17_352_344),
    "dla102": (33_731_736, 33_268_888),
    "dla102x": (26_772_120, 26_309_272),
    "dla102x2": (41_745_048, 41_282_200),
    "dla169": (53_989_016, 53_389_720),
}


def formula(shape: object, phase: float, scale: float) -> Tensor:
    """The numbers that the release's variables and inputs were filled with."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)  # type: ignore[arg-type]
    return (scale * (1.7 * i + phase + 0.011 * i * i).sin()).reshape(tuple(shape))  # type: ignore[arg-type]


def fill(module: nn.Module, rename) -> nn.Module:
    """Every tensor by a formula of its name in the release."""
    for ours, tensor in module.state_dict().items():
        name = rename(ours)
        if name is None or name.endswith("num_batches_tracked"):
            continue
        phase = zlib.crc32(name.encode()) % 1000 * 0.01
        if tensor.ndim == 4:
            values = formula(tensor.shape, phase, (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            values = 1 + formula(tensor.shape, phase, 0.3)
        elif name.endswith("weight"):
            values = 1 + formula(tensor.shape, phase, 0.2)
        else:
            values = formula(tensor.shape, phase, 0.1)
        tensor.copy_(values)
    return module


def theirs(name: str) -> str | None:
    """A name of ours in the release."""
    if name == "up.weight":
        return None  # bilinear in both
    name = re.sub(r"^head\.", "fc.0.", name).replace("backbone.body.", "base.").replace("body.", "")
    name = re.sub(r"^decoder\.passes\.", "dla_up.ida_", name)
    if not name.startswith("dla_up."):
        return name
    name = re.sub(r"\.(project|up)\.(\d)", lambda m: f".{'proj' if m[1] == 'project' else 'up'}_{m[2]}", name, count=1)
    node = re.search(r"\.nodes\.(\d)\.(conv|norm)", name)
    if node:
        name = name.replace(node[0], f".node_{int(node[1]) + 1}.{'0' if node[2] == 'conv' else '1'}")
    return name


def objective(maps: list[Tensor]) -> Tensor:
    return sum((m * formula(m.shape, 0.5 * i, 1.0)).mean() for i, m in enumerate(maps))  # type: ignore[return-value]


CASES = {
    "basic": {"layers": [1, 1, 1, 2, 2, 1], "widths": [4, 4, 8, 8, 12, 16]},
    "residual_root": {"variant": "dla102", "layers": [1, 2, 1, 3, 1, 1], "widths": [4, 4, 8, 8, 12, 16]},
    "grouped": {"variant": "dla46x_c", "layers": [1, 1, 1, 2, 1, 1], "widths": [4, 8, 32, 32, 64, 64]},
}


def test_equals_the_release(double, record, parity):
    """Their backbone with each block, and their dense network at strides 2 and 4: values, gradients, a step."""
    stored = parity("dla")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}

    def note(key: str, found: Tensor, name: str) -> None:
        scale = stored[name].abs().max().clamp(min=1)
        worst[key] = max(worst[key], ((found - stored[name]).abs().max() / scale).item())

    for case, options in CASES.items():
        network = fill(DLA(**options), theirs).eval()
        x = formula([2, 3, 32, 64], 0.1, 1.0).requires_grad_()
        with torch.no_grad():
            for i, m in enumerate(network(x)[2:]):
                note("output", m, f"{case}:eval{i}")
        maps = network.train()(x)
        objective(maps).backward()
        note("output", maps[2][0], f"{case}:train")
        note("gradient", x.grad[0, :, ::3, ::3], f"{case}:dx")
        note("gradient", network.body.base_layer[0].weight.grad, f"{case}:g0")
        torch.optim.SGD(network.parameters(), lr=0.05).step()
        with torch.no_grad():
            note("optimiser_step", network.eval()(x)[-2][0], f"{case}:next")
    target = (torch.arange(2 * 32 * 64) * 7 % 3).view(2, 32, 64)
    for stride in (2, 4):
        case, backbone = f"seg{stride}", DLA(layers=[1, 1, 1, 2, 1, 1], widths=[4, 4, 8, 8, 12, 16])
        network = fill(DLASegmenter(backbone, num_classes=3, stride=stride), theirs).train()
        x = formula([2, 3, 32, 64], 0.1, 1.0).requires_grad_()
        logits = network(x)
        nn.functional.cross_entropy(logits, target).backward()
        note("output", logits.log_softmax(1)[0, :, ::3, ::3], f"{case}:y")
        note("gradient", x.grad[0, :, ::3, ::3], f"{case}:dx")
        note("gradient", network.decoder.passes[0].up[1].weight.grad, f"{case}:g")
        torch.optim.SGD(network.parameters(), lr=0.05).step()
        network.eval()
        with torch.no_grad():
            joined = network.decoder(network.backbone(x)[network.skipped :])
            note("optimiser_step", network.head(joined)[1], f"{case}:next")
    largest = max(worst.values())
    assert largest < 1e-9, worst  # zero on the CPU that the release ran on; batch norm makes 1e-11 of 1e-16 elsewhere
    record(
        "dla",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=largest,
        cases=len(CASES) + 2,
        **worst,
    )


def by_hand(node: AggregationNode, maps: list[Tensor]) -> Tensor:
    """relu(BN(W [x_1; ...]) + x_1) in evaluation, number by number."""
    weight, norm = node.conv.weight, node.norm
    side = node.conv.kernel_size[0] // 2
    channels = [row for m in maps for row in m[0]]
    height, width = maps[0].shape[-2:]
    result = torch.zeros(1, len(weight), height, width)
    for o in range(len(weight)):
        for y in range(height):
            for x in range(width):
                total = 0.0
                for c, plane in enumerate(channels):
                    for dy in range(-side, side + 1):
                        for dx in range(-side, side + 1):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                total += float((weight[o, c, dy + side, dx + side] * plane[y + dy, x + dx]).detach())
                total = (total - float(norm.running_mean[o])) / float(norm.running_var[o] + norm.eps) ** 0.5
                total = total * float(norm.weight[o]) + float(norm.bias[o])
                result[0, o, y, x] = max(total + (float(maps[0][0, o, y, x]) if node.residual else 0.0), 0.0)
    return result


def shaken(module: nn.Module) -> nn.Module:
    fill(module, lambda name: name)
    return module.eval()


class Affine(nn.Module):
    """A block of one line: a x + b."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + self.b


@pytest.mark.parametrize("residual", [False, True])
def test_equations_by_hand(double, record, residual):
    """Nodes, a chain of four maps and a tree of eight blocks against equations 1 to 5, written out."""
    maps = [torch.randn(1, 3, 3, 4) for _ in range(4)]
    chain = shaken(IterativeAggregation([3, 3, 3, 3]))
    expected = maps[0]
    for node, m in zip(chain.nodes, maps[1:], strict=True):  # I(N(x1, x2), x3, ...)
        expected = by_hand(node, [expected, m])
    worst = (chain(maps) - expected).abs().max().item()

    blocks = [Affine(0.9 - 0.1 * i, 0.05 * i) for i in range(8)]
    tree = shaken(HierarchicalAggregation(blocks, channels=3, child_channels=[2], residual=residual))
    x, child = maps[0], torch.randn(1, 2, 3, 4)
    pairs = [n for n in tree.modules() if isinstance(n, AggregationNode)]
    assert [node.count for node in pairs] == [2, 3, 2, 5]
    finished: list[Tensor] = []
    for pair in range(4):  # the trees that end at pair p: one level for each trailing one bit
        x = blocks[2 * pair](x)
        second = blocks[2 * pair + 1](x)
        earlier = {0: [], 1: [0], 2: [], 3: [1, 2]}[pair]  # R_(n-1), ..., R_1 of the tree that ends here
        extra = [child] if pair == 3 else []
        outputs = [second, x, *extra, *(finished[i] for i in earlier)]
        node = pairs[pair]
        assert node.count == len(outputs)
        x = by_hand(node, outputs)
        finished.append(x)
    worst = max(worst, (tree(maps[0], [child]) - x).abs().max().item())
    assert worst < 1e-13
    if residual:
        record("dla", "referenced", largest_difference=worst, dtype="float64")


def test_a_tree_of_one_level_with_identity_blocks(double):
    tree = HierarchicalAggregation([nn.Identity(), nn.Identity()], channels=2).eval()
    tree.node.conv.weight.data = torch.tensor([[1.0, 0, 2, 0], [0, -1, 0, 0.5]])[..., None, None]
    x = torch.tensor([[[[1.0]], [[-4.0]]]])
    scale = (1 + 1e-5) ** -0.5
    assert torch.allclose(tree(x), torch.tensor([[[[3.0]], [[2.0]]]]) * scale)  # 1 + 2, and 4 - 2


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_the_combinator_is_timms_tree(double, levels, residual):
    theirs_ = DlaTree(levels, DlaBasic, 6, 6, 1, level_root=True, root_shortcut=residual).eval()
    blocks = [m for m in theirs_.modules() if isinstance(m, DlaBasic)]
    tree = HierarchicalAggregation(blocks, channels=6, child_channels=[6], residual=residual).eval()
    roots = [m for name, m in theirs_.named_modules() if name.endswith("root")]
    for node, root in zip((m for m in tree.modules() if isinstance(m, AggregationNode)), roots, strict=True):
        node.conv.weight.data, node.norm = root.conv.weight.data, root.bn
    x = torch.randn(2, 6, 5, 7)
    assert (tree(x, [x]) - theirs_(x)).abs().max() < 1e-13


def test_one_map_is_itself_and_shallow_maps_are_refined_most():
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(IterativeAggregation([3])([x]), x)
    assert [node.count for node in IterativeAggregation([3, 5, 7], out_channels=4).nodes] == [2, 2]
    with pytest.raises(ValueError, match="expected 3 maps, got 2"):
        IterativeAggregation([3, 3, 3])([x, x])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bilinear_start(double, factor):
    """Constants, ramps and anything else in the interior, as F.interpolate gives them."""
    up = BilinearUp(3, factor=factor)
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    for m in (torch.ones(7, 9), 2 * y + 3 * x, torch.randn(7, 9)):
        m = m.expand(1, 3, -1, -1)
        expected = nn.functional.interpolate(m, scale_factor=factor, mode="bilinear")
        inside = (..., slice(factor, -factor), slice(factor, -factor))
        assert (up(m)[inside] - expected[inside]).abs().max() < 1e-12
    assert up(m).shape == expected.shape
    assert up.weight.requires_grad
    assert not list(BilinearUp(3, factor=factor, fixed=True).parameters())
    assert torch.equal(BilinearUp(3, factor=1)(m), m)
    with pytest.raises(ValueError, match="even"):
        BilinearUp(3, factor=3)


def test_every_level_ends_at_the_finest_resolution():
    channels, strides = [8, 12, 16, 20], [4, 8, 16, 32]
    decoder = DLAUp(channels, strides=strides)
    assert [len(ida.nodes) for ida in decoder.passes] == [1, 2, 3]
    assert [[up.factor for up in ida.up] for ida in decoder.passes] == [[1, 2], [1, 2, 2], [1, 2, 2, 2]]
    maps = [torch.randn(1, c, 64 // s, 96 // s, requires_grad=True) for c, s in zip(channels, strides, strict=True)]
    joined = decoder(maps)
    assert joined.shape == (1, 8, 16, 24)
    joined.sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in maps)
    first = IDAUp([8, 12], 8, factors=[1, 2])
    assert first([maps[0], maps[1]])[0].shape == maps[0].shape


@pytest.mark.parametrize("variant", RELEASE)
def test_named_networks(variant):
    """The release's counts: timm's are without the projections of deeper trees, which the release never uses."""
    whole, used = RELEASE[variant]
    with torch.device("meta"):
        network = PooledNetwork(DLA(variant))
        assert sum(p.numel() for p in network.parameters()) == used
        trees = [m for m in network.modules() if isinstance(m, DlaTree) and m.levels > 1]
        unused = 0
        for tree in trees:
            first = tree
            while first.levels > 1:
                first = first.tree1
            unused += sum(p.numel() for p in first.project.parameters()) * (tree.levels - first.levels > 0)
    assert whole - used == unused
    assert [level.stride for level in network.backbone.levels] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("variant", ["dla34", "dla60"])
def test_is_timms_network(variant):
    """On copied weights, at a size that is a multiple of 32."""
    network, classifier = DLA(variant).eval(), timm.create_model(variant).eval()
    missing = network.body.load_state_dict(classifier.state_dict(), strict=False)
    assert not missing.missing_keys
    assert missing.unexpected_keys == ["fc.weight", "fc.bias"]
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        pooled = network(x)[-1].mean((2, 3), keepdim=True)
        assert torch.allclose(classifier.fc(pooled).flatten(1), classifier(x), atol=1e-5)


def test_decoders_of_any_backbone_at_any_size():
    x = torch.randn(2, 3, 45, 70)
    for decoder in ("ida", "sum", "nested", "none"):
        for backbone in (DLA("dla46_c"), "timm/resnet10t", "torchvision/resnet18"):
            network = DLASegmenter(backbone, num_classes=5, decoder=decoder).eval()
            assert network(x).shape == (2, 5, 45, 70)
    system = Segmenter(DLASegmenter(DLA(widths=[4, 4, 8, 8, 8, 8]), num_classes=5, stride=2))
    loss = system.losses(x, torch.randint(5, (2, 45, 70)))["loss"]
    loss.backward()
    assert all(p.grad is not None for p in system.parameters())


def test_what_is_refused():
    for call, match in (
        (lambda: DLA("dla35"), "dla35"),
        (lambda: DLA(widths=[4, 4]), r"six numbers.*\(4, 4\)"),
        (lambda: DLA()(torch.randn(1, 4, 32, 32)), r"\(N, 3, H, W\), got shape \(1, 4"),
        (lambda: HierarchicalAggregation([nn.Identity()] * 3, channels=2), "got 3"),
        (lambda: AggregationNode([3, 4], 4, residual=True), "3 channels does not fit 4"),
        (lambda: DLAUp([4], strides=[4]), "two or more"),
        (lambda: DLASegmenter("timm/resnet10t", decoder="long"), "long"),
        (lambda: DLASegmenter("timm/resnet10t", stride=3), "stride 3"),
        (lambda: PooledNetwork(DLA("dla46_c"), drop=1.0), "1.0"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
