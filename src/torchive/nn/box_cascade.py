"""A cascade of box stages: each refines the boxes of the one before, and learns from those that overlap more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchive.nn.regions import Regions, RegionStage, image_of, region_loss, sample_regions
from torchive.ops.boxes import clip_boxes, decode_boxes

Code = tuple[float, float, float, float]
#: Pooled features (R, C, size, size) of boxes (R, 4) on the images (R,).
Pool = Callable[[Tensor, Tensor], Tensor]

#: Overlap from which each stage learns a box, the inverse deviations of its code, and the weight of its loss.
THRESHOLDS = (0.5, 0.6, 0.7)
CODES: tuple[Code, ...] = (
    (10.0, 10.0, 5.0, 5.0),
    (20.0, 20.0, 10.0, 10.0),
    (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067),
)
STAGE_WEIGHTS = (1.0, 0.5, 0.25)


class SharedBoxPredictor(nn.Module):
    """Features (R, hidden) to logits (R, K + 1) and offsets (R, 4) that all classes share."""

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(hidden, num_classes + 1)
        self.bbox_pred = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class BoxCascade(nn.Module):
    """Cascade R-CNN's stages: Cai, Vasconcelos, "Cascade R-CNN", CVPR 2018, arXiv:1712.00726, section 4.

    Stage t reads the features of the boxes that stage t - 1 refined. In training these boxes are assigned again, by a
    higher overlap, and drawn again; no gradient flows through their places. The defaults are the authors'.

    Args:
        channels: C of the maps.
        num_classes: K.
        stages: T.
        hidden: of each stage's two layers.
        size: side of the pooled features.
        thresholds: of each stage, overlap from which a box is learned.
        codes: of each stage, weights of the box code.
        stage_weights: of the loss of each stage.
        rois_per_image: boxes that train a stage, a quarter of them positive at most.
        beta: where the offsets' smooth L1 turns from a square into a line.

    Raises:
        ValueError: fewer thresholds, codes or weights than stages.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        stages: int = 3,
        hidden: int = 1024,
        size: int = 7,
        thresholds: Sequence[float] = THRESHOLDS,
        codes: Sequence[Code] = CODES,
        stage_weights: Sequence[float] = STAGE_WEIGHTS,
        rois_per_image: int = 512,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        known = min(len(thresholds), len(codes), len(stage_weights))
        if not 1 <= stages <= known:
            raise ValueError(
                f"stages must lie in 1 to {known}, which have a threshold, a code and a weight; got {stages}"
            )
        self.thresholds, self.codes = tuple(thresholds[:stages]), tuple(codes[:stages])
        self.stage_weights, self.rois_per_image, self.beta = tuple(stage_weights[:stages]), rois_per_image, beta
        self.stages = nn.ModuleList(
            RegionStage(
                channels, num_classes, hidden=hidden, size=size, box_predictor=SharedBoxPredictor(hidden, num_classes)
            )
            for _ in range(stages)
        )

    def forward(self, pool: Pool, proposals: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Proposals (N, P, 4) in images of ``sizes`` (N, 2) through all stages.

        ``stage_logits`` (N, T, P, K + 1), ``stage_boxes`` (N, T, P, 4) after each stage, ``class_logits`` (N, P, K + 1)
        the mean over the stages, ``boxes`` (N, P, 4) after the last.
        """
        boxes, image, count = proposals.flatten(0, 1), image_of(proposals), proposals.shape[1]
        logits, refined = [], []
        for t in range(len(self.stages)):
            score, delta = self.run(t, pool, boxes, image)
            boxes = self.refine(t, boxes, delta, image, sizes)
            logits.append(score.unflatten(0, (-1, count)))
            refined.append(boxes.unflatten(0, (-1, count)))
        stage_logits = torch.stack(logits, 1)
        return {
            "stage_logits": stage_logits,
            "stage_boxes": torch.stack(refined, 1),
            "class_logits": stage_logits.mean(1),
            "boxes": refined[-1],
        }

    def losses(
        self, pool: Pool, proposals: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], sizes: Tensor
    ) -> dict[str, Tensor]:
        """``stageT.loss_classifier`` and ``stageT.loss_box_reg``, weighted; proposals (P, 4) of each image."""
        losses: dict[str, Tensor] = {}
        for t in range(len(self.stages)):
            regions = self.sample(t, proposals, targets)
            found, boxes = self.learn(t, pool, regions, sizes)
            losses |= found
            proposals = kept_proposals(regions, boxes, len(targets))
        return losses

    def run(self, stage: int, pool: Pool, boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and offsets (R, 4) that a stage gives to boxes (R, 4) on the images ``image`` (R,)."""
        part = self.stages[stage]
        logits, deltas = part.box_predictor(part.box_head(pool(boxes, image)))  # type: ignore[operator]
        return logits, deltas

    def sample(self, stage: int, proposals: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Regions:
        """Boxes that train a stage, assigned by its threshold."""
        return sample_regions(proposals, targets, threshold=self.thresholds[stage], count=self.rois_per_image)

    def learn(self, stage: int, pool: Pool, regions: Regions, sizes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted losses of a stage, and the boxes (R, 4) after it."""
        logits, deltas = self.run(stage, pool, regions.boxes, regions.image)
        score, offsets = region_loss(logits, deltas, regions, weights=self.codes[stage], beta=self.beta)
        weight = self.stage_weights[stage]
        losses = {f"stage{stage}.loss_classifier": weight * score, f"stage{stage}.loss_box_reg": weight * offsets}
        return losses, self.refine(stage, regions.boxes, deltas, regions.image, sizes)

    def refine(self, stage: int, boxes: Tensor, deltas: Tensor, image: Tensor, sizes: Tensor) -> Tensor:
        """Boxes (R, 4) moved by a stage's offsets (R, 4), cut to their images; no gradient flows through them."""
        moved = decode_boxes(deltas.detach().to(boxes.dtype), boxes, self.codes[stage])
        return clip_boxes(moved[:, None], sizes[image])[:, 0]


def kept_proposals(regions: Regions, boxes: Tensor, images: int) -> list[Tensor]:
    """What the next step is drawn from: the refined boxes (R, 4) of each image.

    The objects' own boxes among the regions are left out, since each drawing adds them.
    """
    own = (regions.labels > 0) & (regions.boxes == regions.truth).all(1)
    return [boxes[(regions.image == k) & ~own] for k in range(images)]
