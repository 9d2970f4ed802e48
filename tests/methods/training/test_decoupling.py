"""Decoupling: the heads against loops, the authors' code and scikit-learn; two stages that keep what they must."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from sklearn.neighbors import NearestCentroid
from tests.engine.toys import toy_recipe, toy_samples
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.data.class_sampler import ClassAwareSampler
from torchive.engine.recipe import resolve_recipe
from torchive.engine.run import load_run
from torchive.engine.train import train
from torchive.methods.losses.eql import EqualizationLoss
from torchive.methods.training.decoupling import (
    Decoupling,
    NearestMeanHead,
    ScaledHead,
    TauHead,
    best_tau,
    class_means,
    normalise_weights,
    shot_accuracy,
    transform_features,
)
from torchive.nn import PlainNetwork
from torchive.structures import Batch

K, D = 5, 6
REPOSITORY, COMMIT = "facebookresearch/classifier-balancing", "f162adef63fdf592d0b8a0f6e52bc481fc08785f"


def layer_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return layer


def procedure(head: str = "crt", **options) -> Decoupling:
    network = PlainNetwork([4, 6], num_classes=0, in_channels=1)
    return Decoupling(network, num_classes=3, head=head, feature_dim=6, **options)


def batch_of(n: int = 12) -> Batch:
    return Batch(torch.rand(n, 1, 8, 8), torch.arange(n) % 3, tuple(str(i) for i in range(n)))


def test_heads_equal_the_loop_reference(double, record):
    x, y, w, b = torch.randn(15, D), torch.arange(15) % K, torch.randn(K, D), torch.randn(K)
    classifier, scales, worst = layer_of(w, b), torch.rand(K) + 0.5, 0.0
    lws, tau = ScaledHead(K), TauHead(0.7)
    lws.scales.data = scales
    ncm = NearestMeanHead(D, K, features="un")
    ncm.gather(x, y, centre=False)
    for n, row in enumerate(x.tolist()):
        for k in range(K):
            dot = sum(a * c for a, c in zip(row, w[k].tolist(), strict=True))
            length = math.sqrt(sum(c * c for c in w[k].tolist()))
            mean = [sum(x[i, d].item() for i in range(15) if y[i] == k) / 3 for d in range(D)]
            expected = {
                "lws": (dot + b[k].item()) * scales[k].item(),
                "tau": dot / length**0.7,
                "ncm": -sum((a - m) ** 2 for a, m in zip(row, mean, strict=True)),
            }
            for name, head in (("lws", lws), ("tau", tau), ("ncm", ncm)):
                worst = max(worst, abs(head(x, classifier)[n, k].item() - expected[name]))
    assert worst < 1e-12
    record("decoupling", "referenced", largest_difference=worst, dtype="float64")


def test_matches_the_authors_code(double, record, parity):
    """LWS with gradient and step, weights by tau, NCM of three kinds, the class-aware sampler's counts."""
    saved = parity("decoupling")
    saved = {k: v.double() if v.is_floating_point() else v for k, v in saved.items()}
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    classifier, head = layer_of(saved["w"], saved["b"]), ScaledHead(K)
    head.scales.data = saved["scales"].clone()
    logits = head(saved["x"], classifier)
    F.cross_entropy(logits, saved["y"]).backward()
    gaps = [logits - saved["lws.logits"]]
    worst["gradient"] = float((head.scales.grad - saved["lws.grad"]).abs().max())
    torch.optim.SGD(head.parameters(), lr=0.2, momentum=0.9).step()
    worst["optimiser_step"] = float((head(saved["x"], classifier) - saved["lws.next"]).abs().max().detach())
    gaps += [normalise_weights(saved["w"], tau) - saved[f"tau.{tau}"] for tau in (0.0, 0.3, 0.7, 1.0)]
    for kind in ("un", "l2n", "cl2n"):
        ncm = NearestMeanHead(D, K, features=kind)
        ncm.gather(saved["x"], saved["y"], centre=True)
        ncm.gather(saved["x"], saved["y"], centre=False)
        gaps += [ncm.means - saved[f"means.{kind}"], ncm(saved["q"], classifier) - saved[f"ncm.{kind}.l2"]]
        means = class_means(transform_features(saved["x"], kind, saved["mean"]), saved["y"], K)
        gaps.append(means - saved[f"means.{kind}"])
        # the release's "cosine" divides by D; the products agree
        product = transform_features(saved["q"], kind, saved["mean"]) @ ncm.means.T
        gaps.append(product / D - saved[f"ncm.{kind}.cos"])
    worst["output"] = max(float(gap.detach().abs().max()) for gap in gaps)
    assert max(worst.values()) < 2e-6  # the release is in float32
    record(
        "decoupling", "matched", repository=REPOSITORY, commit=COMMIT, largest_difference=max(worst.values()), **worst
    )


def test_the_class_aware_sampler_counts_as_the_release(parity):
    saved = parity("decoupling")
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 5)
    found = ClassAwareSampler(labels.tolist(), samples=4)
    drawn = labels[found.order(0)]
    assert len(found) == int(saved["sampler.length"])
    for counts, visits in (
        (drawn.bincount(), drawn[: len(drawn) // 4 * 4].view(-1, 4)),
        (saved["sampler.counts"], saved["sampler.visits"]),
    ):
        assert counts.max() - counts.min() <= 4  # all classes alike, up to one visit
        assert (visits == visits[:, :1]).all()  # four of a class in a row


def test_tau_between_the_classifier_and_its_directions(double):
    w, x = torch.randn(K, D), torch.randn(30, D)
    assert torch.equal(normalise_weights(w, 0.0), w)
    assert torch.allclose(normalise_weights(w, 1.0).norm(dim=1), torch.ones(K))
    for tau in (0.0, 0.4, 1.0):
        plain, scaled = ((x @ normalise_weights(f * w, tau).T).argmax(1) for f in (1, 7.5))
        assert torch.equal(plain, scaled)
    head = TauHead(None)
    loss = F.cross_entropy(head(x, layer_of(w, torch.zeros(K))), torch.arange(30) % K)
    loss.backward()
    assert head.tau.grad != 0
    assert head.tau == 0


def test_lws_is_logistic_regression_on_k_numbers(double):
    x, y, classifier = torch.randn(20, D), torch.arange(20) % K, layer_of(torch.randn(K, D), torch.randn(K))
    head = ScaledHead(K)
    z = classifier(x).detach()
    F.cross_entropy(head(x, classifier), y).backward()
    expected = ((z.softmax(1) - F.one_hot(y, K)) * z).mean(0)
    assert torch.allclose(head.scales.grad, expected)


@pytest.mark.parametrize("head", ["crt", "lws", "tau", "joint"])
def test_merged_weights_give_the_same_logits(double, head):
    method = procedure(head, tau=0.6).double().eval()
    if method.network.head is not None:
        with torch.no_grad():
            for p in method.network.head.parameters():
                p.copy_(torch.rand_like(p) + 0.5)
    merged, images = method.network.merge(), torch.rand(4, 1, 8, 8)
    assert torch.allclose(merged(images), method(images), atol=1e-12)
    assert isinstance(merged[1], nn.Linear)
    with pytest.raises(ValueError, match="NearestMeanHead is no linear layer"):
        procedure("ncm").network.merge()


@pytest.mark.parametrize("kind", ["un", "l2n", "cl2n"])
def test_ncm_is_the_nearest_centroid(double, kind):
    x, y, q = torch.randn(60, D) + 1, torch.randint(0, K, (60,)), torch.randn(50, D) + 1
    head = NearestMeanHead(D, K, features=kind)
    for part in (slice(0, 25), slice(25, 60)):
        head.gather(x[part], y[part], centre=True)
    for part in (slice(0, 40), slice(40, 60)):
        head.gather(x[part], y[part], centre=False)
    train_x, test_x = (transform_features(v, kind, x.mean(0)).numpy() for v in (x, q))
    expected = NearestCentroid().fit(train_x, y.numpy()).predict(test_x)
    assert head(q, nn.Linear(D, K)).argmax(1).tolist() == expected.tolist()
    cosine = NearestMeanHead(D, K, features=kind, distance="cosine")
    cosine.load_state_dict(head.state_dict())
    scores = cosine(q, nn.Linear(D, K))
    assert scores.abs().max() <= 1 + 1e-12
    assert torch.allclose(scores[3, 2], F.cosine_similarity(torch.tensor(test_x[3]), head.means[2], dim=0))


@pytest.mark.parametrize("head", ["crt", "lws", "tau", "ncm"])
def test_the_second_stage_moves_the_head_alone(head):
    method = procedure(head, first_share=0.5, tau=None)
    optimiser = torch.optim.AdamW(method.parameters(), lr=0.05, weight_decay=0.1)

    def step(progress: float) -> dict[str, Tensor]:
        method.before_step(progress)
        optimiser.zero_grad(set_to_none=True)
        method.losses(batch_of())["loss"].backward()
        optimiser.step()
        return copy.deepcopy(method.state_dict())

    method.train()
    start = copy.deepcopy(method.state_dict())
    first = step(0.2)
    assert not [k for k in start if ".head." in k and not torch.equal(start[k], first[k])]
    assert [k for k in start if "encoder" in k and not torch.equal(start[k], first[k])]
    second = [step(0.5), step(0.7), step(0.9)][-1]
    moved = [k for k in first if not torch.equal(first[k], second[k])]
    assert moved
    assert all(".head." in k for k in moved), moved  # not a bit of encoder, norm statistics or classifier
    assert method.sampling(0.4) == 1
    assert method.sampling(0.5) == 0
    third = step(0.1)  # a run begins again
    assert [k for k in second if "encoder" in k and not torch.equal(second[k], third[k])]


def test_what_the_caller_froze_stays_frozen():
    """A pretrained encoder whose first layer is not to learn, through both stages and back, and in a copy."""
    method = procedure("crt", first_share=0.5)
    first = next(method.network.encoder.parameters()).requires_grad_(False)
    learning = [p.requires_grad for p in method.parameters()]
    for progress in (0.0, 0.5, 0.9):
        method.before_step(progress)
        assert not first.requires_grad
    assert not any(p.requires_grad for p in method.network.encoder.parameters())
    for run in (method, copy.deepcopy(method)):
        run.before_step(0.1)
        assert [p.requires_grad for p in run.parameters()] == learning


def test_the_baseline_has_one_stage_and_starts_alike():
    torch.manual_seed(3)
    joint = procedure("joint", first_share=0.5)
    torch.manual_seed(3)
    crt = procedure("crt", first_share=0.5)
    shared = joint.state_dict()
    assert all(torch.equal(value, crt.state_dict()[name]) for name, value in shared.items())
    joint.before_step(0.9)
    assert joint.sampling(0.9) == 1
    joint.losses(batch_of())["loss"].backward()
    assert next(joint.network.encoder.parameters()).grad is not None


def test_the_deployable_answers_with_the_classifier_that_is_trained():
    method, images = procedure("crt", first_share=0.5).eval(), torch.rand(3, 1, 8, 8)
    features = method.network.encoder(images)
    method.before_step(0.1)
    assert torch.equal(method(images), method.network.classifier(features))
    method.before_step(0.6)
    assert torch.equal(method(images), method.network.head.layer(features))
    assert torch.equal(procedure("crt").eval().deployable()(images[:0]), torch.zeros(0, 3))
    scores = method.deployable().predict(images)[0].scores
    assert float(scores.detach().sum()) == pytest.approx(1)


@pytest.mark.parametrize("head", ["crt", "ncm"])
def test_a_recipe_trains_both_stages_and_resumes_within_them(tmp_path: Path, head: str) -> None:
    backbone = {"class_path": "torchive.nn.PlainNetwork", "init_args": {"widths": [4, 6], "num_classes": 0}}
    arguments = {"head": head, "backbone": backbone, "first_share": 0.5}
    model = {"class_path": "decoupling", "init_args": arguments}
    recipe = resolve_recipe(
        {**toy_recipe().to_dict(), "model": model, "schedule": {"restarts": [0.5]}, "metric": "balanced_accuracy"}
    )
    samples = toy_samples("classification")
    whole = train(recipe, tmp_path / "whole", samples=samples, progress=False)
    assert whole.steps == 12
    for stop in (4, 9):
        train(recipe, tmp_path / "parts", samples=samples, progress=False, stop_after=stop)
    again = train(recipe, tmp_path / "parts", samples=samples, progress=False)
    assert again.metrics == whole.metrics
    one, other = (load_run(tmp_path / name)[1].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    loaded = load_run(tmp_path / "whole")[1]
    assert not loaded.network.joint
    assert {"balanced_accuracy", "calibration_error"} <= whole.metrics.keys()


def test_the_first_stage_takes_any_loss():
    loss = EqualizationLoss(class_counts=[50, 4, 1], variant="softmax")
    method = procedure("lws", loss=loss, first_share=0.5)
    method.before_step(0.0)
    torch.manual_seed(1)
    found = method.losses(batch_of(60))["loss"]
    torch.manual_seed(1)
    batch = batch_of(60)
    logits = method.network.classifier(method.network.encoder(batch.inputs))
    assert torch.allclose(found, loss(logits, batch.targets))
    assert not torch.allclose(found, F.cross_entropy(logits, batch.targets))


def test_best_tau_looks_at_the_mean_recall():
    weight = torch.tensor([[10.0, 0.0], [0.0, 1.0]])  # a frequent and a rare class
    features = torch.cat([torch.tensor([[1.0, 0.0]] * 98), torch.tensor([[1.0, 2.0]] * 2)])
    labels = torch.tensor([0] * 98 + [1] * 2)
    assert best_tau(features, labels, weight) == 0.7  # the first of the grid with 10 ** (1 - tau) below 2
    assert best_tau(features, labels, torch.eye(2)) == 0
    with pytest.raises(ValueError, match="got none"):
        best_tau(features, labels, weight, [])


def test_shots():
    predicted, labels = torch.tensor([0, 0, 1, 2, 0, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = shot_accuracy(predicted, labels, [500, 100, 19])
    assert found == {"all": pytest.approx(4 / 6), "many": 1, "medium": 0.5, "few": 0.5}
    assert "few" not in shot_accuracy(predicted, labels, [500, 100, 20])


def test_bad_arguments_are_named():
    for options, found in (
        ({"head": "svm"}, "svm"),
        ({"first_share": 1.0}, r"1\.0"),
        ({"head": "tau", "tau": 2}, "got 2"),
        ({"head": "ncm", "features": "raw"}, "raw"),
    ):
        with pytest.raises(ValueError, match=found):
            procedure(**options)
    with pytest.raises(ValueError, match="mean, got None"):
        transform_features(torch.ones(2, 3), "cl2n")
    with pytest.raises(ValueError, match="'raw'"):
        transform_features(torch.ones(2, 3), "raw")  # type: ignore[arg-type]


@pytest.mark.slow
def test_long_tailed_digits_few_shots_gain_and_norms_lose_the_counts(record):
    """Imbalance 100 on small digits, five seeds: each re-balanced head against the joint classifier."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    counts = [max(round(120 * 100 ** (-k / 9)), 1) for k in range(10)]
    few: dict[str, float] = {}
    every: dict[str, float] = {}
    correlation = {"joint": 0.0, "crt": 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        rows = [torch.nonzero(y == k)[:, 0][torch.randperm(int((y == k).sum()))] for k in range(10)]
        train_rows = torch.cat([r[:n] for r, n in zip(rows, counts, strict=True)])
        test_rows = torch.cat([r[120:] for r in rows])
        for head in ("joint", "crt", "lws", "tau", "ncm"):
            torch.manual_seed(seed)
            body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
            method = Decoupling(body, num_classes=10, head=head, first_share=0.8, feature_dim=32)
            optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
            for step in range(1000):
                method.before_step(step / 1000)
                if method.sampling(step / 1000) == 1:
                    chosen = train_rows[torch.randint(0, len(train_rows), (64,))]
                else:
                    chosen = torch.stack(
                        [rows[k][torch.randint(0, counts[k], ())] for k in torch.randint(0, 10, (64,))]
                    )
                optimiser.zero_grad(set_to_none=True)
                method.losses(Batch(x[chosen], y[chosen], ("",) * 64))["loss"].backward()
                optimiser.step()
            with torch.no_grad():
                found = shot_accuracy(method.eval()(x[test_rows]).argmax(1), y[test_rows], counts)
            few[head] = few.get(head, 0) + found["few"] / 5
            every[head] = every.get(head, 0) + found["all"] / 5
            if head in correlation:
                layer = method.network.classifier if head == "joint" else method.network.head.layer
                pair = torch.stack([layer.weight.detach().norm(dim=1), torch.tensor(counts).float().log()])
                correlation[head] += float(torch.corrcoef(pair)[0, 1]) / 5
    print(few, every, correlation)
    assert min(few[head] for head in ("crt", "lws", "tau")) > few["joint"], few
    assert correlation["joint"] > 0.5, correlation
    assert correlation["crt"] < correlation["joint"] - 0.3, correlation
