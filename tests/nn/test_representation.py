"""Encoders, probes, LARS, global batch norm and the denoising auto-encoder."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.denoising import DenoisingAutoEncoder
from torchive.nn.encoder import build_encoder
from torchive.nn.global_norm import GlobalBatchNorm
from torchive.nn.lars import LARS
from torchive.nn.probe import few_labels, knn_accuracy, linear_evaluation, with_linear_head
from torchive.structures import Batch
from torchive.testing.models import SmallNetwork


def blobs(n: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return F.one_hot(labels, 5).float() * 3 + spread * torch.randn(n, 5, generator=g), labels


def test_nearest_neighbours_equal_a_loop() -> None:
    x, y = blobs(40, 1.5, 1)
    bank, labels = blobs(60, 1.5, 2)
    right = 0
    for row, truth in zip(x, y, strict=True):
        ranked = sorted(
            (
                (float(F.cosine_similarity(row, other, dim=0)), int(label))
                for other, label in zip(bank, labels, strict=True)
            ),
            reverse=True,
        )[:7]
        votes = [sum(math.exp(c / 0.1) for c, label in ranked if label == k) for k in range(3)]
        right += votes.index(max(votes)) == int(truth)
    assert 0.5 < right / 40 < 1
    assert knn_accuracy(x, y, bank, labels, k=7) == right / 40
    assert knn_accuracy(x, y, bank, labels, k=7, chunk=9) == right / 40
    assert knn_accuracy(x, y, x, y, k=1) == 1
    assert 0 < knn_accuracy(x, y, bank, labels) <= 1  # k = 200 of 60


def test_linear_evaluation_separates_what_a_line_can_and_not_noise() -> None:
    x, y = blobs(300, 0.5, 1)
    bank, labels = blobs(300, 0.5, 2)
    assert linear_evaluation(x, y, bank, labels, lr=0.5) > 0.98
    noise = torch.randn(300, 5), torch.randn(300, 5)
    assert abs(linear_evaluation(noise[0], y, noise[1], labels, lr=0.5) - 1 / 3) < 0.12
    assert linear_evaluation(1e-4 * x, y, 1e-4 * bank, labels, standardise=True, lr=0.5) > 0.98
    seen: list[int] = []

    def augmented(epoch: int) -> Tensor:
        seen.append(epoch)
        return bank

    whole = linear_evaluation(x, y, augmented, labels, epochs=5)
    assert seen == [0, 1, 2, 3, 4]
    assert whole == linear_evaluation(x, y, bank, labels, epochs=5)
    with pytest.raises(ValueError, match=r"expected features \(N, D\)"):
        linear_evaluation(x, y[:5], bank, labels)


def test_few_labels_are_a_share_of_each_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3)
    kept = few_labels(labels, 0.1)
    assert torch.bincount(labels[kept]).tolist() == [10, 5, 1]
    assert torch.equal(kept, few_labels(labels, 0.1))
    assert len(few_labels(labels, 1.0)) == 153


def test_a_linear_head_starts_from_zero() -> None:
    model = with_linear_head(SmallNetwork(num_classes=6), 6, 3)
    assert not model(torch.rand(2, 3, 8, 8)).any()


def test_lars_by_hand() -> None:
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([weight, bias], 0.5, momentum=0.9, weight_decay=0.1)
    weight.grad, bias.grad = torch.tensor([[0.7, -0.4]]), torch.tensor([2.0])
    optimizer.step()
    # g + 0.1 w = (1, 0); ratio = 0.001 * 5 / 1; bias by plain SGD
    torch.testing.assert_close(weight.detach(), torch.tensor([[3 - 0.5 * 0.005, 4.0]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([0.0]))
    bias.grad = torch.zeros(1)
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.tensor([-0.9]))
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], 0.5).step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.5))
    fixed = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    fixed.grad = torch.tensor([[1.0, 0.0]])
    LARS([{"params": [fixed], "adapt": False}], 0.5).step()
    torch.testing.assert_close(fixed.detach(), torch.tensor([[2.5, 4.0]]))


def test_lars_resumes_from_its_state() -> None:
    def run(stop: bool) -> Tensor:
        weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        optimizer = LARS([weight], 0.3)
        for step in range(4):
            if stop and step == 2:
                state = optimizer.state_dict()
                optimizer = LARS([weight], 0.1)
                optimizer.load_state_dict(state)
            weight.grad = torch.full((2, 3), float(step + 1)) + torch.eye(2, 3)
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(False), run(True))


def test_global_norm_is_batch_norm_in_one_process() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))
    x = torch.rand(6, 3, 8, 8)
    expected = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert GlobalBatchNorm.convert(model) is model
    assert sum(isinstance(part, GlobalBatchNorm) for part in model.modules()) == 2
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert torch.equal(model(x), expected)
    import timm

    with pytest.raises(ValueError, match="BatchNormAct2d"):
        GlobalBatchNorm.convert(timm.create_model("test_efficientnet"))


def test_encoders_pool_whatever_comes() -> None:
    x = torch.rand(2, 3, 32, 32)
    maps = build_encoder(nn.Conv2d(3, 7, 3))
    assert (maps.feature_dim, maps(x).shape) == (7, (2, 7))
    torch.testing.assert_close(maps(x), maps.network(x).mean((2, 3)))
    assert build_encoder("timm/test_resnet", in_channels=1)(x[:, :1]).ndim == 2

    class Levels(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, x[:, :2]]

    assert build_encoder(Levels())(x).shape == (2, 2)
    with pytest.raises(ValueError, match="give feature_dim"):
        build_encoder(nn.Linear(5, 5))
    assert build_encoder(nn.Linear(5, 5), feature_dim=5).feature_dim == 5


@pytest.mark.parametrize("corruption", ["noise", "patches"])
def test_auto_encoder_learns_to_give_back(corruption: str) -> None:
    torch.manual_seed(0)
    model = DenoisingAutoEncoder(
        SmallNetwork(num_classes=16), image_size=20, corruption=corruption, widths=32, patch=6, noise=0.2
    )
    images = torch.rand(8, 2, 3, 1, 1).expand(8, 2, 3, 20, 20)
    batch = Batch(images, None, tuple("abcdefgh"))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.losses(batch)["loss"]
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert sum(values[-5:]) / 5 < 0.5 * values[0]
    assert model.deployable()(images[:, 0]).shape == (8, 16)
    with pytest.raises(ValueError, match="20 x 20"):
        model.losses(Batch(torch.rand(2, 3, 8, 8), None, ("a", "b")))


def test_hidden_patches_are_the_ones_scored() -> None:
    model = DenoisingAutoEncoder(SmallNetwork(), image_size=16, corruption="patches", patch=4, hidden=0.25, widths=16)
    corrupted, scored = model._corrupt(torch.ones(3, 3, 16, 16))
    assert scored is not None
    assert scored.sum((1, 2, 3)).tolist() == [64.0] * 3
    assert torch.equal(corrupted, (1 - scored).expand(3, 3, 16, 16))
