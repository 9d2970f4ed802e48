"""Retrieval after detection: a fixture by hand, and the threshold from both sides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchive.nn.retrieval import retrieval, retrieved_items
from torchive.structures import Detections


def detected(boxes: list[list[float]], labels: list[int], scores: list[float]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels), torch.tensor(scores))


def items(boxes: list[list[float]], labels: list[int], pair: int, styles: list[int], **more: list[int]) -> dict:
    return {
        "boxes": torch.tensor(boxes),
        "labels": torch.tensor(labels),
        "pair_id": torch.full((len(labels),), pair),
        "style": torch.tensor(styles),
        **{key: torch.tensor(value) for key, value in more.items()},
    }


QUERY = [[0.0, 0, 100, 100], [200.0, 0, 300, 100], [0.0, 200, 100, 300]]
SHOP = [[0.0, 0, 100, 100], [200.0, 0, 300, 100]]


def two_images() -> dict:
    """A user's image of three items, of which the third pairs with nothing (style 0), and a shop's image of two."""
    return {
        "found": [detected([[0, 0, 100, 98], [5, 0, 100, 100], [203, 0, 300, 100]], [1, 1, 2], [0.9, 0.95, 0.8])],
        "targets": [items(QUERY, [1, 2, 1], 7, [1, 2, 0], scale=[1, 3, 2])],
        "returned": [torch.tensor([[1, 0], [0, 1], [1, 0]])],
        "gallery": [detected([[0, 0, 100, 100], [200, 0, 300, 100]], [1, 2], [0.9, 0.9])],
        "gallery_targets": [items(SHOP, [1, 2], 7, [1, 2])],
    }


def test_two_images_by_hand() -> None:
    case = two_images()
    result = retrieved_items(**case)
    assert result.rank.tolist() == [0, 0]  # the first query is asked by the detection of 0.95; style 0 is no query
    assert result.row.tolist() == [0, 1]
    assert result.missed.tolist() == [False, False]
    case["found"] = [detected(case["found"][0].boxes.tolist(), [1, 1, 2], [0.97, 0.95, 0.8])]
    assert retrieved_items(**case).rank.tolist() == [1, 0]
    parts = {"scale": ("small", "moderate", "large")}
    figures = retrieval(**case, ks=(1, 2), parts=parts)
    assert figures == {
        "top_1": 0.5,
        "top_2": 1.0,
        "missed": 0.0,
        "queries": 2.0,
        "top_1/scale/small": 0.0,
        "top_2/scale/small": 1.0,
        "top_1/scale/large": 1.0,
        "top_2/scale/large": 1.0,
    }


def test_another_pair_or_style_is_another_item() -> None:
    case = two_images()
    case["gallery_targets"] = [items(SHOP, [1, 2], 7, [2, 1])]
    assert retrieved_items(**case).rank.tolist() == [1, 1]
    case["gallery_targets"] = [items(SHOP, [1, 2], 8, [1, 2])]
    with pytest.raises(ValueError, match="expected items with a style above 0 that the gallery shows, got none"):
        retrieval(**case)


def test_a_missed_query_counts_as_wrong() -> None:
    case = two_images()
    case["found"] = [detected([[0, 0, 100, 98], [5, 0, 100, 100], [203, 0, 300, 100]], [1, 1, 1], [0.9, 0.95, 0.8])]
    result = retrieved_items(**case)  # the third has the wrong class
    assert result.missed.tolist() == [False, True]
    assert result.top(2) == 0.5
    assert retrieved_items(**case, same_class=False).missed.tolist() == [False, False]
    case["found"], case["returned"] = [detected([], [], [])], [torch.zeros(0, 2, dtype=torch.int64)]
    assert retrieved_items(**case).missed.tolist() == [True, True]
    assert retrieval(**case)["top_20"] == 0


@pytest.mark.parametrize(("width", "right"), [(49.0, False), (50.0, True), (51.0, True)])
def test_overlap_at_the_threshold(width: float, right: bool) -> None:
    """Boxes inside the true one whose overlap is 0.49, 0.50 and 0.51."""
    case = two_images()
    case["gallery"] = [detected([[0, 0, width, 100], [200, 0, 300, 100]], [1, 2], [0.9, 0.9])]
    assert (retrieved_items(**case).rank[0].item() >= 0) is right


def test_several_images_of_the_gallery_count_through() -> None:
    case = two_images()
    empty = items([[0.0, 0, 9, 9]], [1], 3, [1])
    case["gallery"] = [detected([], [], []), *case["gallery"], detected([[0, 0, 9, 9]], [1], [0.5])]
    case["gallery_targets"] = [empty, *case["gallery_targets"], empty]
    assert retrieved_items(**case).rank.tolist() == [0, 0]
    case["returned"] = [torch.tensor([[2, 1], [2, 1], [0, 2]])]
    assert retrieved_items(**case).rank.tolist() == [-1, -1]


def test_refused() -> None:
    case = two_images()
    with pytest.raises(ValueError, match="image 0: expected results of 3 detections, got 2"):
        retrieved_items(**{**case, "returned": [torch.zeros(2, 2, dtype=torch.int64)]})
    with pytest.raises(ValueError, match="as many images, got 1, 1 and 0"):
        retrieved_items(**{**case, "returned": []})


def by_hand(case: dict, k: int) -> float:
    """The protocol as explicit loops."""

    def iou(a: Tensor, b: Tensor) -> float:
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        inter = float(max(w, 0) * max(h, 0))
        return inter / (float((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])) - inter)

    flat = [(n, box) for n, one in enumerate(case["gallery"]) for box in one.boxes]
    right = total = 0
    for one, target, answers in zip(case["found"], case["targets"], case["returned"], strict=True):
        for q in range(len(target["labels"])):
            key = int(target["pair_id"][q]), int(target["style"][q])
            shown = [
                (n, t["boxes"][j])
                for n, t in enumerate(case["gallery_targets"])
                for j in range(len(t["style"]))
                if (int(t["pair_id"][j]), int(t["style"][j])) == key
            ]
            if key[1] == 0 or not shown:
                continue
            total += 1
            best, asked = -1.0, None
            for d in range(len(one)):
                over = [iou(one.boxes[d], box) for box in target["boxes"]]
                if over.index(max(over)) == q and one.labels[d] == target["labels"][q] and one.scores[d] > best:
                    best, asked = float(one.scores[d]), d
            if asked is not None:
                chosen = [flat[int(row)] for row in answers[asked][:k]]
                right += any(n == m and iou(a, b) >= 0.5 for n, a in chosen for m, b in shown)
    return right / total


def test_equals_explicit_loops() -> None:
    g = torch.Generator().manual_seed(0)

    def boxes(count: int) -> Tensor:
        corner = torch.rand(count, 2, generator=g, dtype=torch.float64) * 60
        return torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=g, dtype=torch.float64) * 40], 1)

    def truths(count: int) -> list[dict]:
        return [
            {
                "boxes": boxes(3),
                "labels": torch.randint(1, 3, (3,), generator=g),
                "pair_id": torch.randint(0, 3, (1,), generator=g).expand(3),
                "style": torch.randint(0, 3, (3,), generator=g),
            }
            for _ in range(count)
        ]

    targets, gallery_targets = truths(8), truths(6)
    found, gallery = [], []
    for listed, truth in ((found, targets), (gallery, gallery_targets)):
        for target in truth:
            near = target["boxes"] + torch.randn(3, 4, generator=g) * 6
            label = torch.randint(1, 3, (5,), generator=g)
            listed.append(Detections(torch.cat([near, boxes(2)]), label, torch.rand(5, generator=g)))
    returned = [torch.stack([torch.randperm(30, generator=g)[:9] for _ in range(5)]) for _ in range(8)]
    case = {"found": found, "targets": targets, "returned": returned}
    case |= {"gallery": gallery, "gallery_targets": gallery_targets}
    figures = retrieval(**case, ks=(1, 3, 9))
    expected = [by_hand(case, k) for k in (1, 3, 9)]
    assert [figures[f"top_{k}"] for k in (1, 3, 9)] == expected
    assert 0 < expected[1] < expected[2] < 1
