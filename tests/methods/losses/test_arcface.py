"""ArcFace: a loop reference, both codes of the authors, the guard's jump, sub-centres, and angles of small digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss as ThirdParty
from pytorch_metric_learning.losses import SubCenterArcFaceLoss as ThirdPartyCentres
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.losses.arcface import ArcFaceLoss, EmbeddingHead, flip_sum, margin_cosine
from torchive.nn.embedder import Embedder
from torchive.structures import Batch

RELEASES = {
    "linear": "2e2e8c97c7bc3e79a4d5403ae12cd5dd2bd69658",
    "released": "the current form, as kept by a fork at a992d56a532685507df4669518123c6e5dc0440b",
}
FORMS = {
    "linear": {},
    "easy": {"guard": "easy"},
    "cosface": {"margins": (1.0, 0.0, 0.4)},
    "released": {"guard": "none", "margin_gradient": False},
}


def loss_of(**options) -> ArcFaceLoss:
    return ArcFaceLoss(**{"num_classes": 5, "embedding_dim": 4, **options}).double()


def by_loops(loss: ArcFaceLoss, x: Tensor, y: Tensor) -> list[float]:
    m1, m2, m3 = loss.margins
    values = []
    for row, k in zip(x.tolist(), y.tolist(), strict=True):
        cosines = []
        for vector in loss.weight.tolist():
            centres = vector if isinstance(vector[0], list) else [vector]
            found = []
            for w in centres:
                norms = math.sqrt(sum(a * a for a in row)) * math.sqrt(sum(b * b for b in w))
                found.append(sum(a * b for a, b in zip(row, w, strict=True)) / norms)
            cosines.append(max(found))
        angle = math.acos(cosines[k])
        phi = m1 * angle + m2
        own = math.cos(phi) - m3
        if loss.guard == "linear" and phi > math.pi and m1 == 1:
            own = math.cos(angle) - m2 * math.sin(m2) - m3
        elif loss.guard == "linear" and m1 != 1:
            turns = math.floor(phi / math.pi)
            own = (-1) ** turns * math.cos(phi) - 2 * turns - m3
        elif loss.guard == "easy" and cosines[k] <= 0:
            own = cosines[k]
        logits = [loss.gamma * (own if j == k else c) for j, c in enumerate(cosines)]
        top = max(logits)
        values.append(top + math.log(sum(math.exp(v - top) for v in logits)) - logits[k])
    return values


@pytest.mark.parametrize("guard", ["linear", "easy", "none"])
@pytest.mark.parametrize("margins", [(1, 0.5, 0), (1, 0, 0.35), (4, 0, 0), (1, 1.2, 0.1), (0.9, 0.4, 0.15)])
def test_equals_the_loop_reference(double, record, guard, margins):
    x, y = torch.randn(40, 4), torch.randint(0, 5, (40,))
    for centres in (1, 3):
        loss = loss_of(margins=margins, guard=guard, gamma=20.0, centres=centres, reduction="none")
        values = by_loops(loss, x, y)
        largest = (loss(x, y) - torch.tensor(values)).abs().max().item()
        assert largest < 1e-10
        for reduction, expected in (("sum", sum(values)), ("mean", sum(values) / 40)):
            loss.reduction = reduction
            assert math.isclose(loss(x, y).item(), expected, rel_tol=1e-10)
        if (guard, margins, centres) == ("linear", (1, 0.5, 0), 1):
            record("arcface", "referenced", largest_difference=largest, dtype="float64")


def test_matches_the_authors_codes(double, record, parity):
    """Guarded, easy, CosFace and the current form without a gradient of the margin: logits, gradients, a step."""
    stored = parity("arcface")
    counted = stored["y"] >= 0
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for form, options in FORMS.items():
        loss = ArcFaceLoss(num_classes=8, embedding_dim=6, **options)
        loss.weight.data = stored["w"].clone()
        x = stored["x"].clone().requires_grad_()
        logits, first = loss.logits(x, stored["y"]), loss(x, stored["y"])
        first.backward()
        gaps = [(logits - stored[f"{form}.logits"]).abs().max(), (first - stored[f"{form}.loss"]).abs()]
        worst["output"] = max(worst["output"], *(gap.item() for gap in gaps))
        gradients = [(x.grad - stored[f"{form}.gx"]), (loss.weight.grad - stored[f"{form}.gw"])]
        worst["gradient"] = max(worst["gradient"], *(gap.abs().max().item() for gap in gradients))
        torch.optim.SGD([x, loss.weight], lr=0.01).step()
        step = (loss(x, stored["y"]) - stored[f"{form}.next"]).abs().item()
        worst["optimiser_step"] = max(worst["optimiser_step"], step)
    assert counted.sum() == 20
    beyond = loss.cosine(stored["x"])[counted].gather(1, stored["y"][counted, None]) < math.cos(math.pi - 0.5)
    assert 0 < beyond.sum() < 20  # both sides of the guard are seen
    assert max(worst.values()) < 1e-10
    record(
        "arcface",
        "matched",
        repository="deepinsight/insightface",
        commit=RELEASES["linear"],
        also=RELEASES["released"],
        largest_difference=max(worst.values()),
        **worst,
    )


@pytest.mark.parametrize("centres", [1, 3])
def test_equals_pytorch_metric_learning(double, centres):
    x, y = torch.randn(30, 4), torch.randint(0, 5, (30,))
    theirs: nn.Module = ThirdParty(5, 4, margin=28.6, scale=64)
    if centres == 3:
        theirs = ThirdPartyCentres(num_classes=5, embedding_size=4, margin=28.6, scale=64, sub_centers=3)
    ours = loss_of(margins=(1.0, float(np.radians(28.6)), 0.0), centres=centres)
    with torch.no_grad():
        ours.weight.copy_(theirs.W.T.reshape(ours.weight.shape))
    points = [x.clone().requires_grad_() for _ in range(2)]
    values = [loss(point, y) for loss, point in zip((ours, theirs), points, strict=True)]
    for value in values:
        value.backward()
    assert (values[0] - values[1]).abs() < 1e-5
    assert (points[0].grad - points[1].grad).abs().max() < 1e-5


def test_without_a_margin_it_is_softmax_over_cosines(double):
    x, y = torch.randn(12, 4), torch.randint(0, 5, (12,))
    for guard in ("linear", "easy", "none"):
        loss = loss_of(margins=(1, 0, 0), guard=guard)
        logits = 64 * F.normalize(x) @ F.normalize(loss.weight).T
        assert torch.allclose(loss.logits(x, y), logits, atol=1e-13)
        assert torch.allclose(loss(x, y), F.cross_entropy(logits, y))


def test_two_classes_in_closed_form(double):
    loss = loss_of(num_classes=2, embedding_dim=2, gamma=10.0)
    loss.weight.data = torch.eye(2)
    for angle in (0.0, 0.3, 1.0, 1.5):
        x = torch.tensor([[math.cos(angle), math.sin(angle)]])
        expected = math.log1p(math.exp(10 * (math.sin(angle) - math.cos(angle + 0.5))))
        assert math.isclose(loss(x, torch.tensor([0])).item(), expected, rel_tol=1e-6)
    logits = loss.logits(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
    assert logits[0, 0].item() == pytest.approx(10 * math.cos(0.5), abs=1e-6)  # at an angle of zero


def test_the_guard_jumps_at_pi_minus_m(double):
    m, step = 0.5, 1e-9
    below, above = (margin_cosine(torch.tensor(math.cos(math.pi - m + s))) for s in (-step, step))
    assert below.item() == pytest.approx(-1, abs=1e-6)
    assert above.item() == pytest.approx(-math.cos(m) - m * math.sin(m), abs=1e-6)
    assert above.item() == pytest.approx(-1.117, abs=1e-3)
    angles = torch.linspace(0.001, math.pi - 0.001, 2000)
    for margins in ((1, 0.5, 0), (1, 0, 0.35), (4, 0, 0), (1.5, 0.3, 0)):
        guarded = margin_cosine(angles.cos(), margins)
        assert (guarded.diff() < 0).all(), margins  # it falls everywhere
    unguarded = margin_cosine(angles.cos(), (1, 0.5, 0), "none")
    assert (unguarded.diff() > 0).any()


def test_gradients_are_the_formulas(double):
    loss = loss_of()
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(0, 5, (6,))
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x)
    cosine = torch.linspace(-0.8, 0.95, 20).requires_grad_()
    margin_cosine(cosine).sum().backward()
    angle = cosine.detach().acos()
    assert torch.allclose(cosine.grad, (angle + 0.5).sin() / angle.sin())
    cosine.grad = None
    margin_cosine(cosine, gradient=False).sum().backward()
    assert (cosine.grad == 1).all()
    assert torch.allclose(margin_cosine(cosine, gradient=False), margin_cosine(cosine), atol=1e-15)


@pytest.mark.parametrize("margins", [(1, 0.5, 0), (1, 0, 0.4), (2, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parallel_and_opposite_embeddings_have_finite_gradients(margins, dtype):
    loss = ArcFaceLoss(num_classes=3, embedding_dim=4, margins=margins)
    last = torch.zeros(1, 4) if dtype == torch.float32 else torch.ones(1, 4)  # at zero the gradient is no float16
    x = torch.cat([loss.weight.detach(), -loss.weight.detach(), last]).to(dtype).requires_grad_()
    value = loss(x, torch.tensor([0, 1, 2, 0, 1, 2, 0]))
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(loss.weight.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, torch.arange(7) % 3), loss(x, torch.arange(7) % 3).float())


def test_samples_of_no_class_pass_without_margin_and_do_not_count(double):
    loss, x = loss_of(), torch.randn(6, 4)
    y = torch.tensor([0, -1, 3, -1, 2, -1])
    kept = y >= 0
    assert torch.allclose(loss(x, y), loss(x[kept], y[kept]))
    assert torch.allclose(loss.logits(x, y)[~kept], 64 * loss.cosine(x)[~kept])
    assert loss(x[~kept], y[~kept]) == 0


def test_the_callers_cosines_are_left_alone():
    cosine = torch.linspace(-1, 1, 9)
    kept = cosine.clone()
    margin_cosine(cosine)
    margin_cosine(cosine, gradient=False)
    assert torch.equal(cosine, kept)


def test_the_head_of_the_paper_and_the_mirrored_sum():
    head = EmbeddingHead(512)
    assert [type(part) for part in head] == [nn.BatchNorm2d, nn.Dropout, nn.Flatten, nn.Linear, nn.BatchNorm1d]
    assert head(torch.randn(2, 512, 7, 7)).shape == (2, 512)
    assert head[1].p == 0.4
    images, network = torch.randn(3, 1, 4, 4), nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    found = flip_sum(network, images)
    assert torch.allclose(found.norm(dim=1), torch.ones(3))
    assert torch.allclose(found, flip_sum(network, images.flip(-1)), atol=1e-6)
    with pytest.raises(ValueError, match="512, 0 and 8"):
        EmbeddingHead(512, image_size=0, embedding_dim=8)


def test_the_class_vectors_are_not_deployed():
    model = Embedder(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), ArcFaceLoss(num_classes=3, embedding_dim=4))
    images = torch.randn(5, 1, 4, 4)
    model.losses(Batch(images, torch.tensor([0, 1, 2, 0, 1]), tuple("abcde")))["loss"].backward()
    assert model.loss.weight.grad.any()
    assert not [name for name in model.deployable().state_dict() if "loss" in name]
    assert torch.equal(model.deployable()(images), model(images))
    assert Embedder("timm/test_resnet", nn.Identity(), embedding_dim=6)(torch.rand(2, 3, 32, 32)).shape == (2, 6)


def test_bad_arguments_are_named():
    for options, found in (
        ({"guard": "soft"}, "soft"),
        ({"reduction": "max"}, "max"),
        ({"margins": (1, 4, 0)}, r"\(1, 4, 0\)"),
        ({"margins": 0.5}, r"got 0\.5"),
        ({"gamma": 0}, "and 0"),
        ({"centres": 0}, "4 and 0"),
    ):
        with pytest.raises(ValueError, match=found):
            loss_of(**options)
    with pytest.raises(ValueError, match=r"\(N, 4\) and \(N,\), got \(2, 3\)"):
        loss_of()(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"torch\.float32 and torch\.float32"):
        loss_of()(torch.randn(2, 4), torch.randn(2))


@pytest.mark.slow
def test_two_dimensional_digits_are_compacter_and_further_apart():
    """The notes' reading: a bias on the right angle asks for compact and for separated classes together."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train, test = torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)
    found = {}
    for name, margin in (("softmax", 0.0), ("arcface", 0.3)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        loss = ArcFaceLoss(num_classes=10, embedding_dim=2, margins=(1, margin, 0), gamma=16.0)
        optimiser = torch.optim.Adam([*net.parameters(), *loss.parameters()], lr=0.01)
        for _ in range(1500):
            rows = train[torch.randint(0, len(train), (128,))]
            value = loss(net(x[rows]), y[rows])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        with torch.no_grad():
            e = F.normalize(net(x[test]))
            means = F.normalize(torch.stack([e[y[test] == k].mean(0) for k in range(10)]))
            inside = (e * means[y[test]]).sum(1).clamp(-1, 1).acos().mean()
            between = (means @ means.T).fill_diagonal_(-1).amax(1).clamp(-1, 1).acos().mean()
            accuracy = (loss.cosine(e).argmax(1) == y[test]).float().mean()
        found[name] = (float(accuracy), float(inside), float(between))
    print(found)
    assert abs(found["arcface"][0] - found["softmax"][0]) < 0.05, found
    assert found["arcface"][1] < found["softmax"][1], found
    assert found["arcface"][1] / found["arcface"][2] < found["softmax"][1] / found["softmax"][2], found
