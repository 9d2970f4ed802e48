"""The sample sets hold what they say, and no split sees a pixel of another."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Hashable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchive import transforms
from torchive.data import Loader, check_data, open_data
from torchive.data.samples import SPLITS, SampleSet, assign_splits

FETCHED = ("solar", "trees", "nuclei", "nuclei-instances")


def splits(name: str) -> dict[str, SampleSet]:
    return {split: open_data(name, split) for split in SPLITS}


@given(st.lists(st.text(max_size=6), unique=True, max_size=60), st.integers(0, 3))
def test_a_split_is_a_function_of_the_id_and_of_no_order(ids: list[str], seed: int) -> None:
    strata: list[Hashable] = [len(name) % 2 for name in ids]
    given_order = dict(zip(ids, assign_splits(ids, strata, seed=seed), strict=True))
    backwards = dict(zip(ids[::-1], assign_splits(ids[::-1], strata[::-1], seed=seed), strict=True))
    assert given_order == backwards
    for stratum in set(strata):
        names = [name for name, other in zip(ids, strata, strict=True) if other == stratum]
        if len(names) >= 3:
            assert {given_order[name] for name in names} == set(SPLITS)


def test_data_may_grow_without_moving_a_sample() -> None:
    ids = [f"{number}.png" for number in range(1000)]
    few = assign_splits(ids[:600], [0] * 600)
    many = assign_splits(ids, [0] * 1000)
    assert many[:600] == few
    assert 0.66 < Counter(many)["train"] / 1000 < 0.74
    assert assign_splits(ids, [0] * 1000, seed=1) != many


@pytest.mark.data
def test_solar_cells() -> None:
    parts = splits("solar")
    counts: Counter[int] = Counter()
    for part in parts.values():
        assert (part.task, part.channels, len(part.classes)) == ("classification", 1, 4)
        counts.update(int(label) for label in part.labels)
    assert [counts[label] for label in range(4)] == [1508, 295, 106, 715]
    ids = [set(part.ids) for part in parts.values()]
    assert sum(map(len, ids)) == len(set().union(*ids)) == 2624
    shares = [np.mean(np.asarray(part.labels) == 3) for part in parts.values()]
    assert max(shares) - min(shares) < 0.05
    assert parts["train"][0].image.shape == (1, 300, 300)
    assert "NC" in parts["train"].licence


@pytest.mark.data
def test_trees_share_no_pixel_between_splits() -> None:
    regions: dict[str, list[tuple[str, list[int]]]] = {}
    for split, part in splits("trees").items():
        regions[split] = [(tile["photo"], tile["region"]) for tile in part.tiles]
        for index in range(len(part)):
            sample = part[index]
            height, width = sample.image.shape[1:]
            assert max(height, width) <= 400
            boxes = sample.target["boxes"]
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (sample.target["labels"] == 1).all()
    assert sum(len(part) for part in regions.values()) == 56
    for one, other in combinations(SPLITS, 2):
        for photo, (x0, y0, x1, y1) in regions[one]:
            for name, (u0, v0, u1, v1) in regions[other]:
                assert photo != name or x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0


@pytest.mark.data
def test_all_951_boxes_of_the_trees_are_there() -> None:
    from torchive.data.packages import obtain
    from torchive.data.sets import trees
    from torchive.data.sets.registry import SAMPLE_SETS

    package = obtain(SAMPLE_SETS["trees"].packages[0])
    content = trees.archives.read(package, tuple(f"{trees._DATA}{name}.xml" for name in trees._PHOTOS))
    assert sum(len(trees._boxes(xml)) for xml in content.values()) == 951
    whole = sum(len(part[index].target["boxes"]) for part in splits("trees").values() for index in range(len(part)))
    assert 951 <= whole < 1.15 * 951  # a box that a tile's edge cuts shows in two


@pytest.mark.data
def test_nuclei_in_both_forms() -> None:
    for split, part in splits("nuclei").items():
        objects = open_data("nuclei-instances", split)
        assert part.ids == objects.ids
        for index in range(len(part)):
            classes, target = part[index].target, objects[index].target
            assert torch.equal(target["masks"].sum(0), classes.to(torch.uint8).long())  # disjoint, and all there
            for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    columns = {
        split: {column for top, left in part.places for column in range(left, left + 128)}
        for split, part in splits("nuclei").items()
    }
    assert sum(map(len, columns.values())) == len(set().union(*columns.values())) == 512


@pytest.mark.data
@pytest.mark.parametrize("name", FETCHED)
def test_a_check_finds_no_fault(name: str) -> None:
    report = check_data(name)
    assert report.ok, report.render(3)
    assert report.samples == sum(len(part) for part in splits(name).values())


@pytest.mark.data
@pytest.mark.parametrize("name", FETCHED)
def test_sets_travel_to_other_processes(name: str) -> None:
    part = open_data(name, "val")
    first = part[0]
    copy = pickle.loads(pickle.dumps(part))
    assert len(pickle.dumps(part)) < 2_000_000
    assert torch.equal(copy[0].image, first.image)


@pytest.mark.data
def test_trees_train_in_batches_with_workers() -> None:
    part = open_data("trees", "train")
    transform = transforms.build("detection", image_size=200, train=True, augment=["iou_crop", "flip"])
    loaders = [Loader(part, transform, batch_size=4, seed=0, shuffle=True, workers=workers) for workers in (0, 1)]
    for one, other in zip(loaders[0].epoch(1), loaders[1].epoch(1), strict=True):
        assert one.ids == other.ids
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(one.targets, other.targets, strict=True))


@pytest.mark.data
@pytest.mark.slow
def test_scenes_are_exact_and_share_no_picture() -> None:
    parts = splits("scenes")
    used: dict[str, set[str]] = {}
    for split, part in parts.items():
        used[split] = {entry["id"] for entry in (*part.cutouts, *part.photos)}
        families = {(entry["class"], entry["family"]) for entry in part.cutouts}
        used[split] |= {json.dumps(family) for family in families}
        for index in range(25):
            sample, shares = part[index], part.alpha(index)
            masks, boxes = sample.target["masks"], sample.target["boxes"].int().tolist()
            assert sample.image.shape == (3, 320, 320)
            assert 1 <= len(masks) <= 6
            assert masks.sum(0).max() <= 1
            assert torch.equal(masks.bool(), shares > 0.5)
            assert shares.sum(0).max() <= 1 + 1e-5
            for box, mask in zip(boxes, masks, strict=True):
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        again = open_data("scenes", split)
        assert torch.equal(again[3].image, part[3].image)
    for one, other in combinations(SPLITS, 2):
        assert not used[one] & used[other]
    labels = parts["val"].object_labels
    assert len(labels) == 200
    assert all(labels[i] == parts["val"][i].target["labels"].tolist() for i in range(10))
    rare = parts["val"].with_shares([1, 0, 0, 0, 0, 0, 0.05])
    counts = np.bincount([label for found in rare.object_labels for label in found], minlength=8)
    assert counts[2:7].tolist() == [0] * 5
    assert 0 < counts[7] < 0.1 * counts[1]
    assert all(rare.object_labels[i] == rare[i].target["labels"].tolist() for i in range(10))


@pytest.mark.data
@pytest.mark.slow
def test_clothes() -> None:
    parts = splits("fashion-mnist")
    assert sum(map(len, parts.values())) == 70_000
    assert len(parts["test"]) == 10_000
    labels = np.concatenate([np.asarray(part.labels) for part in parts.values()])
    assert np.bincount(labels).tolist() == [7000] * 10
    assert parts["test"][0].image.shape == (1, 28, 28)
