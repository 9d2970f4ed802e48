"""Merging and panoptic quality: torchmetrics' figures, hand-worked cases, and laws on random maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.detection import panoptic_quality as their_quality

from torchive.ops.panoptic import merge, panoptic_quality, quality_counts, true_panoptic
from torchive.structures import Detections, Panoptic, Segment


def random_map(size: tuple[int, int], cells: int, *, void: bool, seed: int) -> Panoptic:
    """Nearest-centre regions; categories 1 and 2 are things, 3 and 4 stuff of one segment each."""
    g = torch.Generator().manual_seed(seed)
    place = torch.rand(cells, 2, generator=g) * torch.tensor(size)
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    nearest = ((y[..., None] - place[:, 0]) ** 2 + (x[..., None] - place[:, 1]) ** 2).argmin(-1)
    category = torch.randint(1, 5, (cells,), generator=g)
    if void:
        category[torch.rand(cells, generator=g) < 0.25] = 0
    ids = torch.zeros(size, dtype=torch.int32)
    segments: list[Segment] = []
    for cell in range(cells):
        kind = int(category[cell])
        if kind == 0:
            continue
        known = next((s.id for s in segments if kind > 2 and s.category == kind), 0)
        if not known:
            known = 7 + 3 * len(segments)  # ids need not be in a row
            segments.append(Segment(known, kind, kind < 3))
        ids[nearest == cell] = known
    return Panoptic(ids, tuple(segments))


def coloured(panoptic: Panoptic) -> Tensor:
    """(H, W, 2): category and instance of each pixel, as torchmetrics wants it; category 0 is void."""
    category = torch.zeros(int(panoptic.ids.max()) + 1, dtype=torch.int64)
    for segment in panoptic.segments:
        category[segment.id] = segment.category
    kind = category[panoptic.ids.long()]
    return torch.stack([kind, torch.where(kind > 2, 0, panoptic.ids)], -1)


@pytest.mark.parametrize("void", [False, True])
def test_quality_is_torchmetrics(void: bool) -> None:
    """On pairs of maps that share half of their structure; void in the truth, none in what was found."""
    counts = torch.zeros(255, 4, dtype=torch.double)
    mine, theirs = [], []
    for seed in range(12):
        found = random_map((40, 56), 14, void=False, seed=seed)
        truth = random_map((40, 56), 14, void=void, seed=seed if seed % 3 else 50 + seed)
        counts += quality_counts(found, truth)
        mine.append(coloured(found))
        theirs.append(coloured(truth))
    expected = their_quality(
        torch.stack(mine), torch.stack(theirs), {1, 2}, {3, 4}, return_sq_and_rq=True, return_per_class=True
    )
    quality = panoptic_quality(counts)[1:5]
    gap = (quality - expected.double()).abs().max().item()
    assert quality.min() > 0.1
    assert quality[:, 0].max() < 1
    assert gap < 1e-6
    torch.testing.assert_close(quality[:, 0], quality[:, 1] * quality[:, 2])


def slow_quality(found: Panoptic, truth: Panoptic) -> dict[int, list[float]]:
    """Overlap, hits, false and missed of each category, from sets of pixels."""
    size = range(found.ids.shape[0]), range(found.ids.shape[1])

    def pixels(panoptic: Panoptic) -> list[tuple[Segment, set]]:
        held = [
            (s, {(i, j) for i in size[0] for j in size[1] if panoptic.ids[i, j] == s.id}) for s in panoptic.segments
        ]
        return [(s, where) for s, where in held if where]

    mine, theirs = pixels(found), pixels(truth)
    void = {(i, j) for i in size[0] for j in size[1]} - {p for _, where in theirs for p in where}
    counts: dict[int, list[float]] = {}
    matched = set()
    for segment, where in mine:
        row = counts.setdefault(segment.category, [0.0, 0, 0, 0])
        hit = False
        for other, there in theirs:
            if other.category == segment.category and not other.crowd:
                overlap = len(where & there) / len((where | there) - (where & void))
                if overlap > 0.5:
                    row[0], row[1], hit = row[0] + overlap, row[1] + 1, True
                    matched.add(other.id)
        excused = void.union(*(t for o, t in theirs if o.crowd and o.category == segment.category))
        if not hit and len(where & excused) <= 0.5 * len(where):
            row[2] += 1
    for other, _ in theirs:
        if other.id not in matched and not other.crowd:
            counts.setdefault(other.category, [0.0, 0, 0, 0])[3] += 1
    return counts


def test_quality_equals_slow_form(record) -> None:
    """With void on both sides and crowds; panoptic quality of the sums."""
    total, slow = torch.zeros(255, 4, dtype=torch.double), torch.zeros(255, 4, dtype=torch.double)
    for seed in range(6):
        found = random_map((24, 30), 12, void=True, seed=seed)
        truth = random_map((24, 30), 12, void=seed % 2 == 0, seed=seed)
        segments = tuple(replace(s, crowd=s.isthing and k % 4 == 1) for k, s in enumerate(truth.segments))
        truth = Panoptic(truth.ids.roll(3, seed % 2), segments)
        total += quality_counts(found, truth)
        for category, row in slow_quality(found, truth).items():
            slow[category] += torch.tensor(row, dtype=torch.double)
    assert slow.sum(0).min() > 2
    gap = (total - slow).abs().max().item()
    assert gap < 1e-12
    pq = slow[:, 0] / (slow[:, 1] + slow[:, 2] / 2 + slow[:, 3] / 2)
    assert torch.allclose(panoptic_quality(total)[:, 0], pq, equal_nan=True)
    record("panoptic_fpn", "referenced", largest_difference=gap, dtype="float64", what="panoptic quality's sums")


def halves() -> tuple[Panoptic, Panoptic]:
    """A true thing of 8 x 10 on background, found as two: 8 x 6 and 8 x 4."""
    ids = torch.zeros(12, 20, dtype=torch.int32)
    ids[2:10, 5:15] = 1
    truth = torch.where(ids == 0, 2, ids).to(torch.int32)
    found = truth.clone()
    found[2:10, 11:15] = 3
    things = (Segment(1, 1, True), Segment(2, 0, False))
    return Panoptic(found, (*things, Segment(3, 1, True))), Panoptic(truth, things)


def test_quality_by_hand() -> None:
    found, truth = halves()
    perfect = panoptic_quality(quality_counts(truth, truth))
    assert perfect[:2].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert perfect[2:].isnan().all()
    counts = quality_counts(found, truth)
    assert counts[0].tolist() == [1, 1, 0, 0]
    assert counts[1].tolist() == [0.6, 1, 1, 0]  # the larger half is a hit of 48 / 80, the other is false
    assert panoptic_quality(counts)[1].tolist() == pytest.approx([0.6 / 1.5, 0.6, 1 / 1.5])
    void = Panoptic(torch.zeros(12, 20, dtype=torch.int32), ())
    assert quality_counts(found, void).sum() == 0  # all of it lies in void
    assert quality_counts(void, truth)[:2].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    with pytest.raises(ValueError, match=r"one size, got \(12, 20\) and \(3, 3\)"):
        quality_counts(found, Panoptic(torch.zeros(3, 3), ()))


def test_crowds_excuse_and_are_not_missed() -> None:
    found, truth = halves()
    crowd = Panoptic(truth.ids, (Segment(1, 1, True, crowd=True), Segment(2, 0, False)))
    counts = quality_counts(found, crowd)
    assert counts[1].sum() == 0
    other = Panoptic(truth.ids, (Segment(1, 2, True, crowd=True), Segment(2, 0, False)))
    assert quality_counts(found, other)[1].tolist() == [0, 0, 2, 0]  # a crowd of another category excuses nothing


def test_no_segment_matches_twice() -> None:
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        maps = []
        for _ in range(2):
            ids = torch.randint(1, 5, (6, 6), generator=g, dtype=torch.int32)
            ids[:, :4] = maps[0].ids[:, :4] if maps else ids[:, :4]
            maps.append(Panoptic(ids, tuple(Segment(k, 1, True) for k in range(1, 5))))
        counts = quality_counts(*maps)[1]
        assert counts[1] <= 4
        assert counts[1] + counts[2] == len(maps[0].ids.unique())
        assert counts[1] + counts[3] == len(maps[1].ids.unique())


def instances(size: int, count: int, seed: int) -> Detections:
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    c, r = torch.rand(count, 2, generator=g) * size, 4 + torch.rand(count, generator=g) * 14
    masks = (x - c[:, :1, None]) ** 2 + (y - c[:, 1:, None]) ** 2 < r[:, None, None] ** 2
    masks[3] = False
    scores = torch.rand(count, generator=g)
    return Detections(torch.zeros(count, 4), torch.randint(1, 4, (count,), generator=g), scores, masks)


def slow_merge(found: Detections, classes: Tensor, area: int) -> tuple[list[list[int]], list[tuple]]:
    """The three rules pixel by pixel."""
    size = len(classes)
    ids = [[0] * size for _ in range(size)]
    records: list[tuple] = []
    for k in sorted(range(len(found)), key=lambda n: -float(found.scores[n])):
        if found.scores[k] < 0.5:
            continue
        inside = [(i, j) for i in range(size) for j in range(size) if found.masks[k, i, j]]
        if not inside or sum(ids[i][j] > 0 for i, j in inside) > 0.5 * len(inside):
            continue
        records.append((int(found.labels[k]), True))
        for i, j in inside:
            ids[i][j] = ids[i][j] or len(records)
    for kind in sorted(set(classes.flatten().tolist()) - {255}):
        free = [(i, j) for i in range(size) for j in range(size) if ids[i][j] == 0 and classes[i, j] == kind]
        if len(free) >= area:
            records.append((kind, False))
            for i, j in free:
                ids[i][j] = len(records)
    return ids, records


@pytest.mark.parametrize("seed", range(4))
def test_merging_equals_slow_form(seed: int) -> None:
    found = instances(48, 14, seed)
    classes = random_map((48, 48), 9, void=True, seed=seed).ids.long()
    classes = torch.where(classes == 0, 255, classes + 4)
    merged = merge(found, classes, stuff_area=90)
    ids, records = slow_merge(found, classes, 90)
    assert merged.ids.dtype == torch.int32
    assert merged.ids.tolist() == ids
    assert [(s.category, s.isthing) for s in merged.segments] == records
    assert [s.id for s in merged.segments] == list(range(1, len(records) + 1))
    scores = [s.score for s in merged.segments if s.isthing]
    assert scores == sorted(scores, reverse=True)
    assert all(s.area == (merged.ids == s.id).sum() for s in merged.segments if not s.isthing)
    # once more, from its own segments: nothing moves
    things = [s for s in merged.segments if s.isthing]
    again = Detections(
        torch.zeros(len(things), 4),
        torch.tensor([s.category for s in things]),
        torch.tensor(scores),
        torch.stack([merged.ids == s.id for s in things]),
    )
    stuff = torch.full_like(classes, 255)
    for s in merged.segments:
        if not s.isthing:
            stuff[merged.ids == s.id] = s.category
    assert torch.equal(merge(again, stuff, stuff_area=90).ids, merged.ids)


def test_merging_nothing() -> None:
    empty = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, 8, 8) > 0)
    classes = torch.full((8, 8), 5)
    assert merge(empty, classes).segments == ()  # 64 pixels are too few
    assert merge(empty, classes, stuff_area=64).segments == (Segment(1, 5, False, area=64),)
    with pytest.raises(ValueError, match="expected detections with masks, got none"):
        merge(Detections(empty.boxes, empty.labels, empty.scores), classes)


def test_true_map_of_a_target() -> None:
    masks = torch.zeros(3, 4, 6, dtype=torch.uint8)
    masks[0, :2], masks[1, 1:3, :3], masks[2, 1, 1] = 1, 1, 1
    semantic = torch.zeros(4, 6, dtype=torch.int64)
    semantic[:3] = 2  # a thing where no mask is: void
    semantic[3, 3:], semantic[3, 5] = 4, 255
    target = {"masks": masks, "labels": torch.tensor([2, 1, 2]), "iscrowd": torch.tensor([0, 1, 0])}
    plain = true_panoptic(target, 2, (4, 6))
    assert plain.ids.tolist() == [[1] * 6, [2, 3, 2, 1, 1, 1], [2, 2, 2, 4, 4, 4], [4] * 6]
    assert [(s.category, s.crowd) for s in plain.segments] == [(2, False), (1, True), (2, False), (0, False)]
    whole = true_panoptic({**target, "semantic": semantic}, 2, (4, 6))
    assert whole.ids.tolist() == [[1] * 6, [2, 3, 2, 1, 1, 1], [2, 2, 2, 0, 0, 0], [4, 4, 4, 5, 5, 0]]
    assert [s.category for s in whole.segments] == [2, 1, 2, 0, 4]
    assert [s.area for s in whole.segments] == [9, 5, 1, 3, 2]
    none = {"masks": masks[:0], "labels": torch.zeros(0, dtype=torch.int64)}
    assert [s.category for s in true_panoptic(none, 2, (4, 6)).segments] == [0]
