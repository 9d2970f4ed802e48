"""NASNet: the release on copied weights, timm's weights, all operations by hand, dropped paths, cells as data."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial

import pytest
import timm
import torch
from timm.layers.pool2d_same import AvgPool2dSame
from torch import Tensor, nn

from torchive.methods.backbones.nasnet import (
    NASNET_A,
    OPERATIONS,
    CellBlock,
    CellPlan,
    Genotype,
    NASNet,
    ScheduledDropPath,
    SearchedCell,
    load_timm,
)
from torchive.methods.backbones.nasnet.operations import MeanPool
from torchive.nn import PooledNetwork
from torchive.nn.auxiliary import AuxiliaryClassifier, AuxiliaryHead

#: The authors' TensorFlow files as kept in a copy of research/slim.
REPOSITORY = "tensorflow/models (research/slim, copy in lizhaoliu-Lec/slim)"
COMMIT = "63cfbdc0eb81e7f24f357d1442d051cd8dc73f3b"
#: variant -> N, F, channels of the first convolution, size of the image; of the stored outputs.
RELEASED = {"mobile": (2, 12, 8, (33, 46)), "large": (2, 8, 8, (40, 37)), "cifar": (1, 6, 12, (9, 12))}


def formula(shape: object, phase: float, scale: float) -> Tensor:
    """The numbers that the release's variables and inputs were filled with."""
    i = (torch.arange(torch.Size(shape).numel()) % 10007).double()  # type: ignore[arg-type]
    return (scale * (1.7 * i + phase + 0.011 * i * i).sin()).reshape(tuple(shape))  # type: ignore[arg-type]


def in_order(network: NASNet) -> Iterator[nn.Module]:
    """The parts in the order in which the release makes its variables."""
    yield from network.stem
    for cell in network.cells:
        yield from (*cell.before.modules(), *cell.last.modules())
        for left, right in zip(cell.left, cell.right, strict=True):
            yield from (*left.modules(), *right.modules())
        yield from cell.out.modules()


def fill(parts: Iterator[nn.Module]) -> None:
    """The release's values, in its order."""
    i = 0
    for part in parts:
        if not isinstance(part, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            continue
        for name, t in [*part.named_parameters(), *part.named_buffers()]:
            if name.endswith("tracked"):
                continue
            fresh = formula(t.shape, 0.3 * i, 0.1)
            if t.ndim == 4:
                fresh = formula(t.shape, 0.3 * i, (2 / t[0].numel()) ** 0.5)
            elif t.ndim == 2:
                fresh = formula(t.shape, 0.3 * i, (2 / t.shape[1]) ** 0.5)
            elif name == "running_var":
                fresh = 1 + 3 * fresh
            elif name == "weight":
                fresh = 1 + 2 * fresh
            t.data.copy_(fresh)
            i += 1


def keep(into: dict[str, Tensor], name: str, part: nn.Module, inputs: object, output: Tensor) -> None:
    into[name] = output


def test_equals_the_release(double, record, parity):
    """Three networks in float64: averaged features, inner maps, gradients and a step; the auxiliary head."""
    stored = parity("nasnet")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}

    def note(key: str, found: Tensor, name: str) -> None:
        expected = stored[name]
        assert found.shape == expected.shape, name
        worst[key] = max(worst[key], ((found - expected).abs().max() / expected.abs().max()).item())

    for variant, (repeats, channels, stem, size) in RELEASED.items():
        network = NASNet(variant, repeats=repeats, channels=channels, stem_channels=stem).eval()
        fill(in_order(network))
        seen: dict[str, Tensor] = {}
        before = 0 if variant == "cifar" else 2
        for name, part in (
            ("Stem", network.cells[1] if before else network.stem),
            ("Reduction_Cell_0", network.cells[before + repeats]),
            ("Reduction_Cell_1", network.cells[before + 2 * repeats + 1]),
        ):
            part.register_forward_hook(partial(keep, seen, name))
        x = formula([2, 3, *size], 0.1, 1.0).requires_grad_()
        y = network(x)[-1].mean((2, 3))
        (y * formula(y.shape, 0.5, 1.0)).mean().backward()
        note("output", y, f"{variant}:y")
        for name, inner in seen.items():
            note("output", inner[0], f"{variant}:{name}")
        note("gradient", x.grad[0, :, ::3, ::3], f"{variant}:dx")
        note("gradient", network.stem[0].weight.grad, f"{variant}:g0")
        torch.optim.SGD(network.parameters(), lr=0.5).step()
        with torch.no_grad():
            note("optimiser_step", network(x)[-1].mean((2, 3)), f"{variant}:next")
    head = AuxiliaryHead(6, 5).eval()
    fill(head.modules())
    note("output", head(formula([2, 6, 17, 17], 0.1, 1.0)), "auxiliary")
    largest = max(worst.values())
    assert largest < 1e-12, worst
    record(
        "nasnet",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=largest,
        differences="relative to the largest value",
        **worst,
    )


def test_keeps_as_the_release_does(parity):
    """The release's shares for cells and steps of its network for small images, which it computes in float32."""
    cells = ((0, 0), (0, 937_500), (10, 500_000), (19, 937_500), (19, 0), (19, 2_000_000))
    for (cell, step), expected in zip(cells, parity("nasnet")["keep"].tolist(), strict=True):
        path = ScheduledDropPath(drop=0.4, place=(cell + 1) / 20)
        path.before_step(step / 937_500)
        assert path.keep.item() == pytest.approx(expected, abs=1e-6)


def test_dropped_paths():
    """Whole samples are dropped, the mean stays; nothing at the start and in evaluation; all of it at the end."""
    network = NASNet("cifar", repeats=1, channels=4, stem_channels=4, drop=0.4)
    paths = [[p for p in cell.paths if isinstance(p, ScheduledDropPath)] for cell in network.cells]
    assert [len(row) for row in paths] == [8, 9, 8, 9, 8]  # all but the identities
    assert all(path.keep == 1 for row in paths for path in row)
    for part in network.modules():
        if hasattr(part, "before_step"):
            part.before_step(1.0)
    for number, row in enumerate(paths):
        assert all(path.keep.item() == pytest.approx(1 - 0.4 * (number + 1) / 5) for path in row)
    path, x = paths[-1][0], torch.ones(40_000, 2, 1, 1)
    y = path(x)
    assert torch.equal(y[:, 0], y[:, 1])
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert abs(y.mean().item() - 1) < 4 * (0.4 / 0.6 / 40_000) ** 0.5
    assert path(torch.ones(2000, 1, 1, 1, dtype=torch.bfloat16)).max().item() == pytest.approx(1 / 0.6, rel=0.01)
    assert path.eval()(x) is x
    path.train().before_step(0.0)
    assert torch.equal(path(x), x)
    constant = ScheduledDropPath(drop=0.4, place=0.5, scheduled=False)
    constant.before_step(0.0)
    assert constant.keep.item() == pytest.approx(0.8)
    assert not any(isinstance(part, ScheduledDropPath) for part in NASNet("cifar", repeats=1, channels=4).modules())
    assert not any("keep" in name for name in network.state_dict())


def test_is_timms_network():
    """timm's weights load and give its maps, once its strided means leave their padding out as TensorFlow's do."""
    classifier = timm.create_model("nasnetalarge").eval()
    for part in classifier.modules():  # away from the start, where the signal dies without batch statistics
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.8, 1.5)
            nn.init.normal_(part.bias)
    network = load_timm(NASNet("large"), classifier.state_dict()).eval()
    with torch.no_grad():
        maps = network(x := torch.randn(1, 3, 75, 91))
        theirs = classifier.cell_stem_0(classifier.conv0(x)).relu()
        assert (theirs - maps[1]).abs().max() > 0.01
        assert (theirs - maps[1])[:, :, 2:-2, 2:-2].abs().max() < 1e-5  # at the border alone
        for name, part in list(classifier.named_modules()):
            if isinstance(part, AvgPool2dSame):
                parent, _, own = name.rpartition(".")
                setattr(classifier.get_submodule(parent), own, MeanPool(2))
        expected = classifier.forward_intermediates(x, intermediates_only=True)
        expected[0] = expected[0].relu()
        for ours, map_ in zip(maps, expected, strict=True):
            assert (ours - map_).abs().max() <= 1e-5 * map_.abs().max()
    with pytest.raises(ValueError, match="others, such as"):
        load_timm(NASNet("large", repeats=1, channels=4), classifier.state_dict())
    with pytest.raises(ValueError, match=r"has shape"):
        load_timm(NASNet("large", stem_channels=95), classifier.state_dict())


def test_sizes_and_parameters():
    """6 @ 4032 and 4 @ 1056; a normal cell gives 6 F channels, a reduction 4 F and half of the size."""
    with torch.device("meta"):
        for variant, count, classes, last in (
            ("large", 88_753_150, 1000, 4032),  # the paper's 88.9 million
            ("mobile", 5_289_978, 1000, 1056),  # 5.3 million
            ("cifar", 3_346_538, 10, 768),  # 3.3 million
        ):
            network = NASNet(variant)
            assert network.levels[-1].channels == last
            whole = PooledNetwork(network, num_classes=classes)
            assert sum(p.numel() for p in whole.parameters()) == count
        assert sum(p.numel() for p in timm.create_model("nasnetalarge").parameters()) == 88_753_150
        maps = NASNet("large", repeats=1)(torch.empty(1, 3, 331, 331))
        assert [m.shape[-1] for m in maps] == [165, 83, 42, 21, 11]
        assert [m.shape[1] for m in maps] == [96, 168, 1008, 2016, 4032]
        x, before = torch.empty(1, 20, 9, 12), torch.empty(1, 12, 18, 24)
        normal = SearchedCell(NASNET_A.normal, 8, in_channels=(20, 12), shrink=True)
        assert normal(x, before).shape == (1, 48, 9, 12)
        reduction = SearchedCell(NASNET_A.reduction, 8, in_channels=(20, 20), stride=2)
        assert reduction(x, x).shape == (1, 32, 5, 6)


def window(x: Tensor, k: tuple[int, int], stride: tuple[int, int], gap: int) -> Iterator[tuple[int, int, Tensor]]:
    """Each output position with its window, NaN outside of the map; borders as TensorFlow's "SAME"."""
    height, width = x.shape[-2:]
    starts = []
    for side, taps, step in ((height, k[0], stride[0]), (width, k[1], stride[1])):
        count = -(-side // step)
        missing = max((count - 1) * step + gap * (taps - 1) + 1 - side, 0)
        starts.append([i * step - missing // 2 for i in range(count)])
    for i, top in enumerate(starts[0]):
        for j, left in enumerate(starts[1]):
            patch = x.new_full((*x.shape[:2], *k), float("nan"))
            for a in range(k[0]):
                for b in range(k[1]):
                    row, column = top + gap * a, left + gap * b
                    if 0 <= row < height and 0 <= column < width:
                        patch[..., a, b] = x[..., row, column]
            yield i, j, patch


def slow(x: Tensor, module: nn.Module, kind: str, k: tuple[int, int], stride: int = 1, gap: int = 1) -> Tensor:
    """A pool, or a convolution with the weights of ``module``, one output position after the other."""
    steps = (stride if k[0] > 1 or k[1] == 1 else 1, stride if k[1] > 1 or k[0] == 1 else 1)
    found: dict[tuple[int, int], Tensor] = {}
    for i, j, patch in window(x, k, steps, gap):
        if kind == "max":
            found[i, j] = patch.nan_to_num(float("-inf")).amax((2, 3))
        elif kind == "mean":
            found[i, j] = patch.nanmean((2, 3))
        elif kind == "depth":
            found[i, j] = (patch.nan_to_num(0) * module.weight[:, 0]).sum((2, 3))
        else:
            found[i, j] = torch.einsum("nckl,ockl->no", patch.nan_to_num(0), module.weight)
    rows, columns = max(found)[0] + 1, max(found)[1] + 1
    return torch.stack(list(found.values()), -1).unflatten(-1, (rows, columns))


def slow_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def slow_operation(name: str, x: Tensor, module: nn.Module, channels: int, stride: int) -> Tensor:
    """An operation of the paper's list by its name."""
    kind, _, size = name.partition("_")
    side = int(size[0]) if size else 1
    if kind in ("average", "max"):
        pool = slow(x, module, "max" if kind == "max" else "mean", (side, side), stride)
        return pool if x.shape[1] == channels else slow_norm(slow(pool, module[1], "full", (1, 1)), module[2])
    if kind == "identity" and x.shape[1] == channels and stride == 1:
        return x
    if kind == "separable":
        for first, step in ((1, stride), (5, 1)):
            x = slow(x.relu(), module[first], "depth", (side, side), step)
            x = slow_norm(slow(x, module[first + 1], "full", (1, 1)), module[first + 2])
        return x
    if kind == "line":
        for first, taps in ((1, (1, side)), (4, (side, 1))):
            x = slow_norm(slow(x.relu(), module[first], "full", taps, stride), module[first + 1])
        return x
    gap = 2 if kind == "dilated" else 1
    return slow_norm(slow(x.relu(), module[1], "full", (side, side), stride, gap), module[2])


def slow_halving(x: Tensor, module: nn.Module) -> Tensor:
    shifted = torch.zeros_like(x)
    shifted[..., :-1, :-1] = x[..., 1:, 1:]
    parts = [slow(x, module.first, "full", (1, 1), 2), slow(shifted, module.second, "full", (1, 1), 2)]
    return slow_norm(torch.cat(parts, 1), module.norm)


def slow_cell(cell: SearchedCell, last: Tensor, before: Tensor, channels: int, stride: int, shrink: bool) -> Tensor:
    """A cell from its plan, with the weights of ``cell``."""
    states = [slow_norm(slow(last.relu(), cell.last[1], "full", (1, 1)), cell.last[2])]
    inner = None if shrink else slow(before.relu(), cell.before[1], "full", (1, 1))
    states.append(slow_halving(before.relu(), cell.before[1]) if inner is None else slow_norm(inner, cell.before[2]))
    for number, block in enumerate(cell.plan.blocks):
        results = []
        for (state, name), modules in ((block.left, cell.left), (block.right, cell.right)):
            step = stride if state < 2 else 1
            results.append(slow_operation(name, states[state], modules[number], channels, step))
        states.append(sum(results) if block.combine == "add" else torch.cat(results, 1))
    for state in {0, 1} & set(cell.plan.output) if stride == 2 else ():
        states[state] = slow_halving(states[state], cell.out[cell.plan.output.index(state)])
    return torch.cat([states[state] for state in cell.plan.output], 1)


ALL = list(OPERATIONS)
#: All operations, on either input and on inner states; states that go out without being read, and concatenation.
EVERYTHING = CellPlan(
    (
        CellBlock((0, ALL[0]), (1, ALL[1])),
        CellBlock((1, ALL[2]), (0, ALL[3]), combine="concat"),
        CellBlock((3, ALL[4]), (1, ALL[5])),
        CellBlock((0, ALL[6]), (3, ALL[7])),
        CellBlock((0, ALL[8]), (0, ALL[9])),
        CellBlock((4, ALL[10]), (0, ALL[11])),
        CellBlock((0, ALL[12]), (2, ALL[3])),
    ),
    output=(0, 1, 3, 5, 6, 7, 8),
)


def test_equations_by_hand(double, record):
    """The paper's two cells, and one of all operations, at both strides and with both inputs, on odd and even sides."""
    worst = 0.0
    for plan, stride, shrink in (
        (NASNET_A.normal, 1, False),
        (NASNET_A.normal, 1, True),
        (NASNET_A.reduction, 2, False),
        (EVERYTHING, 1, False),
        (EVERYTHING, 2, True),
    ):
        cell = SearchedCell(plan, 4, in_channels=(3, 5), stride=stride, shrink=shrink).eval()
        fill(cell.modules())
        last = torch.randn(1, 3, 4, 5)
        before = torch.randn(1, 5, *((8, 9) if shrink else (4, 5)))
        with torch.no_grad():
            expected = slow_cell(cell, last, before, 4, stride, shrink)
            found = cell(last, before)
        assert found.shape == expected.shape == (1, plan.multiple * 4, *((2, 3) if stride == 2 else (4, 5)))
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
    assert worst < 1e-13
    record("nasnet", "referenced", largest_difference=worst, dtype="float64")


def drawn(rng: random.Random) -> CellPlan:
    """A cell of five blocks, uniformly from the paper's space."""
    edges = [(rng.randrange(i // 2 + 2), rng.choice(ALL)) for i in range(10)]
    return CellPlan(tuple(CellBlock(*edges[i : i + 2], combine=rng.choice(["add", "concat"])) for i in range(0, 10, 2)))


@pytest.mark.parametrize("seed", range(4))
def test_cells_as_data(seed):
    """Any cells of the space: printed, through JSON and back, built, and trained by a step on both stems."""
    rng = random.Random(seed)
    lines = str(NASNET_A).splitlines()
    assert lines[1] == "  h2 = separable_5x5(h0) + separable_3x3(h1)"
    assert lines[6] == "  out = [h1, h2, h3, h4, h5, h6]"
    genotype = Genotype(drawn(rng), drawn(rng))
    values = json.loads(json.dumps(genotype.to_dict()))
    assert Genotype.from_dict(values) == genotype
    assert str(genotype).count("\n") == 13
    for plan in (genotype.normal, genotype.reduction):
        read = {state for block in plan.blocks for state, _ in (block.left, block.right)}
        assert set(plan.output) == set(range(7)) - read
    for variant, size in (("mobile", 35), ("cifar", 13)):
        network = NASNet(variant, genotype=values, repeats=1, channels=4, stem_channels=4, drop=0.2)
        maps = network(torch.randn(2, 3, size, size + 4))
        assert [m.shape[1] for m in maps] == [level.channels for level in network.levels]
        maps[-1].mean().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_auxiliary_classifier():
    """The second head reads the map before the last reduction; it has 0.4 of the loss."""
    backbone = NASNet("mobile", repeats=1, channels=4, stem_channels=4, drop=0.3)
    system = AuxiliaryClassifier(backbone, num_classes=3, drop=0.5, weight=0.4, pool=1, kernel_size=1, widths=(8, 16))
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 2, 1, 1])
    sum(system.losses(x, y).values()).backward()
    assert all(p.grad is not None for p in system.parameters())
    with torch.no_grad():
        inner = system.eval().backbone(x)[-2]
        assert inner.shape == (4, 48, 4, 4)
        expected = 0.4 * nn.functional.cross_entropy(system.auxiliary(inner), y)
        assert torch.allclose(system.losses(x, y)["auxiliary"], expected)


@pytest.mark.slow
def test_one_file_for_images_of_every_size(tmp_path):
    from torchive.engine.export import OnnxModel, gap_to_torch, write_onnx

    backbone = NASNet(variant="mobile", repeats=1, channels=12, stem_channels=4)
    network = PooledNetwork(backbone, num_classes=4).eval()
    structure = write_onnx(network, torch.rand(2, 3, 32, 48), tmp_path / "model.onnx")
    onnx = OnnxModel(tmp_path / "model.onnx", structure)
    for size in ((3, 3, 32, 48), (2, 3, 64, 40), (2, 3, 33, 57)):
        assert gap_to_torch(network, onnx, torch.rand(size)) < 1e-4


def test_what_is_refused():
    block = CellBlock((0, "identity"), (1, "identity"))
    for call, match in (
        (lambda: NASNet("huge"), "huge"),
        (lambda: NASNet(repeats=0), "got 0, 44 and 32"),
        (lambda: NASNet(channels=6), "in fours.*got 4, 6"),
        (lambda: NASNet(repeats=1, channels=4)(torch.randn(1, 3, 2, 9)), "at least 3.*2, 9"),
        (lambda: NASNet(repeats=1, channels=4)(torch.randn(1, 4, 9, 9)), r"\(N, 3, H, W\).*4, 9"),
        (lambda: ScheduledDropPath(drop=1.0), "got 1.0"),
        (lambda: ScheduledDropPath(drop=0.1, place=0.0), "0.1 and 0.0"),
        (lambda: CellPlan((block, CellBlock((3, "identity"), (0, "identity")))), "0 to 2, got 3"),
        (lambda: CellPlan((CellBlock((0, "conv"), (0, "identity")),)), "conv"),
        (lambda: CellPlan((CellBlock((0, "identity"), (0, "identity"), combine="mean"),)), "mean"),
        (lambda: CellPlan((block,), output=(3,)), r"\(3,\)"),
        (lambda: CellPlan(()), "0 blocks"),
        (lambda: Genotype.from_dict({"normal": {}}), r"\['normal'\]"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
