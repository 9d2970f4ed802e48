"""Metrics against slow references, and an evaluation that disturbs nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.toys import ToySet, toy_recipe, toy_samples
from torch import nn

from torchive.engine.build import build_trainable
from torchive.engine.evaluate import evaluate, evaluate_run, score, score_run
from torchive.engine.metrics import DECIDES, METRICS, confusion, metrics_of, record_of
from torchive.engine.probe import linear_probe, represent
from torchive.engine.recipe import RecipeError
from torchive.engine.run import open_run
from torchive.engine.train import train
from torchive.nn.probe import knn_accuracy
from torchive.structures import Classification, Detections, Panoptic, Segment, Segmentation


def test_classification_against_counting() -> None:
    scores = torch.rand(50, 4, dtype=torch.float64).softmax(1)
    target = torch.randint(0, 3, (50,))  # class 3 does not occur
    records = [record_of("classification", Classification(s), t, 4) for s, t in zip(scores, target, strict=True)]
    found = metrics_of("classification", records, ("a", "b", "c", "d"))
    guess = scores.argmax(1)
    assert found["accuracy"] == pytest.approx(float((guess == target).double().mean()))
    recall = [float((guess[target == k] == k).double().mean()) for k in range(3)]
    assert found["balanced_accuracy"] == pytest.approx(sum(recall) / 3)
    assert [found[f"recall/{name}"] for name in "abc"] == pytest.approx(recall)
    assert "recall/d" not in found
    loss = -np.log([float(scores[i, t]) for i, t in enumerate(target)]).mean()
    assert found["log_loss"] == pytest.approx(loss, rel=1e-5)


def test_segmentation_against_sets_of_pixels() -> None:
    guess, target = torch.randint(0, 3, (5, 9, 7)), torch.randint(0, 3, (5, 9, 7))
    target[0, :3] = 255
    records = [record_of("segmentation", Segmentation(g), t, 4) for g, t in zip(guess, target, strict=True)]
    found = metrics_of("segmentation", records, ("a", "b", "c", "absent"))
    valid, iou, dice = target != 255, [], []
    for k in range(3):
        a, b = (guess == k) & valid, (target == k) & valid
        iou.append(int((a & b).sum()) / int((a | b).sum()))
        dice.append(2 * int((a & b).sum()) / int(a.sum() + b.sum()))
    assert found["mean_iou"] == pytest.approx(sum(iou) / 3)
    assert found["dice"] == pytest.approx(sum(dice) / 3)
    assert "iou/absent" not in found
    assert confusion(guess[0], target[0], 4).sum() == int(valid[0].sum())


def _objects(shift: float, scores: list[float]) -> tuple[Detections, dict[str, torch.Tensor]]:
    boxes = torch.tensor([[10.0, 10, 60, 60], [100, 100, 180, 150]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    return Detections(boxes + shift, torch.tensor([1, 2]), torch.tensor(scores)), target


def test_detection_in_cases_known_by_hand() -> None:
    def scored(found: Detections, target: dict[str, torch.Tensor]) -> dict[str, float]:
        return metrics_of("detection", [record_of("detection", found, target, 2)], ("cat", "dog"))

    perfect = scored(*_objects(0.0, [0.9, 0.8]))
    assert perfect["map"] == pytest.approx(1.0)
    assert perfect["map/cat"] == pytest.approx(1.0)
    assert perfect["map_medium"] == pytest.approx(1.0)  # both have 50 x 50 and 80 x 50 pixels
    assert not {"map_small", "map_large"} & set(perfect)
    shifted = scored(*_objects(10.0, [0.9, 0.8]))  # overlaps 0.47 and 0.54
    assert shifted["map_50"] == pytest.approx(0.5)
    assert shifted["map_75"] == pytest.approx(0.0)
    close = scored(*_objects(2.0, [0.9, 0.8]))  # overlaps 0.854 and 0.880: right at 0.8 and 0.85, not at 0.9
    assert close["map_80_90"] == pytest.approx(2 / 3)
    assert perfect["map_80_90"] == pytest.approx(1.0)
    found, target = _objects(0.0, [0.9, 0.8])
    swapped = Detections(found.boxes, torch.tensor([2, 1]), found.scores)
    assert scored(swapped, target)["map"] == pytest.approx(0.0)
    none = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert scored(none, target)["map"] == pytest.approx(0.0)


def test_masks_are_scored_where_both_sides_have_them() -> None:
    samples = ToySet("detection", 4)
    records = []
    for i in range(4):
        target = samples[i].target
        found = Detections(target["boxes"], target["labels"], torch.tensor([0.9]), target["masks"].bool())
        records.append(record_of("detection", found, target, 1))
    found = metrics_of("detection", records, samples.classes)
    assert found["mask_map"] == pytest.approx(1.0)
    assert found["map"] == pytest.approx(1.0)


def test_nothing_found_scores_zero() -> None:
    """Neither boxes nor masks, in images with and without objects: zeros, as early in a training run."""
    none, masks = torch.zeros(0, 4), torch.zeros(0, 8, 8, dtype=torch.uint8)
    found = Detections(none, torch.zeros(0, dtype=torch.int64), torch.zeros(0), masks.bool())
    target = {"boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([1]), "masks": masks.new_ones(1, 8, 8)}
    empty = {"boxes": none, "labels": torch.zeros(0, dtype=torch.int64), "masks": masks}
    metrics = metrics_of("detection", [record_of("detection", found, t, 1) for t in (target, empty)], ["cell"])
    assert metrics["map"] == metrics["mask_map"] == metrics["mask_map_80_90"] == 0
    assert metrics_of("detection", [record_of("detection", found, empty, 1)], ["cell"])["mask_map"] == 0


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_evaluating_disturbs_nothing(task: str) -> None:
    recipe, samples = toy_recipe(task), ToySet(task, 9)
    model = build_trainable(recipe, samples)
    next(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    first = score(model, samples, recipe)
    assert evaluate(model, samples, recipe) == first.metrics
    assert len(first.predictions) == len(first.targets) == 9
    assert first.ids == samples.ids
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_every_task_has_a_deciding_metric_that_is_described() -> None:
    assert all(METRICS[name].task == task for task, name in DECIDES.items())
    assert not METRICS["log_loss"].higher_is_better


def test_a_trained_run_is_scored_and_its_classes_must_agree(tmp_path: Path) -> None:
    samples = toy_samples("classification")
    result = train(toy_recipe(), tmp_path, samples=samples, progress=False)
    assert score_run(tmp_path, samples=samples["val"]).metrics == result.metrics
    folder = tmp_path / "data"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(9):
            from PIL import Image

            Image.new("L", (16, 16), 20 * i).save(folder / name / f"{i}.png")
    with pytest.raises(RecipeError, match="has the classes cat, dog; the run was trained on small, large"):
        evaluate_run(tmp_path, data=f"folder:{folder}")


def test_the_nearest_neighbours_and_the_linear_layer_know_what_is_there() -> None:
    centres = torch.eye(3, 8) * 4
    labels, train_labels = torch.arange(30) % 3, torch.arange(60) % 3
    features, train_features = (centres[y] + torch.randn(len(y), 8) for y in (labels, train_labels))
    assert knn_accuracy(features, labels, train_features, train_labels, k=10) > 0.85
    assert linear_probe(features, labels, train_features, train_labels) > 0.85
    noise, train_noise = torch.randn(30, 8), torch.randn(60, 8)
    assert knn_accuracy(noise, labels, train_noise, train_labels, k=10) < 0.7
    state = torch.get_rng_state()
    first = linear_probe(noise, labels, train_noise, train_labels)
    assert first == linear_probe(noise, labels, train_noise, train_labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_nearest_neighbour_vote_against_a_loop() -> None:
    features, train_features = torch.randn(20, 5), torch.randn(40, 5)
    labels, train_labels = torch.randint(0, 4, (20,)), torch.randint(0, 4, (40,))
    right = 0
    for feature, label in zip(features, labels.tolist(), strict=True):
        cosine = torch.tensor([float(torch.cosine_similarity(feature, other, 0)) for other in train_features])
        votes = [0.0] * 4
        for index in cosine.argsort(descending=True)[:7].tolist():
            votes[int(train_labels[index])] += float(torch.exp(cosine[index] / 0.2))
        right += votes.index(max(votes)) == label
    found = knn_accuracy(features, labels, train_features, train_labels, k=7, temperature=0.2)
    assert found == pytest.approx(right / 20)


def test_features_of_maps_are_means_over_positions() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(represent(nn.Identity(), x), x.mean((2, 3)))
    pyramid = nn.Module()
    pyramid.forward = lambda x: [x, 2 * x]  # type: ignore[method-assign]
    torch.testing.assert_close(represent(pyramid, x), 2 * x.mean((2, 3)))


def test_stuff_of_other_names_is_refused_and_none_is_taken(tmp_path: Path) -> None:
    samples = toy_samples("detection")
    for part in samples.values():
        part.stuff = ("floor",)  # type: ignore[attr-defined]
    train(toy_recipe("detection"), tmp_path, samples=samples, progress=False)
    loaded = open_run(tmp_path)
    assert (loaded.classes, loaded.names) == (("square",), ("square", "floor"))
    other = toy_samples("detection")["val"]
    score_run(tmp_path, samples=other, predictions=False)
    other.stuff = ("wall",)  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="has the classes square, wall; the run was trained on square, floor"):
        score_run(tmp_path, samples=other, predictions=False)


def test_panoptic_maps_are_scored_where_there_are_masks() -> None:
    """A cell found whole, one found as background; the background has lost nothing but gained the second cell."""
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[0, :4, :4], masks[1, 6:, 6:] = 1, 1
    target = {"boxes": torch.tensor([[0.0, 0, 4, 4], [6, 6, 8, 8]]), "labels": torch.tensor([1, 1]), "masks": masks}
    ids = torch.where(masks[0] > 0, 1, 2).to(torch.int32)
    found = Detections(
        target["boxes"][:1],
        torch.tensor([1]),
        torch.tensor([0.9]),
        masks[:1].bool(),
        panoptic=Panoptic(ids, (Segment(1, 1, True, score=0.9), Segment(2, 0, False, area=48))),
    )
    scores = metrics_of("detection", [record_of("detection", found, target, 1)], ("cell",))
    assert scores["pq/cell"] == pytest.approx(1 / 1.5)
    assert scores["pq"] == pytest.approx((1 / 1.5 + 44 / 48) / 2)
    assert (scores["pq_things"], scores["pq_stuff"]) == pytest.approx((1 / 1.5, 44 / 48))
    named = target | {"semantic": torch.where(masks.bool().any(0), 1, 2)}
    known = metrics_of("detection", [record_of("detection", found, named, 1)], ("cell",), ("glass",))
    assert known["pq/glass"] == 0  # its pixels were called background
    assert known["pq_stuff"] == 0
    assert scores["rq"] == pytest.approx((1 / 1.5 + 1) / 2)
    assert scores["sq"] == pytest.approx((1 + 44 / 48) / 2)
