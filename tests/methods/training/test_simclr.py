"""SimCLR: eq. 1 by loops, its exact special cases, the authors' code and lightly, and two processes against one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from torchive.methods.training.simclr import (
    MarginTripletLoss,
    NTLogisticLoss,
    NTXentLoss,
    ProjectionHead,
    SimCLR,
    SimCLRViews,
    alignment,
    contrastive_accuracy,
    learning_rate,
    norm_leak,
    uniformity,
    warmup_cosine,
)
from torchive.methods.training.simclr.loss import similarities
from torchive.nn.lars import LARS
from torchive.structures import Batch
from torchive.testing.models import SmallNetwork

TAUS = (0.1, 0.5)


def small(**options: Any) -> SimCLR:
    return SimCLR(SmallNetwork(num_classes=12), embedding_dim=6, **options)


def batch_of(inputs: Tensor) -> Batch:
    return Batch(inputs, None, tuple(str(i) for i in range(len(inputs))))


def loops(first: Tensor, second: Tensor, term: Callable[[float, list[float]], float]) -> list[float]:
    """For each of the 2N embeddings a term of its cosine with the positive and its cosines with the negatives."""
    z = torch.cat([first, second]).tolist()
    n = len(first)

    def cosine(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(z[i], z[j], strict=True))
        return dot / math.sqrt(sum(a * a for a in z[i])) / math.sqrt(sum(b * b for b in z[j]))

    rows = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        rows.append(term(cosine(i, j), [cosine(i, k) for k in range(2 * n) if k not in (i, j)]))
    return rows


def xent(tau: float) -> Callable[[float, list[float]], float]:
    return lambda pos, neg: -math.log(math.exp(pos / tau) / sum(math.exp(s / tau) for s in [pos, *neg]))


def semi_hard(pos: float, neg: list[float]) -> float:
    farther = [s for s in neg if s < pos]
    return max(farther) if farther else min(neg)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


REFERENCES: dict[str, tuple[nn.Module, Callable[[float, list[float]], float]]] = {
    "nt-xent": (NTXentLoss(temperature=0.2, reduction="none"), xent(0.2)),
    "nt-logistic": (
        NTLogisticLoss(temperature=0.3, reduction="none"),
        lambda p, neg: -math.log(sigmoid(p / 0.3)) - sum(math.log(sigmoid(-s / 0.3)) for s in neg) / len(neg),
    ),
    "nt-logistic semi-hard": (
        NTLogisticLoss(temperature=0.3, semi_hard=True, reduction="none"),
        lambda p, neg: -math.log(sigmoid(p / 0.3)) - math.log(sigmoid(-semi_hard(p, neg) / 0.3)),
    ),
    "triplet": (
        MarginTripletLoss(margin=0.4, reduction="none"),
        lambda p, neg: sum(max(s - p + 0.4, 0) for s in neg) / len(neg),
    ),
    "triplet semi-hard": (
        MarginTripletLoss(margin=0.4, semi_hard=True, reduction="none"),
        lambda p, neg: max(semi_hard(p, neg) - p + 0.4, 0),
    ),
}


def embeddings(n: int = 6, e: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(n, e, generator=g, dtype=torch.float64)
    return first, 0.5 * first + torch.randn(n, e, generator=g, dtype=torch.float64)


def test_losses_equal_loops_over_pairs(record: Callable[..., None]) -> None:
    first, second = embeddings()
    gaps = {}
    for name, (loss, term) in REFERENCES.items():
        rows = torch.tensor(loops(first, second, term), dtype=torch.float64)
        gaps[name] = float((loss(first, second) - rows).abs().max())
        assert rows.max() > 0
        for reduction, expected in (("mean", rows.mean()), ("sum", rows.sum())):
            other = copy.copy(loss)
            other.reduction = reduction
            gaps[f"{name} {reduction}"] = float((other(first, second) - expected).abs())
    assert max(gaps.values()) < 1e-12, gaps
    record("simclr", "referenced", largest_difference=max(gaps.values()), losses=list(REFERENCES))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_special_cases_are_exact(tau: float, n: int) -> None:
    loss = NTXentLoss(temperature=tau)
    same = torch.ones(n, 3, dtype=torch.float64)
    assert float(loss(same, same)) == pytest.approx(math.log(2 * n - 1), abs=1e-14)
    apart = torch.eye(n, dtype=torch.float64) * 3
    expected = math.log(1 + (2 * n - 2) * math.exp(-1 / tau))
    assert float(loss(apart, 0.1 * apart)) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_and_invariances(name: str) -> None:
    loss = REFERENCES[name][0]
    first, second = embeddings(4, 3, seed=5)
    assert torch.autograd.gradcheck(loss, (first.requires_grad_(), second.requires_grad_()))
    rows = loss(first, second)
    torch.testing.assert_close(loss(7 * first, 0.01 * second), rows, rtol=1e-12, atol=1e-14)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    torch.testing.assert_close(loss(first @ turn, second @ turn), rows, rtol=1e-11, atol=1e-13)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(loss(first[order], second[order]), rows.view(2, 4)[:, order].flatten())
    torch.testing.assert_close(loss(second, first), rows.view(2, 4).flip(0).flatten())


@pytest.mark.parametrize("name", REFERENCES)
def test_small_and_extreme_batches_stay_finite(name: str) -> None:
    loss = copy.copy(REFERENCES[name][0])
    loss.reduction = "mean"
    for n, scale in ((0, 1.0), (1, 1.0), (5, 1e4), (5, 1e-9)):
        pair = [(scale * torch.randn(n, 4)).requires_grad_() for _ in range(2)]
        value = loss(*pair)
        value.backward()
        assert torch.isfinite(value), (n, scale)
        assert all(torch.isfinite(x.grad).all() for x in pair), (n, scale)
        if n == 0 or (n == 1 and name == "nt-xent"):
            assert value == 0


def test_matches_the_authors_code(parity: Callable[[str], dict[str, Tensor]], record: Callable[..., None]) -> None:
    """Their objective in TensorFlow 2.21 (float64): twice the mean. Their LARS (float32), three steps."""
    saved = parity("simclr")
    gaps: dict[str, float] = {}
    for tau in TAUS:
        z = saved["official.z"].clone().requires_grad_()
        value = NTXentLoss(temperature=tau)(z[:6], z[6:])
        value.backward()
        assert z.grad is not None
        cosine = similarities(z[:6], z[6:]).cosine.detach()
        gaps[f"logits {tau}"] = float((cosine[:6, 6:] / tau - saved[f"official.logits_ab.{tau}"]).abs().max())
        gaps[f"loss {tau}"] = float((2 * value.detach() - saved[f"official.loss.{tau}"]).abs())
        gaps[f"gradient {tau}"] = float((2 * z.grad - saved[f"official.grad.{tau}"]).abs().max())
        z.grad = None
        value = NTXentLoss(temperature=tau)(z[:6], z[6:])
        value.backward()
        gaps[f"lightly loss {tau}"] = float((value.detach() - saved[f"lightly.loss.{tau}"]).abs())
        gaps[f"lightly gradient {tau}"] = float((z.grad - saved[f"lightly.grad.{tau}"]).abs().max())
    assert max(gaps.values()) < 1e-12, gaps
    steps = _lars_gap(saved)
    assert steps < 1e-6
    record(
        "simclr",
        "matched",
        repository="google-research/simclr",
        commit="383d4143fd8cf7879ae10f1046a9baeb753ff438",
        also="lightly 1.6.0",
        largest_difference=max(gaps.values()),
        largest_difference_of_lars_steps_float32=steps,
        differences=gaps,
    )


def _lars_gap(saved: dict[str, Tensor]) -> float:
    names = [key.removeprefix("lars.init.") for key in saved if key.startswith("lars.init.")]
    assert len(names) == 5
    largest = 0.0
    for nesterov in (False, True):
        weights = {name: nn.Parameter(saved[f"lars.init.{name}"].clone()) for name in names}
        optimizer = LARS(weights.values(), 0.3, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
        for step in range(3):
            for name, weight in weights.items():
                weight.grad = saved[f"lars.gradient.{step}.{name}"].clone()
            optimizer.step()
            for name, weight in weights.items():
                expected = saved[f"lars.after.{int(nesterov)}.{step}.{name}"]
                largest = max(largest, float((weight.detach() - expected).abs().max()))
    return largest


def test_head_equals_lightlys_and_none_and_linear_are_that(parity: Callable[[str], dict[str, Tensor]]) -> None:
    saved = parity("simclr")
    head = ProjectionHead(6, hidden_dim=8, embedding_dim=4).double().train()
    theirs = {k.removeprefix("head.weights.layers."): v for k, v in saved.items() if k.startswith("head.weights.")}
    shift = theirs.pop("4.bias")  # lightly's last norm has a shift; the authors' has none
    head.load_state_dict({k: v for k, v in theirs.items() if "running" not in k and "num_" not in k}, strict=False)
    torch.testing.assert_close(head(saved["head.x"]) + shift, saved["head.y"], rtol=1e-12, atol=1e-12)
    x = torch.randn(5, 6)
    assert torch.equal(ProjectionHead(6, head="none")(x), x)
    linear = ProjectionHead(6, head="linear", head_norm=False)
    assert [tuple(p.shape) for p in linear.parameters()] == [(128, 6)]
    plain = ProjectionHead(6, hidden_dim=8, embedding_dim=4, head_norm=False)
    assert [type(part) for part in plain] == [nn.Linear, nn.ReLU, nn.Linear]


def test_procedure_sees_both_views_and_keeps_the_encoder() -> None:
    method = small(temperature=0.5).double()
    inputs = torch.rand(4, 2, 3, 8, 8, dtype=torch.float64)
    encoder = method.deployable()
    h = encoder(inputs.flatten(0, 1))
    assert h.shape == (8, 12)
    z = method.head(h).view(4, 2, 6)
    expected = sum(loops(z[:, 0], z[:, 1], xent(0.5))) / 8
    assert float(method.losses(batch_of(inputs))["loss"]) == pytest.approx(expected, abs=1e-10)
    assert torch.equal(method(inputs[:, 0]), encoder(inputs[:, 0]))
    assert {id(p) for p in encoder.parameters()} < {id(p) for p in method.parameters()}
    found = method.diagnose(batch_of(inputs))
    assert set(found) == {"contrastive_accuracy", "alignment", "uniformity"}
    with pytest.raises(ValueError, match=r"\(N, 2, C, H, W\), got \(4, 3, 8, 8\)"):
        method.losses(batch_of(inputs[:, 0]))


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_none_and_one(n: int) -> None:
    method = small()
    loss = method.losses(batch_of(torch.rand(n, 2, 3, 8, 8)))["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss", [None, NTLogisticLoss(semi_hard=True), MarginTripletLoss(semi_hard=True)])
def test_training_finds_the_pairs(loss: nn.Module | None) -> None:
    torch.manual_seed(3)
    method = small(loss=loss)
    images = torch.rand(16, 3, 1, 1).expand(16, 3, 8, 8)
    optimizer = LARS(method.parameters(), lr=2.0)
    for _ in range(40):
        views = images[:, None] + 0.05 * torch.randn(16, 2, 3, 8, 8)
        optimizer.zero_grad()
        method.losses(batch_of(views))["loss"].backward()
        optimizer.step()
    found = method.diagnose(batch_of(images[:, None] + 0.05 * torch.randn(16, 2, 3, 8, 8)))
    assert found["contrastive_accuracy"] > 0.7


def test_named_backbones_and_stems() -> None:
    import timm

    method = SimCLR("timm/test_resnet", in_channels=1, stem="backbone")
    assert method.deployable()(torch.rand(2, 1, 32, 32)).shape == (2, timm.create_model("test_resnet").num_features)
    with torch.device("meta"):
        paper = SimCLR("timm/resnet50")
        small_images = SimCLR("torchvision/resnet18", stem="small")
    assert paper.encoder.feature_dim == paper.head[0].out_features == 2048
    assert paper.embedding_dim == 128
    assert sum(p.numel() for p in paper.encoder.parameters()) == 23_508_032
    stem = small_images.encoder.network.get_submodule("body.conv1")
    assert (stem.kernel_size, stem.stride) == ((3, 3), (1, 1))
    assert SimCLR(SmallNetwork(num_classes=7), head="none").embedding_dim == 7
    with pytest.raises(ValueError, match="small stem needs conv1"):
        SimCLR(SmallNetwork(), stem="small")
    with pytest.raises(ValueError, match="'deep'"):
        SimCLR(SmallNetwork(), head="deep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 0"):
        SimCLR(SmallNetwork(), temperature=0)


def _distributed(rank: int, folder: str, sizes: list[int], kinds: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(sizes))
    try:
        found = {kind: _averaged(rank, sizes, kind) for kind in kinds}
        if rank == 0:
            torch.save(found, f"{folder}/result.pt")
    finally:
        dist.destroy_process_group()


def _averaged(rank: int, sizes: list[int], kind: str) -> dict[str, Any]:
    """Loss and gradients of this process's share, averaged over the processes as DistributedDataParallel does."""
    method, inputs = _case(kind)
    start = sum(sizes[:rank])
    loss = method.losses(batch_of(inputs[start : start + sizes[rank]]))["loss"]
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    value = loss.detach().clone()
    for tensor in (value, *gradients.values()):
        dist.all_reduce(tensor)
        tensor /= len(sizes)
    return {"loss": value, "gradients": gradients, "buffers": dict(method.named_buffers())}


def _case(kind: str) -> tuple[SimCLR, Tensor]:
    torch.manual_seed(11)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3))
    loss = {"nt-xent": None, "triplet": MarginTripletLoss(semi_hard=True)}[kind]
    method = SimCLR(body, embedding_dim=6, temperature=0.3, loss=loss, sync_norm=True).double()
    return method, torch.rand(5, 2, 3, 8, 8, dtype=torch.float64)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    """Loss, every gradient as DistributedDataParallel averages it, and running statistics; shares of 3 and 2 images."""
    kinds = ["nt-xent", "triplet"]
    mp.spawn(_distributed, args=(str(tmp_path), [3, 2], kinds), nprocs=2)
    results = torch.load(tmp_path / "result.pt", weights_only=True)
    for kind in kinds:
        found, (method, inputs) = results[kind], _case(kind)
        loss = method.losses(batch_of(inputs))["loss"]
        loss.backward()
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=1e-14)
        assert loss > 0
        for name, parameter in method.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-9, atol=1e-13, msg=name)
        for name, buffer in method.named_buffers():
            torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-12, atol=1e-14, msg=name)


def test_views_have_the_papers_probabilities() -> None:
    views = SimCLRViews(16, area=(1, 1), aspect=(1, 1), jitter=0, blur=0)
    image = torch.rand(3, 16, 16)
    assert torch.allclose(SimCLRViews(16, area=(1, 1), aspect=(1, 1), flip=0, jitter=0, grey=0, blur=0)(image), image)
    drawn = torch.cat([views(image) for _ in range(1000)])
    flipped = ((drawn - image).abs().amax((1, 2, 3)) > 1e-4) & ((drawn - drawn.mean(1, keepdim=True)).abs().amax() > 0)
    grey = (drawn[:, 0] - drawn[:, 1]).abs().amax((1, 2)) < 1e-5
    mirrored = (drawn.mean(1)[~grey] - image.mean(0).flip(-1)).abs().amax((1, 2)) < 1e-4
    assert abs(float(grey.float().mean()) - 0.2) < 0.04
    assert abs(float(mirrored.float().mean()) - 0.5) < 0.05
    assert flipped.any()


def test_views_are_drawn_apart_and_repeat_with_the_seed() -> None:
    views = SimCLR.views(32, strength=0.5)
    image = torch.rand(3, 48, 40)
    torch.manual_seed(1)
    first = views(image)
    assert first.shape == (2, 3, 32, 32)
    assert not torch.equal(first[0], first[1])
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    torch.manual_seed(1)
    assert torch.equal(views(image), first)
    assert SimCLRViews(20, views=5)(torch.rand(1, 30, 30)).shape == (5, 1, 20, 20)


def test_views_by_hand() -> None:
    """Kernels as the authors': the radius is half of a tenth of the side. Grey images change in light alone."""
    kernels = {size: SimCLRViews(size).blur for size in (224, 64, 32, 19)}
    sizes = {s: b.transforms[0].kernel_size[0] if b is not None else 1 for s, b in kernels.items()}
    assert sizes == {224: 23, 64: 7, 32: 3, 19: 1}
    jitter = SimCLRViews(32).colour
    assert jitter.brightness == pytest.approx((0.2, 1.8))
    assert jitter.hue == pytest.approx((-0.2, 0.2))
    full = SimCLRViews(16, area=(1, 1), aspect=(1, 1), flip=0, jitter=1, grey=0, blur=0)
    one = torch.full((1, 16, 16), 0.25)
    values = torch.stack([full(one)[0].mean() for _ in range(300)])
    assert 0.04 < float(values.min()) < 0.1
    assert 0.4 < float(values.max()) < 0.46
    with pytest.raises(ValueError, match=r"got \(4, 8, 8\)"):
        full(torch.rand(4, 8, 8))
    with pytest.raises(ValueError, match="probabilities"):
        SimCLRViews(8, flip=1.5)


def test_diagnostics_by_hand() -> None:
    eye = torch.eye(4)
    swapped = eye[[1, 0, 2, 3]]
    assert contrastive_accuracy(eye, eye) == 1
    assert contrastive_accuracy(eye, swapped) == 0.5
    assert contrastive_accuracy(eye, swapped, candidates="other") == 0.5
    # the nearest of all is a first view, the nearest second view is the right one
    close, other = torch.tensor([[1.0, 0], [1, 0.1]]), torch.tensor([[1.0, -1], [1, 1.3]])
    assert contrastive_accuracy(close, other, candidates="other") == 1
    assert contrastive_accuracy(close, other) == 0.5
    assert alignment(3 * eye, eye) == 0
    assert alignment(eye, -2 * eye) == pytest.approx(4)
    pair = torch.tensor([[1.0, 0], [0, 5]])
    assert float(uniformity(pair)) == pytest.approx(-4)
    assert float(uniformity(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))) == pytest.approx(
        math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    )


def test_local_statistics_leak_the_positives_and_shuffling_shows_it() -> None:
    """Both views are noise. Norms over these two alone give opposite values: their sizes tell who belongs together."""

    noise = torch.randn(32, 2, 16)

    class Sizes(nn.Module):
        """A group of one image: its two views have the same distance from their common mean."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(16, affine=False, eps=100.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).abs()

    network = Sizes()
    before = copy.deepcopy(network.state_dict())
    found = norm_leak(network, noise, group=1)
    assert found["together"] == 1
    assert found["apart"] < 0.1
    assert found["leak"] == found["together"] - found["apart"]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    free = norm_leak(nn.Linear(16, 8), torch.randn(32, 1, 16).expand(32, 2, 16), group=4)
    assert free == {"together": 1.0, "apart": 1.0, "leak": 0.0}
    with pytest.raises(ValueError, match="32 images in groups of 5"):
        norm_leak(network, noise, group=5)


def test_learning_rates() -> None:
    assert learning_rate(4096) == pytest.approx(4.8)
    assert learning_rate(4096, scaling="sqrt") == pytest.approx(4.8)
    assert learning_rate(256, scaling="sqrt") == pytest.approx(1.2)
    factors = [warmup_cosine(step, steps=110, warmup=10) for step in (0, 5, 10, 60, 110, 200)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    with pytest.raises(ValueError, match="0 <= warmup < steps"):
        warmup_cosine(0, steps=5, warmup=5)
