"""Open-set verification by hand: thresholds, areas, accepts and ranks, on similarities that can be counted."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from torchive.nn.verification import best_threshold_accuracy, drawn_pairs, verification


def test_separated_classes_score_one_and_noise_scores_chance():
    labels = torch.arange(4).repeat_interleave(10)
    found = verification(5 * torch.eye(4)[labels] + 0.1 * torch.rand(40, 4), labels)
    assert found == {"verification_accuracy": 1, "verification_auc": 1, "true_accepts": 1, "rank_1": 1}
    noise = verification(torch.randn(400, 16), torch.arange(400) % 4)
    assert abs(noise["verification_auc"] - 0.5) < 0.02
    assert abs(noise["verification_accuracy"] - 0.5) < 0.03
    assert noise["true_accepts"] < 0.03
    assert abs(noise["rank_1"] - 0.25) < 0.08


def test_all_figures_against_counting():
    x, labels = torch.randn(25, 3), torch.arange(25) % 3
    labels[24] = 9  # alone in its class: no rank of its own
    found = verification(x, labels, false_accepts=0.1)
    same, different, right = [], [], []
    cosines = [[float(torch.cosine_similarity(a, b, dim=0)) for b in x] for a in x]
    for i in range(25):
        for j in range(i + 1, 25):
            (same if labels[i] == labels[j] else different).append(cosines[i][j])
        nearest = max((j for j in range(25) if j != i), key=lambda j: cosines[i][j])
        if labels[i] != 9:
            right.append(float(labels[nearest] == labels[i]))
    truth = [1] * len(same) + [0] * len(different)
    assert found["verification_auc"] == pytest.approx(roc_auc_score(truth, same + different), abs=1e-6)
    threshold = sorted(different)[len(different) - int(0.1 * len(different)) - 1]
    assert sum(v > threshold for v in different) <= 0.1 * len(different)
    assert found["true_accepts"] == pytest.approx(sum(v > threshold for v in same) / len(same))
    assert found["rank_1"] == pytest.approx(sum(right) / len(right))


def test_ties_count_half():
    found = verification(torch.ones(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found["verification_auc"] == 0.5
    assert found["true_accepts"] == 0
    assert found["verification_accuracy"] == 0.5


def test_a_fold_is_judged_by_the_threshold_of_the_others():
    positive = torch.tensor([[0.9, 0.8], [0.9, 0.8], [0.3, 0.2]])
    negative = torch.tensor([[0.1, 0.5], [0.1, 0.5], [0.1, 0.0]])
    # 0.2 serves the others of folds 0 and 1 best, 0.8 those of fold 2: three, three and two of four are right
    assert best_threshold_accuracy(positive, negative) == pytest.approx(8 / 12)
    assert best_threshold_accuracy(positive, negative - 1) == pytest.approx(10 / 12)


def test_pairs_repeat_only_where_they_are_few_and_never_by_chance():
    few, many = drawn_pairs(torch.arange(700.0), torch.arange(9000.0))
    assert few.shape == many.shape == (10, 300)
    assert set(few.unique(return_counts=True)[1].tolist()) <= {4, 5}
    assert len(many.unique()) == 3000
    assert torch.equal(many, drawn_pairs(torch.arange(700.0), torch.arange(9000.0))[1])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3,\)"):
        verification(torch.ones(4, 2), torch.ones(3))
    with pytest.raises(ValueError, match="got 0 and 6"):
        verification(torch.ones(4, 2), torch.arange(4))
    with pytest.raises(ValueError, match="got 1"):
        verification(torch.ones(4, 2), torch.zeros(4), false_accepts=1)
    assert not math.isnan(verification(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))["rank_1"])
