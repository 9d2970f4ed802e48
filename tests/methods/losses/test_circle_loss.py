"""Circle loss: a loop reference, two third-party ports, the special cases of the paper, extremes, and the sampler."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from pytorch_metric_learning.losses import CircleLoss as PairLoss
from torch import Tensor
from torch.nn import functional as F

from torchive.data.pk_sampler import PKSampler
from torchive.methods.losses.circle_loss import PRESETS, CircleLoss, boundary, pair_logits
from torchive.nn.cosine_classifier import CosineClassifier

REPOSITORY, COMMIT = "TinyZeaMays/CircleLoss", "d002ecd0c7e395f6e39bf8a2a96fd05b83afa93f"
SETTINGS = [(0.25, 256.0), (0.25, 128.0), (0.4, 80.0)]


def one_sum(s_p: list[float], s_n: list[float], margin: float, gamma: float, weighted: bool = True) -> float:
    """log[1 + sum sum exp(..)] from the formula, with the largest exponent taken out by hand."""
    exponents = []
    for n in s_n:
        for p in s_p:
            if weighted:
                a_n, a_p = max(n + margin, 0.0), max(1 + margin - p, 0.0)
                exponents.append(gamma * (a_n * (n - margin) - a_p * (p - (1 - margin))))
            else:
                exponents.append(gamma * (n + margin - p))
    if not exponents:
        return 0.0
    top = max(0.0, *exponents)
    return top + math.log(math.exp(-top) + sum(math.exp(e - top) for e in exponents))


def by_anchor(x: Tensor, y: Tensor, margin: float, gamma: float, weighted: bool = True) -> list[float]:
    rows = x.tolist()
    norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
    values = []
    for i, row in enumerate(rows):
        s_p, s_n = [], []
        for j, other in enumerate(rows):
            if i != j:
                s = sum(a * b for a, b in zip(row, other, strict=True)) / norms[i] / norms[j]
                (s_p if y[i] == y[j] else s_n).append(s)
        values.append(one_sum(s_p, s_n, margin, gamma, weighted))
    return values


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("margin", "gamma"), SETTINGS)
def test_equals_the_loop_reference(double, record, margin, gamma, weighted):
    x, y = torch.randn(12, 5), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 1])  # 3 stands alone
    values = by_anchor(x, y, margin, gamma, weighted)
    assert values[9] == 0
    settings = {"margin": margin, "gamma": gamma, "weighted": weighted}
    each = CircleLoss(**settings, reduction="none")(x, y)
    largest = (each - torch.tensor(values)).abs().max().item()
    assert largest < 1e-11
    assert math.isclose(CircleLoss(**settings)(x, y).item(), sum(values) / 11, rel_tol=1e-12)  # 11 anchors count
    assert math.isclose(CircleLoss(**settings, reduction="sum")(x, y).item(), sum(values), rel_tol=1e-12)
    if weighted and gamma == 80:
        record("circle_loss", "referenced", largest_difference=largest, dtype="float64")


@pytest.mark.parametrize(("margin", "gamma"), SETTINGS)
def test_class_level_equals_the_loop_reference(double, margin, gamma):
    layer, x, y = CosineClassifier(6, 5), torch.randn(7, 6), torch.randint(5, (7,))
    s = layer(x)
    values = [
        one_sum([row[k].item()], [v.item() for j, v in enumerate(row) if j != k], margin, gamma)
        for row, k in zip(s.detach(), y.tolist(), strict=True)
    ]
    found = CircleLoss(mode="class", margin=margin, gamma=gamma, reduction="none")(s, y)
    assert (found - torch.tensor(values)).abs().max() < 1e-11


@pytest.mark.parametrize(("margin", "gamma"), SETTINGS)
def test_equals_pytorch_metric_learning(double, margin, gamma):
    x, y = torch.randn(20, 8), torch.randint(5, (20,))
    values = []
    for loss in (CircleLoss(margin=margin, gamma=gamma), PairLoss(m=margin, gamma=gamma)):
        point = x.clone().requires_grad_()
        value = loss(point, y)
        value.backward()
        values.append((value.detach(), point.grad))
    assert (values[0][0] - values[1][0]).abs() < 1e-6
    assert (values[0][1] - values[1][1]).abs().max() < 1e-6


def test_matches_the_port(double, record, parity):
    """Global pairs and class level: the loss, its gradients, and the loss after one optimiser step."""
    stored = parity("circle_loss")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for margin, gamma in SETTINGS:
        for mode in ("global", "class"):
            given = {k.rpartition(".")[2]: v for k, v in stored.items() if k.startswith(f"{mode}.{int(gamma)}.")}
            loss = CircleLoss(mode=mode, margin=margin, gamma=gamma)
            x = given["x"].requires_grad_()
            layer = CosineClassifier(6, 5)
            if mode == "class":
                layer.weight.data = given["w"]

            def value(mode=mode, loss=loss, layer=layer, x=x, y=given["y"]) -> Tensor:
                return loss(layer(x) if mode == "class" else x, y)

            first = value()
            first.backward()
            pairs = {"output": [(first, "loss")], "gradient": [(x.grad, "grad")]}
            if mode == "class":
                pairs["gradient"].append((layer.weight.grad, "wgrad"))
            torch.optim.SGD([x, *([layer.weight] if mode == "class" else [])], lr=0.01).step()
            pairs["optimiser_step"] = [(value(), "next")]
            for key, found in pairs.items():
                worst[key] = max(worst[key], *((a - given[name]).abs().max().item() for a, name in found))
    assert max(worst.values()) < 1e-6
    record(
        "circle_loss", "matched", repository=REPOSITORY, commit=COMMIT, largest_difference=max(worst.values()), **worst
    )


def test_unified_class_level_is_am_softmax(double):
    s, y = torch.rand(6, 5) * 2 - 1, torch.randint(5, (6,))
    margin, gamma = 0.35, 30.0
    logits = gamma * (s - margin * F.one_hot(y, 5))
    found = CircleLoss(mode="class", margin=margin, gamma=gamma, weighted=False)(s, y)
    assert (found - F.cross_entropy(logits, y)).abs() < 1e-13


def test_unified_tends_to_the_hard_triplet(double):
    x, y = torch.randn(10, 6), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    s = F.normalize(x) @ F.normalize(x).T
    same = y[:, None] == y
    hardest_p = s.masked_fill(~same | torch.eye(10, dtype=torch.bool), 9).amin(1)
    hardest_n = s.masked_fill(same, -9).amax(1)
    expected = (hardest_n - hardest_p + 0.2).relu()
    gaps = []
    for gamma in (10.0, 100.0, 1e4):
        each = CircleLoss(margin=0.2, gamma=gamma, weighted=False, reduction="none")(x, y) / gamma
        gaps.append((each - expected).abs().max().item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


@pytest.mark.parametrize("margin", [0.25, 0.4])
def test_on_the_circle_the_exponent_is_zero(double, margin):
    for angle in torch.linspace(0, math.pi / 2, 9):  # where both weights are above zero
        s_n, s_p = math.sqrt(2) * margin * angle.sin(), 1 - math.sqrt(2) * margin * angle.cos()
        assert boundary(s_n, s_p, margin).abs() < 1e-15
        similarity = torch.stack([s_p, s_n])[None]
        value = CircleLoss(mode="class", margin=margin)(similarity, torch.tensor([0]))
        assert (value - math.log(2)).abs() < 1e-12
    assert boundary(torch.tensor(0.0), torch.tensor(1.0), margin) < 0  # the optimum is inside


def test_gradient_of_the_formula_with_fixed_weights(double):
    """dL/ds_n = Z softmax_j gamma a_n and dL/ds_p = -Z softmax_i gamma a_p, Z = 1 - exp(-L)."""
    s, y = (torch.rand(4, 6) * 2 - 1).requires_grad_(), torch.tensor([0, 3, 5, 3])
    margin, gamma = 0.25, 20.0
    each = CircleLoss(mode="class", margin=margin, gamma=gamma, reduction="none")(s, y)
    each.sum().backward()
    _logit_p, logit_n = pair_logits(s.detach(), margin, gamma)
    own = F.one_hot(y, 6).bool()
    z = 1 - torch.exp(-each.detach())
    push = logit_n.masked_fill(own, -math.inf).softmax(1) * gamma * (s.detach() + margin).relu()
    pull = torch.where(own, gamma * (1 + margin - s.detach()).relu(), 0.0)
    assert (s.grad - z[:, None] * (push - pull)).abs().max() < 1e-12


def test_no_gradient_beyond_the_optimum(double):
    for s_p, s_n, zero in ((1.3, 0.1, 0), (0.5, -0.3, 1)):
        s = torch.tensor([[s_p, s_n]], requires_grad=True)
        CircleLoss(mode="class", margin=0.25, gamma=10.0)(s, torch.tensor([0])).backward()
        assert s.grad[0, zero] == 0
        assert s.grad[0, 1 - zero] != 0


@pytest.mark.parametrize("mode", ["anchor", "global", "class"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extremes_stay_finite(mode, dtype):
    y = torch.tensor([0, 0, 1, 1, 2])
    worst = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    small = 0.1 if dtype == torch.float16 else 1e-4  # below, the true gradient is no float16
    for scale in (1.0, small, 3e4 if mode != "class" else 1.0):
        x = (worst * scale).to(dtype).requires_grad_()
        value = CircleLoss(mode=mode, gamma=512.0)(x, y)
        value.backward()
        assert value.dtype == torch.float32
        assert torch.isfinite(value)
        assert torch.isfinite(x.grad).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = CircleLoss(mode=mode)(worst, y)
    assert torch.equal(under, CircleLoss(mode=mode)(worst, y))


@pytest.mark.parametrize("mode", ["anchor", "global", "class"])
@pytest.mark.parametrize("labels", [[], [1], [0, 0, 0], [0, 1, 2]])
def test_nothing_to_compare_is_zero(mode, labels):
    x = torch.randn(len(labels), 3, requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        value = CircleLoss(mode=mode, reduction=reduction)(x, torch.tensor(labels, dtype=torch.long))
        value.sum().backward()
        if mode != "class":
            assert not value.any()
            assert not x.grad.any()
        assert torch.isfinite(value).all()


def test_presets_are_the_papers():
    assert {k: (v["margin"], v["gamma"]) for k, v in PRESETS.items()} == {
        "face": (0.25, 256),
        "person": (0.25, 128),
        "retrieval": (0.4, 80),
    }
    loss = CircleLoss.preset("person", reduction="sum")
    assert (loss.mode, loss.margin, loss.gamma, loss.reduction) == ("class", 0.25, 128, "sum")


def test_bad_arguments_are_named():
    for options in ({"mode": "pair"}, {"reduction": "max"}, {"gamma": 0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            CircleLoss(**options)
    with pytest.raises(ValueError, match="voice"):
        CircleLoss.preset("voice")
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3,\)"):
        CircleLoss()(torch.randn(4, 3), torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match=r"float32 and torch\.float32"):
        CircleLoss()(torch.randn(3, 3), torch.randn(3))


def test_sampler_gives_p_classes_of_k():
    labels = torch.tensor([0] * 9 + [1] * 9 + [2] * 9 + [3] * 2 + [4] * 9)
    sampler = PKSampler(labels, classes=3, samples=4, seed=1, batches=40)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 40
    for batch in batches:
        counts = Counter(labels[batch].tolist())
        assert sorted(counts.values()) == [4, 4, 4]
        assert all(batch.count(i) == 1 for i in batch if labels[i] != 3)  # only the small class repeats
    seen = Counter(labels[[i for batch in batches for i in batch]].tolist())
    assert max(seen.values()) - min(seen.values()) <= 4 * 2
    assert batches == list(PKSampler(labels, classes=3, samples=4, seed=1, batches=40))
    assert batches[30:] == list(sampler.epoch(0, start_batch=30))
    sampler.set_epoch(1)
    assert batches != list(sampler)
    with pytest.raises(ValueError, match="6 classes"):
        PKSampler(labels, classes=6)


@pytest.mark.slow
def test_digits_against_the_triplet():
    """Embeddings of small digits: recall@1 on classes not trained on, and how tightly (s_n, s_p) gather."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    seen = y < 6
    x_train, y_train, x_test, y_test = x[seen], y[seen], x[~seen], y[~seen]

    def hard_triplet(e: Tensor, labels: Tensor) -> Tensor:
        s = F.normalize(e) @ F.normalize(e).T
        same = labels[:, None] == labels
        hardest = s.masked_fill(~same, 9).amin(1)
        return (s.masked_fill(same, -9).amax(1) - hardest + 0.2).relu().mean()

    recall, spread = {}, {}
    for name, loss in (("circle", CircleLoss(margin=0.25, gamma=64.0)), ("triplet", hard_triplet)):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
        optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
        for batch in PKSampler(y_train, classes=6, samples=8, batches=400):
            value = loss(net(x_train[batch]), y_train[batch])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        with torch.no_grad():
            e = F.normalize(net(x_test))
            s = (e @ e.T).fill_diagonal_(-9)
            recall[name] = (y_test[s.argmax(1)] == y_test).float().mean().item()
            e = F.normalize(net(x_train))
            s, same = e @ e.T, y_train[:, None] == y_train
            spread[name] = (s[same].std().item(), s[~same].std().item())
    assert recall["circle"] > 0.9, (recall, spread)
    assert recall["circle"] > recall["triplet"] - 0.02, (recall, spread)
    assert spread["circle"][0] < spread["triplet"][0], (recall, spread)
