"""How well items of users' photographs are found among those of shops' ones, from the features of their detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchive.nn.landmark_precision import PARTS
from torchive.nn.retrieval import item_keys, retrieval
from torchive.structures import Detections

RANKS = (1, 5, 10, 20)
Record = tuple[dict[str, Tensor], dict[str, Tensor]]


def search_figures(model: nn.Module, records: Sequence[Record]) -> dict[str, float]:
    """``top_1`` to ``top_20`` and ``missed`` of ``nn.retrieval``, over all and over each part that the targets name.

    The queries are the items of images whose ``source`` is 1, the gallery is what was detected in the others. Empty
    where the model has no ``retrieve``, predictions no ``features``, or targets no pairs.
    """
    search: Any = getattr(model, "retrieve", None)
    told = all("features" in found and {"pair_id", "style", "source"} <= set(target) for found, target in records)
    if search is None or not records or not told:
        return {}
    user = [bool(target["source"].any()) for _, target in records]
    sides = [[record for record, mine in zip(records, user, strict=True) if mine is side] for side in (True, False)]
    queries, gallery = ([_detections(found) for found, _ in side] for side in sides)
    truths = [[target for _, target in side] for side in sides]
    asked, there = ({key for target in side for key in item_keys(target) if key[1] > 0} for side in truths)
    if not asked & there:
        return {}
    device = next(model.parameters()).device
    shown = torch.cat([found["features"] for found, _ in sides[1]]).to(device)
    with torch.no_grad():
        rows = [search(found["features"].to(device), shown, k=max(RANKS))[1].cpu() for found, _ in sides[0]]
    parts = {key: names for key, names in PARTS.items() if all(key in target for target in truths[0])}
    figures = retrieval(queries, truths[0], rows, gallery, truths[1], ks=RANKS, parts=parts)
    del figures["queries"]
    return figures


def _detections(found: dict[str, Tensor]) -> Detections:
    return Detections(found["boxes"], found["labels"], found["scores"], features=found["features"])
