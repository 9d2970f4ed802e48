"""Why detections are wrong, and which objects are missed: shares that a comparison can pair over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

CAUSES = ("class", "place", "duplicate", "background")
#: COCO's sizes: the area in pixels up to which an object has the size.
SIZES = {"small": 32.0**2, "medium": 96.0**2, "large": float("inf")}
Record = tuple[dict[str, Tensor], dict[str, Tensor]]


def detection_errors(records: Sequence[Record], *, overlap: float = 0.5, touch: float = 0.1) -> dict[str, float]:
    """``false/CAUSE``, shares of the detections looked at, and ``missed/SIZE``, shares of the objects of that size.

    Looked at are the N best scored detections of all images, N being the number of objects, so that no threshold is
    chosen. In the order of their scores each takes the object of its class that it overlaps most, from ``overlap`` on.
    What takes none is false: a ``duplicate`` where such an object was taken before; else by what it overlaps most:
    ``place``, an object of its class; ``class``, one of another; ``background``, nothing by more than ``touch``
    (Hoiem et al., "Diagnosing Error in Object Detectors", ECCV 2012). Objects that nothing took are missed. A
    detection whose best overlap is a crowd's is not counted.

    Args:
        records: of each image, predictions (``boxes``, ``scores``, ``labels``) and target (``boxes``, ``labels``,
            perhaps ``iscrowd`` and ``area``).
        overlap, touch: overlaps (IoU) of a right place and of a wrong one.
    """
    real = [target["iscrowd"] == 0 if "iscrowd" in target else target["labels"] >= 0 for _, target in records]
    total = sum(int(mask.sum()) for mask in real)
    false, seen = dict.fromkeys(CAUSES, 0), 0
    missed, sizes = dict.fromkeys(SIZES, 0), dict.fromkeys(SIZES, 0)
    for (found, target), objects, least in zip(records, real, _least(records, total), strict=True):
        taken, causes = _matched(found, target, objects, least, overlap, touch)
        for cause in causes:
            seen += 1
            if cause:
                false[cause] += 1
        box = target["boxes"].double()
        area = target["area"] if "area" in target else (box[:, 2:] - box[:, :2]).prod(1)
        edges = torch.tensor(list(SIZES.values()), dtype=torch.double)
        size = torch.searchsorted(edges, area.double(), right=False)
        for k, name in enumerate(SIZES):
            sizes[name] += int((objects & (size == k)).sum())
            missed[name] += int((objects & (size == k) & ~taken).sum())
    result = {f"false/{cause}": count / max(seen, 1) for cause, count in false.items()}
    return result | {f"missed/{name}": missed[name] / count for name, count in sizes.items() if count}


def score_overlap(records: Sequence[Record], *, overlap: float = 0.5) -> float:
    """Spearman's rank correlation of score and overlap, over all detections that overlap an object of their class.

    It says whether the tighter box has the higher score. Zero where fewer than three detections overlap by
    ``overlap``, or all scores or overlaps are alike.
    """
    from scipy.stats import rankdata

    pairs = []
    for found, target in records:
        if not len(target["boxes"]) or not len(found["boxes"]):
            continue
        iou = box_iou(found["boxes"].double(), target["boxes"].double())
        best = iou.masked_fill(found["labels"][:, None] != target["labels"], 0).amax(1)
        pairs.append(torch.stack([found["scores"].double(), best])[:, best >= overlap])
    ranks = torch.tensor(rankdata(torch.cat(pairs, 1).numpy(), axis=1)) if pairs else torch.zeros(2, 0)
    if ranks.shape[1] < 3 or bool((ranks.std(1) == 0).any()):
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _least(records: Sequence[Record], total: int) -> list[Tensor]:
    """Of each image, which detections are among the ``total`` best of all."""
    scores = [found["scores"] for found, _ in records]
    every = torch.cat(scores) if scores else torch.zeros(0)
    best = torch.zeros_like(every, dtype=torch.bool)
    best[every.argsort(descending=True, stable=True)[:total]] = True
    return list(best.split([len(part) for part in scores]))


def _matched(
    found: dict[str, Tensor], target: dict[str, Tensor], objects: Tensor, chosen: Tensor, overlap: float, touch: float
) -> tuple[Tensor, list[str]]:
    """Which objects are taken, and of each counted detection the cause of its fault, "" where it is right."""
    taken = torch.zeros_like(objects)
    order = found["scores"].masked_fill(~chosen, -torch.inf).argsort(descending=True, stable=True)[: int(chosen.sum())]
    if not len(objects):
        return taken, ["background"] * len(order)
    iou = box_iou(found["boxes"][order].double(), target["boxes"].double())  # (D, L)
    same = found["labels"][order][:, None] == target["labels"]
    fits = same & objects & (iou >= overlap)
    whole, whose = iou.max(1)
    real, which = iou.masked_fill(~objects, -1).max(1)
    crowd = (~objects[whose] & (whole >= overlap)).tolist()
    wrong = zip((real <= touch).tolist(), same.gather(1, which[:, None])[:, 0].tolist(), strict=True)
    choices: list[list[tuple[float, int]]] = [[] for _ in crowd]
    for row, column, value in zip(*(part.tolist() for part in (*torch.where(fits), iou[fits])), strict=True):
        choices[row].append((-value, column))
    gone: set[int] = set()
    causes = []
    # plain numbers: a tensor operation for each detection would take longer than all the rest
    for near, in_crowd, (apart, alike) in zip(choices, crowd, wrong, strict=True):
        free = min((pair for pair in near if pair[1] not in gone), default=None)
        if free is not None:
            gone.add(free[1])
            causes.append("")
        elif not in_crowd:
            causes.append("duplicate" if near else "background" if apart else "place" if alike else "class")
    taken[list(gone)] = True
    return taken, causes
