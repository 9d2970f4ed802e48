"""The guided region proposal network: locations, shapes, adapted features, proposals and losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from torchive.methods.detection.guided_anchoring.adaption import FeatureAdaption, Source
from torchive.methods.detection.guided_anchoring.anchors import Centre
from torchive.methods.detection.guided_anchoring.assign import assign
from torchive.methods.detection.guided_anchoring.guide import AnchorGuide, Matching, labels_of, position_rows
from torchive.methods.detection.guided_anchoring.masked import LEFT_OUT, kept_positions, put_back, rows_through
from torchive.nn.region_proposals import TrainingProposals, propose, rpn_loss
from torchive.ops.boxes import decode_boxes, encode_boxes
from torchive.protocols import Level

#: Weights of the proposals' box code, the inverse of its standard deviations 0.07 and 0.11.
CODE = (1 / 0.07, 1 / 0.07, 1 / 0.11, 1 / 0.11)
#: Standard deviation of a predicted log ratio of sides.
SHAPE_STD = 0.14


class GuidedProposals(TrainingProposals, nn.Module):
    """Feature maps to one anchor at each position, its objectness and offsets, and these to proposals.

    It stands where ``torchive.nn.region_proposals.RegionProposals`` does. An anchor is positive from an overlap of 0.7
    or as the best of a box from 0.3, negative below 0.3, and 256 are drawn of each image, at most half of them
    positive, once for the shapes and once for the classes.

    Args:
        levels: of the maps, finest first, all of one number of channels.
        anchor_scale: side of the square whose sides are stretched, in strides.
        offset_groups, adaption: as of ``FeatureAdaption``.
        shape_matching: vIoU by nine "samples", or "continuous", its exact maximum on the object's own map.
        location_threshold: sigmoid below which a position is left out, except in training.
        centre: as of ``base_squares``.
        oriented: whether an angle is predicted as well; targets must have ``rotated`` then.
        shape_weight: of the loss of the shapes.
        prior: probability of a centre at the start.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        min_proposal: smallest side of a proposal in pixels.

    Raises:
        ValueError: an argument outside the above, or maps of different channels.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        anchor_scale: float = 8.0,
        offset_groups: int = 4,
        adaption: Source = "shape",
        shape_matching: Matching = "samples",
        location_threshold: float = 0.01,
        centre: Centre = "middle",
        oriented: bool = False,
        shape_weight: float = 1.0,
        prior: float = 0.01,
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (300, 300),
        min_proposal: float = 0.0,
    ) -> None:
        super().__init__()
        if len({level.channels for level in levels}) != 1:
            raise ValueError(f"expected maps of one number of channels, got {[level.channels for level in levels]}")
        if not 0 <= location_threshold < 1:
            raise ValueError(f"location_threshold must lie in [0, 1), got {location_threshold}")
        channels = levels[0].channels
        self.threshold = location_threshold
        self.before_nms, self.after_nms, self.min_proposal = before_nms, after_nms, min_proposal
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.guide = AnchorGuide(
            channels,
            [level.stride for level in levels],
            anchor_scale=anchor_scale,
            std=SHAPE_STD,
            shape_matching=shape_matching,
            thresholds=(0.7, 0.3, 0.3),
            centre=centre,
            oriented=oriented,
            shape_weight=shape_weight,
            prior=prior,
        )
        self.adaption = FeatureAdaption(channels, channels, offset_groups=offset_groups, adaption=adaption)
        self.objectness = nn.Conv2d(channels, 1, 1)
        self.deltas = nn.Conv2d(channels, 4, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.sampler = BalancedPositiveNegativeSampler(256, 0.5)

    def forward(self, maps: Sequence[Tensor], *, everywhere: bool | None = None) -> dict[str, Tensor]:
        """Raw outputs of A positions, map by map, row by row, cell by cell.

        ``location`` (N, A), ``shapes`` (N, A, 2), ``anchors`` (N, A, 4) in pixels of the batch, ``kept`` (N, A),
        ``objectness`` (N, A) and ``rpn_deltas`` (N, A, 4), and of oriented anchors ``doubled`` (N, A, 2), the cosine
        and sine of twice the angle, of any length. Where a position is not kept its objectness is -1000 and its
        deltas are zero; ``everywhere`` keeps all, which is what training does if None.
        """
        everywhere = self.training if everywhere is None else everywhere
        found: dict[str, list[Tensor]] = {}
        for x in maps:
            x = self.conv(x).relu()
            raw = self.guide(x)
            turns = self.guide.turns(raw)
            kept = kept_positions(raw["location"], 0 if everywhere else self.threshold)
            if everywhere or torch.compiler.is_compiling():
                seen = self.adaption(x, raw["shapes"], turns)
                objectness, deltas = self.objectness(seen), self.deltas(seen)
                if not everywhere:
                    objectness = torch.where(kept[:, None], objectness, LEFT_OUT)
                    deltas = torch.where(kept[:, None], deltas, 0)
            else:
                place = torch.nonzero(kept)
                seen, grid = self.adaption.at(x, raw["shapes"], place, turns), (x.shape[0], *x.shape[2:])
                objectness = put_back(rows_through(self.objectness, seen), place, grid, LEFT_OUT)
                deltas = put_back(rows_through(self.deltas, seen), place, grid)
            raw |= {"kept": kept[:, None], "objectness": objectness, "rpn_deltas": deltas}
            for name, part in raw.items():
                found.setdefault(name, []).append(position_rows(part))
        result = {name: torch.cat(parts, 1) for name, parts in found.items()}
        for name in ("location", "kept", "objectness"):
            result[name] = result[name].squeeze(2)
        result["anchors"] = self.guide.anchors(result, maps)
        return result

    def propose(
        self, raw: dict[str, Tensor], maps: Sequence[Tensor], sizes: Tensor, *, train: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Proposals (N, P, 4) and their scores (N, P), as of ``propose``, in images of ``sizes`` (N, 2)."""
        boxes = decode_boxes(raw["rpn_deltas"].detach(), raw["anchors"], CODE)
        return propose(
            raw["objectness"],
            torch.where(raw["kept"][..., None], boxes, 0),  # what was left out has no area, and so no score
            [m.shape[2] * m.shape[3] for m in maps],
            sizes,
            before_nms=self.before_nms[0 if train else 1],
            after_nms=self.after_nms[0 if train else 1],
            min_size=self.min_proposal,
        )

    def losses(
        self, raw: dict[str, Tensor], maps: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], sizes: Tensor
    ) -> dict[str, Tensor]:
        """``loss_location``, ``loss_shape``, ``loss_objectness``, ``loss_rpn_box_reg`` and of oriented anchors
        ``loss_angle``; targets in pixels of the batch. Classes and boxes are learnt where positions are kept."""
        labels, codes = [], []
        for anchors, kept, target in zip(raw["anchors"], raw["kept"], targets, strict=True):
            boxes = target["boxes"].to(anchors)
            matches = assign(box_iou(boxes, anchors), positive=0.7, negative=0.3, low=0.3)
            labels.append(labels_of(matches).masked_fill(~kept, -1).to(anchors.dtype))
            truth = boxes[matches.clamp(min=0)] if len(boxes) else anchors
            codes.append(encode_boxes(torch.where(matches[:, None] >= 0, truth, anchors), anchors, CODE))
        return {
            **self.guide.losses(raw, maps, targets),
            **rpn_loss(
                raw["objectness"], raw["rpn_deltas"], labels, codes, self.sampler, normalisation="sampled", beta=1.0
            ),
        }
