"""Which anchor or default box learns which object, and which negatives count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

#: Rows of background and of what does not count, torchvision's numbers.
NEGATIVE, IGNORED = Matcher.BELOW_LOW_THRESHOLD, Matcher.BETWEEN_THRESHOLDS
#: Wishes looked for per object until sorting them all, which costs about as much, is the safer way on.
_CROWDED = 10


def match_anchors(anchors: Tensor, boxes: Tensor, matcher: Matcher) -> Tensor:
    """Of each anchor (A, 4) the row (A,) of its box (L, 4), -1 for background, -2 where it does not count.

    A box that no anchor overlaps has none; torchvision's matcher would give it all that overlap it as well, by zero.
    """
    overlap = box_iou(boxes.to(anchors), anchors)  # (L, A)
    rows = torch.nonzero((overlap > 0).any(1))[:, 0]  # of the boxes that an anchor reaches
    if not len(rows):
        return torch.full_like(anchors[:, 0], NEGATIVE, dtype=torch.int64)
    found: Tensor = matcher(overlap if len(rows) == len(boxes) else overlap[rows])
    return torch.where(found >= 0, rows[found.clamp(min=0)], found)


def match_default_boxes(iou: Tensor, threshold: float = 0.5) -> Tensor:
    """SSD's matching: for each default box the index of its object, or -1; (L, A) overlaps to (A,).

    First each object takes its best default box, no two the same; then each default box left joins the object it
    overlaps most, if by more than ``threshold`` (arXiv:1512.02325, section 2.2).

    Where objects want the same default box, the larger overlap has it and the others take their next best: the greedy
    order of the authors' bipartite matching. Objects beyond the number of default boxes, or without any overlap, own
    none.
    """
    objects, boxes = iou.shape
    if objects == 0 or boxes == 0:
        return torch.full((boxes,), -1, dtype=torch.int64, device=iou.device)
    best, match = iou.max(0)  # (A,)
    match = match.masked_fill(best <= threshold, -1)
    free = iou.clone()
    owner = torch.full((boxes,), -1, dtype=torch.int64, device=iou.device)
    waiting = torch.arange(objects, device=iou.device)
    sought, place, ranked = 0, torch.zeros_like(waiting), None
    while len(waiting):
        sought += len(waiting)
        if ranked is None and sought > _CROWDED * objects:
            # each object now goes down its list, whose end is worth nothing
            ranked = F.pad(free, (0, 1), value=-1).sort(dim=1, descending=True, stable=True)
        if ranked is None:
            value, wish = free[waiting].max(1)
        else:
            value, wish = (part[waiting, place[waiting]] for part in ranked)
            place[waiting] += 1
        waiting, wish = waiting[value > 0], wish[value > 0]
        if not len(waiting):
            break
        # an owner defends its box: whoever overlaps it more has it (of equals the first), the others ask elsewhere
        asked = torch.cat([wish, torch.nonzero(owner >= 0)[:, 0]])
        asking = torch.cat([waiting, owner[owner >= 0]])
        value = iou[asking, asked]
        largest = torch.zeros_like(best).scatter_reduce(0, asked, value, "amax", include_self=False)
        rank = torch.where(value == largest[asked], asking, objects)
        first = torch.full_like(owner, objects).scatter_reduce(0, asked, rank, "amin")
        owner = torch.where(first < objects, first, -1)
        lost = owner[asked] != asking
        free[asking[lost], asked[lost]] = -1
        waiting = asking[lost]
    return torch.where(owner >= 0, owner, match)


def hard_negatives(loss: Tensor, positive: Tensor, ratio: float = 3.0) -> Tensor:
    """Mask (N, A) of the negatives with the largest loss: in each row exactly ``min(ratio * positives, negatives)``
    of them.

    Args:
        loss: (N, A), what each default box would cost as background.
        positive: (N, A), matched default boxes; never chosen.
        ratio: negatives for each positive.
    """
    wanted = torch.minimum((ratio * positive.sum(1, keepdim=True)).floor(), (~positive).sum(1, keepdim=True))  # (N, 1)
    order = loss.detach().masked_fill(positive, -torch.inf).argsort(1, descending=True)
    chosen = torch.arange(loss.shape[1], device=loss.device) < wanted  # (N, A), by rank
    return torch.zeros_like(positive).scatter(1, order, chosen)
