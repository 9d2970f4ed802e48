"""Is the item of a photograph found among those of other photographs? Retrieval after detection, top k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from torchive.structures import Detections

Targets = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Retrieved:
    """What became of each of Q queries.

    ``rank`` (Q,): place of the first right item among those returned, from 0; -1 where none is right. ``missed`` (Q,)
    bool: no detection stood for it. ``image`` and ``row`` (Q,): where it stands among the targets.
    """

    rank: Tensor
    missed: Tensor
    image: Tensor
    row: Tensor

    def top(self, k: int, rows: Tensor | None = None) -> float:
        """The share of all queries, or of some of them, that have a right item among the first k."""
        rank = self.rank if rows is None else self.rank[rows]
        return float(((rank >= 0) & (rank < k)).double().mean()) if len(rank) else -1.0


def retrieved_items(
    found: Sequence[Detections],
    targets: Targets,
    returned: Sequence[Tensor],
    gallery: Sequence[Detections],
    gallery_targets: Targets,
    *,
    iou_threshold: float = 0.5,
    same_class: bool = True,
) -> Retrieved:
    """Score what a search returned for the detections of query images: DeepFashion2's protocol.

    Queries are the true items with a ``style`` above 0 that the gallery shows. Each detection stands for the true item
    of its image that it overlaps most, the first of equals and however little; of those that stand for a query the one
    with the highest score is asked, of the query's class only. A returned box is right where a true gallery item of the
    query's ``pair_id`` and ``style`` in its image overlaps it enough.

    Args:
        found: detections of each query image.
        targets: of each query image, ``boxes``, ``labels``, ``pair_id`` and ``style`` (L,).
        returned: of each query image (D, k), for each detection the numbers of gallery detections, best first,
            counted over all gallery images one after the other.
        gallery: detections of each gallery image.
        gallery_targets: of each gallery image, ``boxes``, ``pair_id`` and ``style`` (L,).
        iou_threshold: overlap from which a box counts as an item's.
        same_class: only detections of the query's class may stand for it; False asks the best one of any class.

    Raises:
        ValueError: lists that do not fit each other.
    """
    if not len(found) == len(targets) == len(returned) or len(gallery) != len(gallery_targets):
        raise ValueError(
            f"expected detections, targets and results of as many images, got {len(found)}, {len(targets)} and "
            f"{len(returned)}; of the gallery {len(gallery)} and {len(gallery_targets)}"
        )
    items, right = _identities(gallery, gallery_targets, iou_threshold)
    ranks, missed, images, rows = [], [], [], []
    for k, (one, target, answers) in enumerate(zip(found, targets, returned, strict=True)):
        if len(answers) != len(one):
            raise ValueError(f"image {k}: expected results of {len(one)} detections, got {len(answers)}")
        keys = item_keys(target)
        asked = torch.tensor([key in items for key in keys], dtype=torch.bool)
        query = torch.nonzero(asked & (target["style"].cpu() > 0))[:, 0]
        chosen = _standing(one, target, query, same_class)  # (q,), -1 for none
        rank = torch.full_like(query, -1)
        there = torch.nonzero(chosen >= 0)[:, 0]
        if len(there) and answers.shape[1]:
            identity = torch.tensor([items[keys[int(q)]] for q in query[there]])
            wanted = answers.cpu()[chosen[there]] * len(items) + identity[:, None]  # (q, k)
            hit = torch.isin(wanted, right)
            rank[there] = torch.where(hit.any(1), hit.to(torch.uint8).argmax(1), -1)
        ranks.append(rank)
        missed.append(chosen < 0)
        images.append(torch.full_like(query, k))
        rows.append(query)
    empty = torch.zeros(0, dtype=torch.int64)
    return Retrieved(
        torch.cat([empty, *ranks]),
        torch.cat([empty.bool(), *missed]),
        *(torch.cat([empty, *p]) for p in (images, rows)),
    )


def retrieval(
    found: Sequence[Detections],
    targets: Targets,
    returned: Sequence[Tensor],
    gallery: Sequence[Detections],
    gallery_targets: Targets,
    *,
    ks: Sequence[int] = (1, 5, 10, 15, 20),
    parts: Mapping[str, Sequence[str]] | None = None,
    iou_threshold: float = 0.5,
    same_class: bool = True,
) -> dict[str, float]:
    """``top_K`` for each of ``ks``, ``missed``, the share of queries that no detection stood for, and ``queries``.

    With ``parts``, as ``nn.landmark_precision.PARTS``, also ``top_K/KEY/NAME`` over the queries whose target has that
    value. The other arguments are those of ``retrieved_items``.

    Raises:
        ValueError: lists that do not fit, or no query.
    """
    result = retrieved_items(
        found, targets, returned, gallery, gallery_targets, iou_threshold=iou_threshold, same_class=same_class
    )
    if not len(result.rank):
        raise ValueError("expected items with a style above 0 that the gallery shows, got none")
    figures = {f"top_{k}": result.top(k) for k in ks}
    figures |= {"missed": float(result.missed.double().mean()), "queries": float(len(result.rank))}
    for key, names in (parts or {}).items():
        each = zip(result.image.tolist(), result.row.tolist(), strict=True)
        value = torch.tensor([int(targets[image][key][row]) for image, row in each])
        for number, name in enumerate(names, 1):
            chosen = torch.nonzero(value == number)[:, 0]
            if len(chosen):
                figures |= {f"top_{k}/{key}/{name}": result.top(k, chosen) for k in ks}
    return figures


def item_keys(target: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Pair and style of each item, by which it is known in other images; a style of 0 is nothing's."""
    return list(zip(target["pair_id"].tolist(), target["style"].tolist(), strict=True))


def _standing(one: Detections, target: dict[str, Tensor], query: Tensor, same_class: bool) -> Tensor:
    """The detection (q,) that stands for each of the true items ``query`` (q,), -1 for none."""
    if not len(one) or not len(query):
        return torch.full_like(query, -1)
    boxes, labels, scores = one.boxes.cpu().double(), one.labels.cpu(), one.scores.cpu().double()
    owner = box_iou(boxes, target["boxes"].cpu().double()).argmax(1)  # (D,)
    able = owner == query[:, None]
    if same_class:
        able &= labels == target["labels"].cpu()[query][:, None]
    best = torch.where(able, scores, -torch.inf).argmax(1)
    return torch.where(able.any(1), best, -1)


def _identities(
    gallery: Sequence[Detections], targets: Targets, threshold: float
) -> tuple[dict[tuple[int, int], int], Tensor]:
    """A number for each item of the gallery, and ``detection * items + number`` of the detections that show one."""
    items: dict[tuple[int, int], int] = {}
    pairs, start = [torch.zeros(0, 2, dtype=torch.int64)], 0
    for one, target in zip(gallery, targets, strict=True):
        numbers = torch.tensor([items.setdefault(key, len(items)) for key in item_keys(target)], dtype=torch.int64)
        if len(one) and len(numbers):
            iou = box_iou(one.boxes.cpu().double(), target["boxes"].cpu().double())
            row, column = torch.nonzero(iou >= threshold, as_tuple=True)
            pairs.append(torch.stack([row + start, numbers[column]], 1))
        start += len(one)
    shown = torch.cat(pairs)
    return items, shown[:, 0] * max(len(items), 1) + shown[:, 1]
