"""The region proposal network: anchors, head, which anchor learns which box, proposals, and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from torchive.ops.anchors import cell_anchors, grid_anchors
from torchive.ops.boxes import clip_boxes, decode_boxes, encode_boxes, keep_after_nms
from torchive.ops.matching import IGNORED, match_anchors
from torchive.protocols import Level

Sampler = Callable[[list[Tensor]], tuple[list[Tensor], list[Tensor]]]
Normalisation = Literal["paper", "sampled"]


class TrainingProposals:
    """``propose`` for the training of a second stage."""

    propose: Callable[..., tuple[Tensor, Tensor]]

    def training_proposals(self, raw: dict[str, Tensor], maps: Sequence[Tensor], sizes: Tensor) -> list[Tensor]:
        """Proposals (P, 4) of each image with which a second stage is trained, empty rows left out."""
        boxes, scores = self.propose(raw, maps, sizes, train=True)
        return [box[score >= 0] for box, score in zip(boxes, scores, strict=True)]


class RegionProposals(TrainingProposals, RegionProposalNetwork):
    """Feature maps to objectness and offsets of A anchors, and these to proposals.

    torchvision's matcher and sampler: an anchor is positive from an overlap of 0.7 or as the best of a box, negative
    below 0.3, and 256 are drawn of each image, at most half of them positive.

    Args:
        levels: of the maps, finest first.
        anchor_sizes: sides of the anchors in pixels, a list for each map, all of one length.
        aspect_ratios: height / width of the anchors.
        ignore_crossing: leave anchors that cross the image's border out of the training.
        normalisation: of the loss, as in ``rpn_loss``.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        min_proposal: smallest side of a proposal in pixels.
        head: module with ``flat(maps, condition)`` to objectness (N, A) and deltas (N, A, 4); torchvision's if None.
        condition_channels: of the default head.

    Raises:
        ValueError: ``anchor_sizes`` does not fit the maps.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        anchor_sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        ignore_crossing: bool = False,
        normalisation: Normalisation = "sampled",
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        min_proposal: float = 0.0,
        head: nn.Module | None = None,
        condition_channels: int = 0,
    ) -> None:
        if len(anchor_sizes) != len(levels) or len({len(sizes) for sizes in anchor_sizes}) != 1:
            raise ValueError(
                f"anchor_sizes must have {len(levels)} lists of one length, one for each map, got {list(anchor_sizes)}"
            )
        per_cell = len(anchor_sizes[0]) * len(aspect_ratios)
        if head is None:
            head = ConditionedRPNHead(levels[0].channels, per_cell, condition_channels)
        # the paper's: positive from 0.7, negative below 0.3, 256 anchors, at most half of them positive
        super().__init__(None, head, 0.7, 0.3, 256, 0.5, {}, {}, 0.7)
        self.strides, self.per_cell = tuple(level.stride for level in levels), per_cell
        for k, sizes in enumerate(anchor_sizes):
            self.register_buffer(f"cell{k}", cell_anchors(sizes, aspect_ratios), persistent=False)
        self.ignore_crossing, self.normalisation = ignore_crossing, normalisation
        self.before_nms, self.after_nms, self.min_proposal = before_nms, after_nms, min_proposal

    def forward(self, maps: Sequence[Tensor], condition: Tensor | None = None) -> dict[str, Tensor]:
        """``objectness`` (N, A), ``rpn_deltas`` (N, A, 4) and ``anchors`` (A, 4) in pixels of the batch."""
        objectness, deltas = self.head.flat(maps, condition)
        parts = [
            grid_anchors(m.shape[2:], s, getattr(self, f"cell{k}"))
            for k, (m, s) in enumerate(zip(maps, self.strides, strict=True))
        ]
        return {"objectness": objectness, "rpn_deltas": deltas, "anchors": torch.cat(parts)}

    def propose(
        self, raw: dict[str, Tensor], maps: Sequence[Tensor], sizes: Tensor, *, train: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Proposals (N, P, 4) and their scores (N, P), as of ``propose``, in images of ``sizes`` (N, 2)."""
        return propose(
            raw["objectness"],
            decode_boxes(raw["rpn_deltas"].detach(), raw["anchors"]),
            [self.per_cell * m.shape[2] * m.shape[3] for m in maps],
            sizes,
            before_nms=self.before_nms[0 if train else 1],
            after_nms=self.after_nms[0 if train else 1],
            min_size=self.min_proposal,
        )

    def losses(
        self, raw: dict[str, Tensor], maps: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], sizes: Tensor
    ) -> dict[str, Tensor]:
        """``loss_objectness`` and ``loss_rpn_box_reg``; targets in pixels of the batch."""
        labels, matched = self.assign(raw["anchors"], targets, sizes)
        return rpn_loss(
            raw["objectness"],
            raw["rpn_deltas"],
            labels,
            [encode_boxes(boxes, raw["anchors"]) for boxes in matched],
            self.fg_bg_sampler,
            normalisation=self.normalisation,
            positions=sum(m.shape[2] * m.shape[3] for m in maps),
        )

    def assign(
        self, anchors: Tensor, targets: Sequence[dict[str, Any]], sizes: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The labels (A,) of each image, 1, 0 or -1, and the box (A, 4) that each anchor is to regress to."""
        labels, matched = [], []
        for target, size in zip(targets, sizes, strict=True):
            if not self.ignore_crossing:
                label, box = self._assign(anchors, target["boxes"])
            else:
                inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= size[1]) & (anchors[:, 3] <= size[0])
                label, box = torch.full_like(anchors[:, 0], -1), anchors.clone()
                label[inside], box[inside] = self._assign(anchors[inside], target["boxes"])
            labels.append(label)
            matched.append(box)
        return labels, matched

    def _assign(self, anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (A,) and boxes (A, 4) of anchors (A, 4); an anchor without any stands in for its box, whose code is
        finite."""
        match = match_anchors(anchors, boxes, self.proposal_matcher)
        label = (match >= 0).to(anchors.dtype).masked_fill(match == IGNORED, -1)
        return label, boxes[match.clamp(min=0)].to(anchors.dtype) if len(boxes) else anchors


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
    beta: float = 1 / 9,
) -> dict[str, Tensor]:
    """``loss_objectness`` and ``loss_rpn_box_reg`` on sampled anchors.

    Args:
        objectness: (N, A); ``deltas`` (N, A, 4).
        labels: of each image (A,): 1 object, 0 background, -1 ignored.
        codes: of each image (A, 4), the targets of the deltas.
        sampler: labels to masks of the sampled positives and negatives.
        normalisation: "paper" is equation 1: N_cls = ``batch``, N_reg = ``positions``, lambda = ``balance``, smooth
            L1 with beta 1. "sampled" is the authors' Python code and torchvision: both sums over the number sampled,
            ``beta`` 1/9.
        positions: anchor positions of an image.
        batch, balance: of "paper"; ``beta`` of "sampled".
    """
    chosen = [torch.stack(part).bool() for part in sampler(labels)]  # positives, negatives: (N, A) each
    positive, any_chosen = chosen[0], chosen[0] | chosen[1]
    label, code = torch.stack(labels), torch.stack(codes)
    count = any_chosen.sum().clamp(min=1)
    classification = F.binary_cross_entropy_with_logits(objectness[any_chosen], label[any_chosen], reduction="sum")
    if normalisation == "sampled":
        regression = F.smooth_l1_loss(deltas[positive], code[positive], beta=beta, reduction="sum")
        return {"loss_objectness": classification / count, "loss_rpn_box_reg": regression / count}
    images = len(labels)
    regression = F.smooth_l1_loss(deltas[positive], code[positive], reduction="sum")
    return {
        "loss_objectness": classification / (batch * images),
        "loss_rpn_box_reg": balance * regression / (positions * images),
    }
