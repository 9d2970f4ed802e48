"""Focal loss: a loop reference, closed-form gradients, torchvision and kornia, the prior bias, saturated logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from torchive.methods.detection.ssd import SSD
from torchive.methods.losses.focal_loss import FocalLoss, focal_sigmoid, focal_softmax
from torchive.nn.prior import init_classifier, prior_bias

GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def by_loops(x: Tensor, y: Tensor, alpha: float | None, gamma: float) -> list[float]:
    values = []
    for z, t in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        cross_entropy = -(t * math.log(p) + (1 - t) * math.log(1 - p))
        p_t = t * p + (1 - t) * (1 - p)
        alpha_t = 1.0 if alpha is None else t * alpha + (1 - t) * (1 - alpha)
        values.append(alpha_t * (1 - p_t) ** gamma * cross_entropy)
    return values


@pytest.mark.parametrize("alpha", [0.25, None])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_equals_the_loop_reference(double, record, alpha, gamma):
    x = torch.randn(6, 5) * 3
    for y in ((torch.rand(6, 5) < 0.3).double(), torch.rand(6, 5)):  # hard and soft truths
        values = by_loops(x, y, alpha, gamma)
        each = FocalLoss(alpha=alpha, gamma=gamma, reduction="none")(x, y)
        largest = (each.flatten() - torch.tensor(values)).abs().max().item()
        assert largest < 1e-12
        for reduction, expected in (
            ("sum", sum(values)),
            ("mean", sum(values) / 30),
            ("num_pos", sum(values) / max(int((y > 0.5).sum()), 1)),
        ):
            found = FocalLoss(alpha=alpha, gamma=gamma, reduction=reduction)(x, y).item()
            assert math.isclose(found, expected, rel_tol=1e-11), reduction
    if gamma == 2 and alpha is not None:
        record("focal_loss", "referenced", largest_difference=largest, dtype="float64")


@pytest.mark.parametrize("gamma", GAMMAS)
def test_softmax_equals_the_loop_reference(double, gamma):
    x, y, w = torch.randn(2, 3, 4, 5) * 2, torch.randint(0, 3, (2, 4, 5)), [0.5, 1.0, 3.0]
    y[0, 0] = 255
    total, weights = 0.0, 0.0
    for n in range(2):
        for i in range(4):
            for j in range(5):
                k = int(y[n, i, j])
                if k == 255:
                    continue
                scores = [math.exp(v) for v in x[n, :, i, j].tolist()]
                p = scores[k] / sum(scores)
                total -= w[k] * (1 - p) ** gamma * math.log(p)
                weights += w[k]
    loss = FocalLoss(variant="softmax", gamma=gamma, weight=w, ignore_index=255)
    assert math.isclose(loss(x, y).item(), total / weights, rel_tol=1e-12)
    counted = int(((y > 0) & (y != 255)).sum())
    loss.reduction = "num_pos"
    assert math.isclose(loss(x, y).item(), total / counted, rel_tol=1e-12)


def test_no_focus_is_cross_entropy(double):
    x, y = torch.randn(9, 4), torch.randint(0, 4, (9,))
    w = torch.tensor([1.0, 2.0, 0.5, 3.0])
    assert torch.allclose(FocalLoss(variant="softmax", gamma=0, weight=w)(x, y), F.cross_entropy(x, y, w))
    one_hot = F.one_hot(y, 4).double()
    plain = F.binary_cross_entropy_with_logits(x, one_hot)
    assert torch.allclose(FocalLoss(alpha=None, gamma=0)(x, y), plain)
    weighed = F.binary_cross_entropy_with_logits(x, one_hot, weight=0.25 * one_hot + 0.75 * (1 - one_hot))
    assert torch.allclose(FocalLoss(gamma=0)(x, one_hot), weighed)


@pytest.mark.parametrize("alpha", [0.25, None])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_has_the_closed_form(double, alpha, gamma):
    x, y = (torch.randn(40) * 4).requires_grad_(), (torch.rand(40) < 0.5).double()
    focal_sigmoid(x, y, alpha=alpha, gamma=gamma).sum().backward()
    p = x.detach().sigmoid()
    p_t, sign = torch.where(y > 0, p, 1 - p), 2 * y - 1
    alpha_t = 1.0 if alpha is None else y * alpha + (1 - y) * (1 - alpha)
    expected = sign * alpha_t * (1 - p_t) ** gamma * (gamma * p_t * p_t.log() + p_t - 1)
    assert (x.grad - expected).abs().max() < 1e-13


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_falls_with_the_probability_of_the_truth_and_below_cross_entropy(double, gamma):
    x = torch.linspace(-8, 8, 200)
    each = focal_sigmoid(x, torch.ones(200), alpha=None, gamma=gamma)
    assert (each.diff() < 0).all()
    assert (each < F.binary_cross_entropy_with_logits(x, torch.ones(200), reduction="none")).all()
    pairs = torch.stack([x, torch.zeros(200)], 1)  # two logits are one sigmoid of their difference
    assert torch.allclose(focal_softmax(pairs, torch.zeros(200, dtype=torch.long), gamma=gamma), each, atol=1e-14)


def test_equals_torchvision():
    x, y = torch.randn(50, 8) * 10, (torch.rand(50, 8) < 0.1).float()
    for reduction in ("none", "mean", "sum"):
        assert torch.equal(FocalLoss(reduction=reduction)(x, y), sigmoid_focal_loss(x, y, reduction=reduction))


def test_matches_kornia(double, record, parity):
    """Both forms of another implementation: the loss, its gradient, and the loss after one step of descent."""
    stored = parity("focal_loss")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for gamma in (1.0, 2.0, 3.5):
        for variant in ("softmax", "sigmoid"):
            given = {k.rpartition(".")[2]: v for k, v in stored.items() if k.startswith(f"{variant}.{gamma}.")}
            loss = FocalLoss(variant=variant, gamma=gamma, weight=given.get("w"), reduction="sum").double()
            x, y = given["x"].requires_grad_(), given["y"]

            def value(x=x, y=y, loss=loss, gamma=gamma) -> Tensor:
                """kornia's one-hot truths have 1e-6 more in every class that counts."""
                more = 0.0
                for k, weight in enumerate(() if loss.weight is None else loss.weight):
                    each = focal_softmax(x, torch.full_like(y, k), gamma=gamma)
                    more = more + 1e-6 * weight * each[y >= 0].sum()
                return loss(x, y) + more

            first = value()
            first.backward()
            worst["output"] = max(worst["output"], (first - given["loss"]).abs().item())
            worst["gradient"] = max(worst["gradient"], (x.grad - given["grad"]).abs().max().item())
            torch.optim.SGD([x], lr=0.1).step()
            worst["optimiser_step"] = max(worst["optimiser_step"], (value() - given["next"]).abs().item())
    assert max(worst.values()) < 1e-10
    record(
        "focal_loss",
        "matched",
        repository="kornia/kornia (third party)",
        commit="0.8.1",
        largest_difference=max(worst.values()),
        authors="the release is a GPU operator of Caffe2, which no longer builds; torchvision's descends from it",
        **worst,
    )


def test_saturated_logits_are_finite_where_torchvision_is_not():
    for gamma in GAMMAS:
        for truth in (0.0, 1.0):
            x = torch.tensor([-1e4, -200.0, -51.0, 0.0, 51.0, 200.0, 1e4], requires_grad=True)
            value = FocalLoss(gamma=gamma, reduction="sum")(x, torch.full((7,), truth))
            value.backward()
            assert torch.isfinite(value), (gamma, truth)
            assert torch.isfinite(x.grad).all(), (gamma, truth)
        logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], requires_grad=True)
        value = FocalLoss(variant="softmax", gamma=gamma)(logits, torch.zeros(3, dtype=torch.long))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(logits.grad).all()
    x = torch.tensor([200.0], requires_grad=True)
    sigmoid_focal_loss(x, torch.ones(1), gamma=0.5).sum().backward()
    assert not torch.isfinite(x.grad).all()


@pytest.mark.parametrize("variant", ["sigmoid", "softmax"])
def test_half_precision_is_computed_in_float32(variant):
    x, y = (torch.randn(6, 3) * 30).half(), torch.randint(0, 3, (6,))
    value = FocalLoss(variant=variant)(x, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, FocalLoss(variant=variant)(x.float(), y))


def test_the_prior_bias_gives_the_analytic_initial_loss(double):
    layer = nn.Linear(5, 3)
    init_classifier(layer)
    assert 0 < layer.weight.std() < 0.03
    nn.init.zeros_(layer.weight)
    logits = layer(torch.randn(1000, 5))
    assert torch.allclose(logits.sigmoid(), torch.tensor(0.01))
    truth = torch.zeros(1000, 3)
    truth[:3, 0] = 1
    positive = 0.25 * 0.99**2 * -math.log(0.01)
    negative = 0.75 * 0.01**2 * -math.log(0.99)
    expected = (3 * positive + 2997 * negative) / 3
    assert math.isclose(FocalLoss(reduction="num_pos")(logits, truth).item(), expected, rel_tol=1e-9)
    assert FocalLoss(reduction="num_pos")(torch.zeros(1000, 3), truth) > 30 * expected
    assert prior_bias(0.5) == 0
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            prior_bias(wrong)
    with pytest.raises(ValueError, match="got ReLU"):
        init_classifier(nn.ReLU())
    with pytest.raises(ValueError, match="got Linear"):
        init_classifier(nn.Linear(2, 2, bias=False))


def test_a_detector_takes_it():
    loss = FocalLoss(reduction="none")
    options = {"num_classes": 2, "backbone": "timm/test_efficientnet", "image_size": 64, "classification": "sigmoid"}
    images, box = torch.rand(2, 3, 64, 64), torch.tensor([[8.0, 8, 40, 40]])
    targets = [{"boxes": box, "labels": torch.tensor([1])}] * 2
    model = SSD(**options, mining_ratio=None, loss=loss, prior=0.01)
    raw = model(images)
    assert 0.005 < raw["logits"].sigmoid().mean() < 0.02
    found = model.losses(images, targets)
    found["classification"].backward()
    plain = SSD(**options, mining_ratio=None)
    plain.load_state_dict(model.state_dict())
    assert found["classification"] < plain.losses(images, targets)["classification"]
    with pytest.raises(ValueError, match="got 'mean'"):
        SSD(**options, loss=FocalLoss())
    with pytest.raises(ValueError, match="got softmax"):
        SSD(**{**options, "classification": "softmax"}, loss=loss)


def test_bad_arguments_are_named():
    for options in ({"variant": "tanh"}, {"reduction": "max"}, {"gamma": -1}, {"alpha": 2}, {"weight": [1.0]}):
        with pytest.raises(ValueError, match="softmax" if "weight" in options else str(next(iter(options.values())))):
            FocalLoss(**options)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 4\)"):
        FocalLoss()(torch.randn(4, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3,\)"):
        FocalLoss()(torch.randn(4, 3), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"3 class weights, got \(2,\)"):
        FocalLoss(variant="softmax", weight=[1.0, 2.0])(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    with pytest.raises(TypeError, match=r"torch\.float32"):
        FocalLoss(variant="softmax")(torch.randn(4, 3), torch.randn(4))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        FocalLoss()(torch.zeros(4, 3, dtype=torch.long), torch.randn(4, 3))


@pytest.mark.slow
def test_with_and_without_an_objectness_stage(record):
    """The notes' two verdicts. One positive in a thousand cells: focal loss on all cells against cross-entropy there;
    and both on the few cells that an objectness stage lets through, where easy negatives are gone already.
    """
    from sklearn.metrics import average_precision_score

    def cells(count: int) -> tuple[Tensor, Tensor]:
        x, y = torch.randn(count, 16), (torch.rand(count) < 0.001).float()
        x[:, 0] += 3 * y
        x[:, 1] += 2 * y
        return x, y

    def trained(loss: nn.Module, x: Tensor, y: Tensor, seed: int, prior: float | None) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
        if prior is not None:
            init_classifier(net[2], prior=prior)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(300):
            rows = torch.randint(0, len(x), (2048,))
            value = loss(net(x[rows])[:, 0], y[rows])
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        return net

    gain: dict[str, list[float]] = {"dense": [], "behind objectness": []}
    for seed in range(5):
        torch.manual_seed(100 + seed)
        (x, y), (x_test, y_test) = cells(200_000), cells(200_000)
        for stage in gain:
            keep, keep_test = slice(None), slice(None)
            if stage != "dense":  # what a first stage lets through: about one in a hundred, most positives among them
                keep, keep_test = x[:, 0] > 2.3, x_test[:, 0] > 2.3
            scores = []
            for loss, prior in ((FocalLoss(reduction="num_pos"), 0.01), (FocalLoss(gamma=0, alpha=None), None)):
                net = trained(loss, x[keep], y[keep], seed, prior)
                with torch.no_grad():
                    scores.append(float(average_precision_score(y_test[keep_test], net(x_test[keep_test])[:, 0])))
            gain[stage].append(scores[0] - scores[1])
    means = {stage: sum(values) / 5 for stage, values in gain.items()}
    print(gain, means)
    assert means["dense"] > means["behind objectness"], means
