"""Bilinear CNN: explicit outer products, the authors' code on copied weights, sketch, roots, textures, the SVM."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.blocks.bilinear_cnn import (
    VGGM,
    BilinearHead,
    BilinearNetwork,
    BilinearPooling,
    CompactBilinearPool,
    TensorSketch,
    fit_svm,
    matrix_root,
    outer_mean,
    signed_root,
    triangle,
)

REPOSITORY, COMMIT = "cvl-umass/bilinear-cnn", "d6a05aa200774c97b38f753feed9032aa3764cce"


def reference(x: Tensor, y: Tensor, head: BilinearHead) -> Tensor:
    """Scores, number by number: outer products, mean, signed root, length one, linear layer."""
    eps = head.pooling.eps
    scores = torch.zeros(len(x), head.classifier.out_features)
    for n in range(len(x)):
        rows, others = x[n].flatten(1).T.tolist(), y[n].flatten(1).T.tolist()
        values = []
        for i in range(x.shape[1]):
            for j in range(y.shape[1]):
                phi = sum(a[i] * b[j] for a, b in zip(rows, others, strict=True)) / len(rows)
                values.append(math.copysign(math.sqrt(abs(phi) + eps) - math.sqrt(eps), phi))
        length = math.sqrt(sum(v * v for v in values))
        for k, (weights, bias) in enumerate(
            zip(head.classifier.weight.tolist(), head.classifier.bias.tolist(), strict=True)
        ):
            scores[n, k] = bias + sum(w * v / length for w, v in zip(weights, values, strict=True))
    return scores


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", [None, 4])
def test_equals_explicit_outer_products(double, record, second, layout):
    head = BilinearHead(6, 3, second_channels=second)
    x = torch.randn(2, 6, 4, 5).contiguous(memory_format=layout)
    y = None if second is None else torch.randn(2, second, 4, 5).contiguous(memory_format=layout)
    with torch.no_grad():
        difference = (head(x, y) - reference(x, x if y is None else y, head)).abs().max().item()
    assert difference < 1e-13
    if second is None and layout is torch.contiguous_format:
        gram = head.pooling.matrix(x)
        textures = texture_accuracies()
        record(
            "bilinear_cnn",
            "referenced",
            largest_difference=difference,
            dtype="float64",
            gram_difference=(gram - torch.einsum("bchw,bdhw->bcd", x, x) / 20).abs().max().item(),
            textures_of_equal_mean_accuracy=textures,
        )


def copied(head: BilinearHead, stored: dict[str, Tensor], case: str) -> BilinearHead:
    head.classifier.weight.data = stored[f"{case}:fc.weight"].clone()
    head.classifier.bias.data = stored[f"{case}:fc.bias"].clone()
    for i, part in enumerate(head.projections):
        part.weight.data = stored[f"{case}:feature_extractors.feature_extractors.{i}.1.weight"].flatten(2).clone()
    if head.pooling.sketch is not None:
        for i, prefix in enumerate(("", "second_")):
            setattr(head.pooling.sketch, f"{prefix}bins", stored[f"{case}:pooling_fn.count_sketch.{i}.h"])
            setattr(head.pooling.sketch, f"{prefix}signs", stored[f"{case}:pooling_fn.count_sketch.{i}.s"])
    return head


CASES: dict[str, dict[str, object]] = {
    "shared": {},
    "two": {"second_channels": 5},
    "grids": {"second_channels": 5},
    "shared_projection": {"projection": 4},
    "two_projection": {"second_channels": 5, "projection": 4},
    "root30": {"root_iterations": 30, "ridge": 0.0},
    "sketch": {"compact": "sketch", "out_channels": 16},
    "two_sketch": {"second_channels": 5, "compact": "sketch", "out_channels": 16},
    "large_sketch": {"compact": "sketch", "out_channels": 16},
    "two_large_sketch": {"second_channels": 5, "compact": "sketch", "out_channels": 16},
}


def test_matches_the_authors_code(double, record, parity):
    """Scores, gradients of maps and weights, and the scores after one step, in ten forms.

    In the gradient of their sketch a spectrum is divided by |F|^2 + 1e-8, which is exact for large maps alone: for the
    others the maps' gradients are not compared. Their matrix root's gradient is another series, equal to ours once both
    have converged; after five iterations the scores are compared.
    """
    stored = parity("bilinear_cnn")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    guarded = 0.0
    for case, options in CASES.items():
        head = copied(BilinearHead(6, 3, **options), stored, case)
        maps = [stored[f"{case}:x{i}"].clone().requires_grad_() for i in range(2) if f"{case}:x{i}" in stored]
        scores = head(*maps)
        nn.functional.cross_entropy(scores, torch.tensor([2, 0])).backward()
        pairs = [("output", scores, f"{case}:y")]
        pairs += [("gradient", m.grad, f"{case}:dx{i}") for i, m in enumerate(maps)]
        pairs += [("gradient", p.grad, f"{case}:dfc.{name}") for name, p in head.classifier.named_parameters()]
        for i, part in enumerate(head.projections):
            name = f"{case}:dfeature_extractors.feature_extractors.{i}.1.weight"
            pairs.append(("gradient", part.weight.grad.unsqueeze(-1), name))
        torch.optim.SGD(head.parameters(), lr=0.5).step()
        pairs.append(("optimiser_step", head(*maps), f"{case}:next"))
        for key, found, name in pairs:
            difference = (found - stored[name]).abs().max().item()
            if case in ("sketch", "two_sketch") and ":dx" in name:
                guarded = max(guarded, difference)
            else:
                worst[key] = max(worst[key], difference)
    head = copied(BilinearHead(6, 3, root_iterations=5, ridge=0.0), stored, "root5")
    worst["output"] = max(worst["output"], (head(stored["root5:x0"]) - stored["root5:y"]).abs().max().item())
    assert max(worst.values()) < 1e-11  # a Fourier transform of large numbers leaves 1e-10 in bins that are empty here
    assert guarded < 1e-5
    record(
        "bilinear_cnn",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=len(CASES) + 1,
        **worst,
        gradient_of_their_guarded_sketch=guarded,
    )


def test_shared_stream_is_the_gram_matrix(double):
    x = torch.randn(3, 6, 4, 5)
    phi = BilinearPooling(6).matrix(x)
    assert torch.allclose(phi, torch.einsum("bchw,bdhw->bcd", x, x) / 20, atol=1e-15)
    assert torch.allclose(phi, phi.transpose(1, 2), atol=1e-15)
    assert torch.linalg.eigvalsh(phi).min() > -1e-14


@pytest.mark.parametrize(
    "options", [{}, {"second_channels": 4}, {"root_iterations": 5}, {"compact": "triangle"}, {"compact": "sketch"}]
)
def test_orderless_of_length_one_and_blind_to_shifts(double, options):
    pooling = BilinearPooling(6, **options)
    maps = [torch.randn(2, 6, 4, 5)]
    if "second_channels" in options:
        maps.append(torch.randn(2, 4, 4, 5))
    z = pooling(*maps)
    assert z.shape == (2, pooling.out_channels)
    assert (z.norm(dim=1) - 1).abs().max() < 1e-14
    order = torch.randperm(20)
    moved = [m.flatten(2)[:, :, order].view_as(m) for m in maps]
    assert (pooling(*moved) - z).abs().max() < 1e-10
    assert (pooling(*(m.roll((1, 2), (2, 3)) for m in maps)) - z).abs().max() < 1e-10
    clip = [m.unsqueeze(2).expand(-1, -1, 3, -1, -1) for m in maps]  # T equal frames
    assert (pooling(*clip) - z).abs().max() < 1e-10


def test_triangle_keeps_dot_products(double):
    x = torch.randn(4, 6, 3, 5)
    whole, half = BilinearPooling(6)(x), BilinearPooling(6, compact="triangle")(x)
    assert half.shape == (4, 21)
    assert (whole @ whole.T - half @ half.T).abs().max() < 1e-14
    assert triangle(torch.ones(1, 2, 2)).tolist() == [[1.0, 2**0.5, 1.0]]


def count_sketch(x: Tensor, bins: Tensor, signs: Tensor, length: int) -> Tensor:
    return torch.zeros(*x.shape[:-1], length).index_add(-1, bins, x * signs)


def test_sketch_is_the_mean_of_convolved_count_sketches(double):
    """By Fourier transforms at each position, as published, against the sketch of the pooled matrix."""
    sketch = TensorSketch(6, 5, 11)
    x, y = torch.randn(2, 6, 12), torch.randn(2, 5, 12)
    a = torch.fft.rfft(count_sketch(x.transpose(1, 2), sketch.bins, sketch.signs, 11))
    b = torch.fft.rfft(count_sketch(y.transpose(1, 2), sketch.second_bins, sketch.second_signs, 11))
    published = torch.fft.irfft(a * b, n=11).mean(1)
    assert (sketch(outer_mean(x, y)) - published).abs().max() < 1e-14
    assert set(sketch.state_dict()) == {"bins", "second_bins", "signs", "second_signs"}
    assert set(sketch.signs.tolist()) <= {-1.0, 1.0}


def test_sketch_keeps_dot_products_in_the_mean(double):
    """E <TS(x x^T), TS(y y^T)> = <x, y>^2, and the variance falls as 1 / d."""
    x, y = torch.randn(1, 8, 1), torch.randn(1, 8, 1)
    wanted = (x * y).sum().item() ** 2
    spread = {}
    for length in (16, 64, 256):
        found = torch.stack(
            [
                (sketch(outer_mean(x, x)) * sketch(outer_mean(y, y))).sum()
                for sketch in (TensorSketch(8, 8, length) for _ in range(2000))
            ]
        )
        spread[length] = found.var().item()
        assert abs(found.mean() - wanted) < 4 * (found.var() / 2000).sqrt()
    assert 2.5 < spread[16] / spread[64] < 6.5
    assert 2.5 < spread[64] / spread[256] < 6.5


def test_the_root_amplifies_noise_near_zero(double):
    """Why an exported file differs more than with mean pooling: entries near zero, by up to 1 / (2 sqrt(eps))."""
    pool = CompactBilinearPool(640, flatten=True)
    x = 0.2 * torch.randn(8, 640, 2, 2).relu()
    moved = x + 1e-6 * x.mean() * torch.randn_like(x)
    change = (pool(moved) - pool(x)).abs()
    sketch = pool.pooling.sketch(pool.pooling.matrix(x)).abs()
    assert change[sketch > sketch.median()].max() < 5e-6
    assert change.max() > 1e-5
    blunt = CompactBilinearPool(640, flatten=True, eps=0.1)
    blunt.load_state_dict(pool.state_dict())
    assert (blunt(moved) - blunt(x)).abs().max() < change.max() / 3


def test_signed_root(double):
    z = torch.tensor([-4.0, -1e-12, 0.0, 1e-12, 9.0], requires_grad=True)
    expected = torch.sign(z) * ((z.abs() + 1e-5).sqrt() - 1e-5**0.5)
    assert torch.allclose(signed_root(z), expected, atol=1e-15)
    assert torch.allclose(signed_root(z, 1e-30), z.sign() * z.abs().sqrt(), atol=1e-15)  # the paper's
    (slope,) = torch.autograd.grad(signed_root(z)[2], z)
    assert abs(slope[2] - 0.5 / 1e-5**0.5) < 1e-10
    assert torch.autograd.gradcheck(signed_root, torch.randn(8, requires_grad=True))
    dead = torch.zeros(2, 4, 3, 3, requires_grad=True)  # a map that is off everywhere
    BilinearPooling(4)(dead).sum().backward()
    assert dead.grad.isfinite().all()


def test_matrix_root(double):
    x = torch.randn(3, 5, 40)
    a = outer_mean(x, x)
    root = matrix_root(a, 25)
    assert (root @ root - a).abs().max() < 1e-12
    values, vectors = torch.linalg.eigh(a)
    assert (root - (vectors * values.sqrt().unsqueeze(1)) @ vectors.transpose(1, 2)).abs().max() < 1e-12
    assert (matrix_root(a, 25, 0.5) @ matrix_root(a, 25, 0.5) - a - 0.5 * torch.eye(5)).abs().max() < 1e-12
    assert torch.equal(matrix_root(torch.zeros(1, 3, 3)), torch.zeros(1, 3, 3))
    x = torch.randn(2, 3, 10, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: matrix_root(outer_mean(x, x)), x)


def textures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (N, 6, 8, 8) of three pairs of filters, each half of the time: together in class 0, in turn in class 1."""
    first = (torch.rand(count, 3, 64, generator=generator) < 0.5).float()
    labels = torch.arange(count) % 2
    other = torch.where(labels[:, None, None] == 0, first, 1 - first)
    strength = 0.5 + torch.rand(count, 6, 64, generator=generator)
    return (torch.cat([first, other], 1) * strength).view(count, 6, 8, 8), labels


def texture_accuracies() -> dict[str, float]:
    """A linear classifier on the mean, on the pooled outer product and on its sketch."""
    generator = torch.Generator().manual_seed(0)
    x, t = textures(200, generator)
    new, expected = textures(200, generator)
    x, new = x.to(torch.get_default_dtype()), new.to(torch.get_default_dtype())
    torch.manual_seed(0)
    descriptors = {
        "average": lambda m: m.mean((2, 3)),
        "bilinear": BilinearPooling(6),
        "compact": BilinearPooling(6, compact="sketch", out_channels=16),
    }
    found = {}
    for name, describe in descriptors.items():
        machine = fit_svm(describe(x), t)
        found[name] = (machine(describe(new)).argmax(1) == expected).float().mean().item()
    return found


def test_textures_of_equal_mean_are_told_apart():
    found = texture_accuracies()
    assert found["average"] < 0.65
    assert found["bilinear"] > 0.98
    assert found["compact"] > 0.98


def test_svm_is_at_its_optimum(double):
    z = torch.randn(60, 5)
    t = (z @ torch.randn(5, 3)).argmax(1)
    machine = fit_svm(z, t)
    assert (machine(z).argmax(1) == t).double().mean() > 0.9
    scores, own = machine(z), nn.functional.one_hot(t).bool()
    for k in range(3):
        assert abs(scores[own[:, k], k].median() - 1) < 0.35  # torch takes the lower of two middle values
        assert abs(scores[~own[:, k], k].median() + 1) < 0.35
    line = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
    found = fit_svm(line, torch.tensor([0, 0, 1, 1]), cost=1e6)  # the widest margin: w = 1, b = 0, before the scaling
    assert abs(found.bias[1]) < 0.51
    assert found.weight[1] > 0
    with pytest.raises(ValueError, match="counts"):
        fit_svm(z, torch.zeros(60, dtype=torch.long))


def test_networks_have_the_papers_sizes():
    with torch.device("meta"):
        shared = BilinearNetwork(num_classes=200)  # [D, D]
        two = BilinearNetwork(second=VGGM(), second_level=-1, num_classes=200)  # [D, M]
        maps = two.features(torch.zeros(1, 3, 448, 448))
        small = BilinearNetwork(VGGM(), level=-1, options={"compact": "sketch"})
    assert [tuple(m.shape) for m in maps] == [(1, 512, 28, 28), (1, 512, 27, 27)]
    count = {name: sum(p.numel() for p in n.parameters()) for name, n in (("dd", shared), ("dm", two), ("m", small))}
    head = 512 * 512 * 200 + 200
    assert count == {"dd": 14_714_688 + head, "dm": 14_714_688 + 6_528_640 + head, "m": 6_528_640 + 8192 * 200 + 200}


def test_two_streams_clips_flips_and_stages():
    network = BilinearNetwork(
        "timm/resnet10t", second="timm/resnet10t", num_classes=4, level=2, options={"projection": 8}
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    assert network(x).shape == (2, 4)
    clip = x.unsqueeze(2).expand(-1, -1, 2, -1, -1)
    assert torch.allclose(network(clip), network(x), atol=1e-5)
    assert torch.allclose(network.descriptor(x), network.descriptor(x.flip(-1)), atol=1e-6)
    network.freeze_features()
    assert {n.partition(".")[0] for n, p in network.named_parameters() if p.requires_grad} == {"head"}
    network.freeze_features(False)
    assert all(p.requires_grad for p in network.parameters())
    plain = BilinearNetwork("timm/resnet10t", num_classes=4, level=2, pooling="average").eval()
    assert torch.allclose(plain(x), plain.head(plain.features(x)[0].mean((2, 3))), atol=1e-6)
    with pytest.raises(ValueError, match="average"):
        plain.descriptor(x)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "efficientnet_lite0", "convnext_atto"])
def test_conversion_puts_a_sketch_in_the_place_of_the_mean(name):
    network = timm.create_model(name, num_classes=5)
    report = convert(network, "bilinear_cnn")
    assert [change.new for change in report.changes] == ["CompactBilinearPool"]
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    pool = next(part for part in network.modules() if isinstance(part, CompactBilinearPool))
    x = torch.randn(2, pool.channels, 4, 4)
    assert torch.allclose(pool(x).flatten(1).square().mean(1), torch.ones(2), atol=1e-5)
    report.undo()
    assert not any(isinstance(part, CompactBilinearPool) for part in network.modules())


def test_what_conversion_refuses():
    import torchvision

    with pytest.raises(ConversionError, match="output size of"):
        convert(torchvision.models.vgg11(weights=None, num_classes=2), "bilinear_cnn")
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ConversionError, match="AdaptiveAvgPool2d"):
        convert(detector.backbone, "bilinear_cnn", example=torch.zeros(1, 3, 64, 64))


def test_bad_arguments_are_named():
    for options in (
        {"compact": "half"},
        {"eps": 0.0},
        {"ridge": -1.0},
        {"root_iterations": -1},
        {"second_channels": 0},
    ):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            BilinearPooling(4, **options)
    for options in ({"compact": "triangle"}, {"root_iterations": 5}):
        with pytest.raises(ValueError, match="one stream"):
            BilinearPooling(4, second_channels=3, **options)
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(ValueError, match="expected 2 maps"):
        BilinearHead(4, 2, second_channels=3)(x)
    for head in (BilinearHead(4, 2), BilinearHead(4, 2, projection=2)):
        with pytest.raises(ValueError, match="got 2"):
            head(x, x)
        with pytest.raises(ValueError, match="4,"):
            head(torch.randn(1, 5, 3, 3))
    assert BilinearHead(4, 2).parameter_rules() == {}
    assert set(BilinearHead(4, 2, rate=100.0).parameter_rules()) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="projection"):
        BilinearHead(4, 2, projection=-1)
    with pytest.raises(ValueError, match="level"):
        BilinearNetwork(VGGM(), level=3)
    with pytest.raises(ValueError, match="pooling"):
        BilinearNetwork("timm/resnet10t", pooling="max")
