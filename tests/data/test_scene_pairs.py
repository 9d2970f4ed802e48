"""Cut-outs in two domains: every item of a scene has its shop's image, and splits share none."""

from __future__ import annotations

import pytest
import torch

from torchive.data import DataError, open_data
from torchive.data.samples import SPLITS
from torchive.engine.selection import pair_ids_of


@pytest.mark.data
def test_every_item_is_shown_in_both_domains() -> None:
    names: set[str] = set()
    for split in SPLITS:
        samples = open_data("scene-pairs", split)
        items = {cutout["id"] for cutout in samples.cutouts}
        assert not names & items
        names |= items
        count = len(samples)
        chosen = range(0, count, 7) if split != "test" else range(count)
        shown: dict[int, set[int]] = {0: set(), 1: set()}
        for k in chosen:
            target = samples[k].target
            assert target["masks"].flatten(1).any(1).all()
            source = int(target["source"][0])
            assert (samples.ids[k].split("/")[1] == "user") == bool(source)
            assert (len(target["labels"]) == 1) or source
            shown[source] |= set(target["pair_id"].tolist())
            assert target["labels"].tolist() == samples.object_labels[k]
        if split == "test":
            assert shown[1] <= shown[0] == set(range(len(items)))
    again = open_data("scene-pairs", "test")
    assert torch.equal(again[3].image, samples[3].image)


@pytest.mark.data
def test_scene_and_shop_follow_each_other_in_training() -> None:
    samples = open_data("scene-pairs", "train")
    pairs = pair_ids_of(samples)
    assert pairs[:6] == [0, 0, 1, 1, 2, 2]
    scene, shop = samples[0].target, samples[1].target
    assert (int(scene["source"][0]), int(shop["source"][0])) == (1, 0)
    assert scene["pair_id"][0] == shop["pair_id"][0]
    with pytest.raises(DataError, match="classes cannot be drawn with shares"):
        samples.with_shares([1.0] * 7)
