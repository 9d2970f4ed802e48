"""The region proposal network: its head, its proposals and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers

from torchive.ops.boxes import clip_boxes, keep_after_nms

Sampler = Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]


class ConditionedRPNHead(RPNHead):
    """torchvision's head, whose 3x3 convolution's output can be modulated by a vector: ``(1 + gamma(v)) x + beta(v)``.

    Perez et al., "FiLM", AAAI 2018, arXiv:1709.07871. The layer that gives gamma and beta starts at zero, where the
    head is the standard one; without a vector it always is.
    """

    def __init__(self, in_channels: int, num_anchors: int, condition_channels: int = 0) -> None:
        super().__init__(in_channels, num_anchors)
        self.film: nn.Linear | None = None
        if condition_channels:
            self.film = nn.Linear(condition_channels, 2 * in_channels)
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def flat(self, maps: Sequence[Tensor], condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Objectness (N, A) and deltas (N, A, 4) of all levels."""
        objectness, deltas = [], []
        for x in maps:
            x = self.conv[0][0](x)
            if condition is not None and self.film is not None:
                gamma, beta = self.film(condition)[..., None, None].chunk(2, 1)  # (N, C, 1, 1)
                x = (1 + gamma) * x + beta
            x = x.relu()
            objectness.append(self.cls_logits(x))
            deltas.append(self.bbox_pred(x))
        flat, code = concat_box_prediction_layers(objectness, deltas)
        images = maps[0].shape[0]  # not len(), which an export would take for a constant
        return flat.view(images, -1), code.view(images, -1, 4)


def propose(
    objectness: Tensor,
    boxes: Tensor,
    counts: Sequence[int],
    sizes: Tensor,
    *,
    before_nms: int,
    after_nms: int,
    nms_threshold: float = 0.7,
    min_size: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Proposals (N, P, 4) and their scores (N, P), best first; rows left over by suppression have score -1.

    Args:
        objectness: (N, A) logits, ``boxes`` (N, A, 4) decoded; no gradient flows through either.
        counts: anchors of each level; levels are thinned and suppressed apart.
        sizes: (N, 2), height and width to clip to.
        before_nms, after_nms: how many boxes of a level go in, how many of an image come out.
        nms_threshold: overlap above which the lower score goes.
        min_size: smaller sides are dropped, in pixels.
    """
    objectness, boxes = objectness.detach(), boxes.detach()
    picks, levels, start = [], [], 0
    for level, part in enumerate(objectness.split(list(counts), 1)):
        index = part.topk(min(before_nms, part.shape[1]), 1).indices
        picks.append(index + start)
        levels.append(torch.full_like(index, level))
        start += part.shape[1]
    pick, level_of = torch.cat(picks, 1), torch.cat(levels, 1)  # (N, M)
    scores = objectness.gather(1, pick).sigmoid()
    boxes = clip_boxes(boxes.gather(1, pick[..., None].expand(-1, -1, 4)), sizes)  # (N, M, 4)
    small = (boxes[..., 2:] - boxes[..., :2]).amin(2) < max(min_size, 1e-3)
    scores = scores.masked_fill(small, -1)
    if torch.compiler.is_compiling():
        image = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
        group = (image * len(counts) + level_of).flatten()
        keep = keep_after_nms(boxes.flatten(0, 1), scores.flatten(), group, nms_threshold).view_as(scores)
    else:
        rows = zip(boxes, scores, level_of, strict=True)
        keep = torch.stack([keep_after_nms(box, score, level, nms_threshold) for box, score, level in rows])
    scores, index = scores.masked_fill(~keep, -1).topk(min(after_nms, scores.shape[1]), 1)
    return boxes.gather(1, index[..., None].expand(-1, -1, 4)), scores


def rpn_loss(
    objectness: Tensor,
    deltas: Tensor,
    labels: list[Tensor],
    codes: list[Tensor],
    sampler: Sampler,
    *,
    normalisation: Literal["paper", "sampled"] = "paper",
    positions: int = 1,
    batch: int = 256,
    balance: float = 10.0,
) -> dict[str, Tensor]:
    """``loss_objectness`` and ``loss_rpn_box_reg`` on sampled anchors.

    Args:
        objectness: (N, A); ``deltas`` (N, A, 4).
        labels: of each image (A,): 1 object, 0 background, -1 ignored.
        codes: of each image (A, 4), the targets of the deltas.
        sampler: labels to masks of the sampled positives and negatives.
        normalisation: "paper" is equation 1: N_cls = ``batch``, N_reg = ``positions``, lambda = ``balance``, smooth
            L1 with beta 1. "sampled" is the authors' Python code and torchvision: both sums over the number sampled,
            beta 1/9.
        positions: anchor positions of an image.
    """
    chosen = [torch.stack(part).bool() for part in sampler(labels)]  # positives, negatives: (N, A) each
    positive, any_chosen = chosen[0], chosen[0] | chosen[1]
    label, code = torch.stack(labels), torch.stack(codes)
    count = any_chosen.sum().clamp(min=1)
    classification = F.binary_cross_entropy_with_logits(objectness[any_chosen], label[any_chosen], reduction="sum")
    if normalisation == "sampled":
        regression = F.smooth_l1_loss(deltas[positive], code[positive], beta=1 / 9, reduction="sum")
        return {"loss_objectness": classification / count, "loss_rpn_box_reg": regression / count}
    images = len(labels)
    regression = F.smooth_l1_loss(deltas[positive], code[positive], reduction="sum")
    return {
        "loss_objectness": classification / (batch * images),
        "loss_rpn_box_reg": balance * regression / (positions * images),
    }
