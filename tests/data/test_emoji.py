"""The emoji: classes by name, six skin tones each, and no drawing style in two of training and test."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest
import torch

from torchive.data import archives, check_data, open_data
from torchive.data.packages import obtain
from torchive.data.samples import SPLITS
from torchive.data.sets.registry import SAMPLE_SETS

INFO = SAMPLE_SETS["emoji"]
GROUPS = {"person", "person-fantasy", "person-gesture", "person-role"}


@pytest.mark.data
def test_one_style_trains_and_the_other_tests() -> None:
    parts = {split: open_data("emoji", split) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 990, "val": 330, "test": 660}
    ids = [name for part in parts.values() for name in part.ids]
    assert len(set(ids)) == 1980
    assert {name.partition("/")[0] for name in parts["train"].ids} == {"twitter"}
    assert {name.partition("/")[0] for split in ("val", "test") for name in parts[split].ids} == {"google"}
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        assert set(Counter(parts[split].labels.tolist()).values()) == {count}
    named = {split: dict(zip(part.ids, part.labels.tolist(), strict=True)) for split, part in parts.items()}
    for split in ("val", "test"):  # a code point is one class in both styles
        for name, label in named[split].items():
            assert named["train"][name.replace("google", "twitter")] == label


@pytest.mark.data
def test_classes_are_those_of_the_package() -> None:
    entries = json.loads(archives.read(obtain(INFO.packages[1]), ("package/emoji.json",))["package/emoji.json"])
    taken = [e for e in entries if e["subcategory"] in GROUPS and len(e.get("skin_variations", {})) == 5]
    assert {entry["short_name"] for entry in taken} == set(INFO.classes)
    assert len(taken) == len(INFO.classes) == 165
    label = INFO.classes.index("astronaut")
    part = open_data("emoji", "train")
    assert "twitter/1f9d1-200d-1f680" in {name for name, k in zip(part.ids, part.labels, strict=True) if k == label}


@pytest.mark.data
def test_activities_are_others_than_the_roles() -> None:
    """No drawing and no class is in both sets; mirrored classes, which a flip would mix up, are left out."""
    info = SAMPLE_SETS["emoji-activities"]
    entries = json.loads(archives.read(obtain(info.packages[1]), ("package/emoji.json",))["package/emoji.json"])
    groups = {"person-activity", "person-sport", "person-resting"}
    taken = [e for e in entries if e["subcategory"] in groups and len(e.get("skin_variations", {})) == 5]
    assert {e["short_name"] for e in taken if not e["short_name"].endswith("_facing_right")} == set(info.classes)
    assert not set(info.classes) & set(INFO.classes)
    parts = {split: open_data("emoji-activities", split) for split in SPLITS}
    count = len(info.classes)
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 6 * count,
        "val": 2 * count,
        "test": 4 * count,
    }
    assert {name.partition("/")[0] for name in parts["train"].ids} == {"twitter"}
    assert {name.partition("/")[0] for split in ("val", "test") for name in parts[split].ids} == {"google"}
    others = {name for split in SPLITS for name in open_data("emoji", split).ids}
    assert not others & {name for part in parts.values() for name in part.ids}
    assert set(Counter(parts["test"].labels.tolist()).values()) == {4}


@pytest.mark.data
def test_drawings_are_on_white_and_licensed() -> None:
    part = open_data("emoji", "test")
    image = part[0].image
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.uint8
    assert torch.equal(image[:, 0, 0], torch.full((3,), 255, dtype=torch.uint8))
    assert image.float().std() > 20
    assert "CC-BY-4.0" in part.licence
    assert "Apache-2.0" in part.licence
    copy = pickle.loads(pickle.dumps(part))
    assert torch.equal(copy[5].image, part[5].image)
    assert check_data("emoji").ok
