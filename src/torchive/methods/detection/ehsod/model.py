"""The detector: proposals ranked by class activation, a cascade with image-level heads, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.detection.ehsod.cam import CamBranch, box_loss, image_loss, ranking
from torchive.methods.detection.ehsod.multiple_instances import (
    ImageHead,
    best_boxes,
    image_score_loss,
    image_scores,
)
from torchive.nn.box_cascade import BoxCascade, kept_proposals
from torchive.nn.pyramid import Pyramid
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import (
    Regions,
    join_regions,
    region_loss,
    region_maps,
    take_regions,
)
from torchive.nn.two_stage import DetectsRegions
from torchive.ops.images import image_sizes, scale_targets, training_targets, without_crowds
from torchive.ops.roi import pool_regions
from torchive.structures import Detections

Target = dict[str, Tensor]


class EHSOD(DetectsRegions):
    """Two-stage detector that learns from boxes and from image-level labels: images to boxes and class scores.

    A target may hold ``has_boxes`` () and ``image_labels`` (K,), 1 for each class that the image shows. Without the
    first it has boxes, without the second its ``labels`` are taken. Where it has none, the losses that need boxes leave
    the image out, and one of the two must name its classes; ``image_labels`` of zeros say that it shows none.
    ``data.boxed`` of a recipe makes such targets.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        channels: of the pyramid's maps.
        hidden: of each stage's two layers.
        image_size: shorter side to which images are resized, the longer at most 5/3 of it; as they are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 32 on the finest, doubled on the next, if
            None.
        aspect_ratios: height / width of the anchors.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        rois_per_image: boxes that train a stage.
        stages: of the cascade, at most three.
        cam_weight: of both losses of the class activation maps.
        image_weight: of the image-level losses of the stages. With both weights zero and ``rank_by`` "none" this is
            Cascade R-CNN on the images that have boxes, at its cost.
        cam_loss: "softmax" or "sigmoid", as of ``image_loss``.
        centre_ratio: of the boxes' sides in the heat maps.
        rank_by: how class activation ranks proposals, as of ``ranking``.
        mine: whether the best proposal of a stage for each class of an image without boxes is a box for the next.

    Raises:
        ValueError: an argument outside the above; in ``losses``, a target without boxes that names no class.
    """

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        channels: int = 256,
        hidden: int = 1024,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        rois_per_image: int = 512,
        stages: int = 3,
        cam_weight: float = 1.0,
        image_weight: float = 1.0,
        cam_loss: Literal["softmax", "sigmoid"] = "softmax",
        centre_ratio: float = 1.0,
        rank_by: Literal["product", "sum", "none"] = "product",
        mine: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        if cam_loss not in ("softmax", "sigmoid") or rank_by not in ("product", "sum", "none"):
            raise ValueError(
                f"expected cam_loss softmax or sigmoid and rank_by product, sum or none, got {cam_loss!r}, {rank_by!r}"
            )
        if not 0 < centre_ratio <= 1 or cam_weight < 0 or image_weight < 0:
            raise ValueError(
                "expected centre_ratio above 0 and at most 1, and weights >= 0, "
                f"got {centre_ratio}, {cam_weight}, {image_weight}"
            )
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.cam_weight, self.image_weight, self.cam_loss = cam_weight, image_weight, cam_loss
        self.centre_ratio, self.mine = centre_ratio, mine
        self.rank_by: Literal["product", "sum", "none"] = rank_by
        self.mapped = cam_weight > 0 or rank_by != "none"  # whether class activation serves training
        self.judged = image_weight > 0 or mine  # whether the stages' image-level heads do
        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels)
        levels = self.backbone.levels
        self.strides = tuple(level.stride for level in levels)
        self.rpn = RegionProposals(
            levels,
            anchor_sizes=anchor_sizes or [[32.0 * 2**k] for k in range(len(levels))],
            aspect_ratios=aspect_ratios,
            before_nms=before_nms,
            after_nms=after_nms,
        )
        self.cam = CamBranch(channels, num_classes)
        self.boxes = BoxCascade(channels, num_classes, stages=stages, hidden=hidden, rois_per_image=rois_per_image)
        self.image_heads = nn.ModuleList(ImageHead(hidden, num_classes) for _ in range(stages))
        self.cam.requires_grad_(self.mapped)  # several processes must know what no step computes
        self.image_heads.requires_grad_(self.judged)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, P proposals of each image in fixed shapes, boxes in pixels of the batch.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``class_logits`` (N, P, K + 1), the mean over the stages,
        ``boxes`` (N, P, 4) after the last, and ``sizes`` (N, 2).
        """
        x, sizes = self._batch(inputs)
        maps = self.backbone(x)
        raw = self.rpn(maps)
        ranked = self._ranked(raw, self.cam(maps) if self.rank_by != "none" else [])
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(ranked, maps, sizes)
        found = self.boxes(partial(self._pool, maps), raw["proposals"], sizes)
        return raw | {"class_logits": found["class_logits"], "boxes": found["boxes"], "sizes": sizes}

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box_reg``, ``loss_cam_image``, ``loss_cam_box``, and of each stage
        ``loss_classifier``, ``loss_box_reg`` and ``loss_image``, weighted; zero where no image of the batch serves one.
        Losses of weight zero whose part serves nothing else either are left out.
        """
        x, sizes = self._batch(inputs)
        whole = training_targets(targets, len(x), self.num_classes, crowds=True)
        targets = scale_targets([without_crowds(target) for target in whole], sizes, image_sizes(inputs))
        boxed = torch.tensor([bool(t.get("has_boxes", True)) for t in targets], device=x.device)
        present = torch.stack([self._shown(target, k) for k, target in enumerate(whole)])  # a crowd is shown, too
        maps = self.backbone(x)
        raw, cams = self.rpn(maps), self.cam(maps) if self.mapped else []
        losses = self._map_losses(raw, maps, cams, targets, sizes, boxed, present)
        proposals = self.rpn.training_proposals(self._ranked(raw, cams), maps, sizes)
        known = boxed
        for t in range(len(self.image_heads)):
            found, proposals, mined = self._learn(t, maps, proposals, targets, sizes, known, present)
            losses |= found
            if self.mine:  # what is mined of this stage is a box for the next
                targets = [old if has else new for old, new, has in zip(targets, mined, boxed, strict=True)]
                known = boxed | torch.tensor([len(target["boxes"]) > 0 for target in targets], device=x.device)
        return losses

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in."""
        return self.decode(
            self(inputs),
            image_sizes(inputs),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )

    def _final(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**raw, "proposals": raw["boxes"], "box_deltas": torch.zeros_like(raw["boxes"])}

    def _map_losses(
        self,
        raw: dict[str, Tensor],
        maps: Sequence[Tensor],
        cams: Sequence[Tensor],
        targets: Sequence[Target],
        sizes: Tensor,
        boxed: Tensor,
        present: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the region proposals and of the class activation maps."""
        rows = torch.nonzero(boxed)[:, 0]
        losses = {}
        if self.mapped:
            image = image_loss(cams, present, self.strides, sizes, self.cam_loss)
            losses["loss_cam_image"] = self.cam_weight * image
            losses["loss_cam_box"] = torch.stack([cam.sum() for cam in cams]).sum() * 0.0
        if not len(rows):
            own = raw["objectness"].sum() * 0.0
            return losses | {"loss_objectness": own, "loss_rpn_box_reg": raw["rpn_deltas"].sum() * 0.0}
        chosen = [targets[k] for k in rows.tolist()]
        if self.mapped:
            losses["loss_cam_box"] = self.cam_weight * box_loss(
                [cam[rows] for cam in cams], chosen, self.strides, sizes[rows], centre_ratio=self.centre_ratio
            )
        part = {key: value if key == "anchors" else value[rows] for key, value in raw.items()}
        return losses | self.rpn.losses(part, maps, chosen, sizes[rows])

    def _learn(
        self,
        stage: int,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        sizes: Tensor,
        known: Tensor,
        present: Tensor,
    ) -> tuple[dict[str, Tensor], list[Tensor], list[Target]]:
        """The weighted losses of a stage, the proposals (P, 4) of each image after it, and what it found of classes."""
        regions, strong = self._regions(stage, proposals, targets, known)
        part: Any = self.boxes.stages[stage]
        features = part.box_head(self._pool(maps, regions.boxes, regions.image))
        logits, deltas = part.box_predictor(features)
        weight = self.boxes.stage_weights[stage]
        drawn = take_regions(regions, strong)
        score, offsets = region_loss(
            logits[strong], deltas[strong], drawn, weights=self.boxes.codes[stage], beta=self.boxes.beta
        )
        images = len(targets)
        losses = {f"stage{stage}.loss_classifier": weight * score, f"stage{stage}.loss_box_reg": weight * offsets}
        refined = self.boxes.refine(stage, regions.boxes, deltas, regions.image, sizes)
        mined: list[Target] = []
        if self.judged:
            shares = self.image_heads[stage](features, regions.image, images)
            scores = image_scores(shares, regions.image, images)
            losses[f"stage{stage}.loss_image"] = weight * self.image_weight * image_score_loss(scores, present)
            mined = best_boxes(shares.detach(), refined, regions.image, present) if self.mine else []
        return losses, kept_proposals(regions, refined, images), mined

    def _regions(
        self, stage: int, proposals: Sequence[Tensor], targets: Sequence[Target], known: Tensor
    ) -> tuple[Regions, Tensor]:
        """Regions that train a stage, and which of them (R,) have labels: drawn and assigned where boxes are known, of
        the other images the best ones as they are.
        """
        rows = torch.nonzero(known)[:, 0]
        chosen = rows.tolist()
        parts = []
        if chosen:
            drawn = self.boxes.sample(stage, [proposals[k] for k in chosen], [targets[k] for k in chosen])
            parts.append(Regions(drawn.boxes, rows[drawn.image], drawn.labels, drawn.matched, drawn.truth))
        for k in torch.nonzero(~known)[:, 0].tolist():
            box = proposals[k][: self.boxes.rois_per_image]
            none = torch.zeros_like(box[:, 0], dtype=torch.int64)
            parts.append(Regions(box, torch.full_like(none, k), none, none, torch.zeros_like(box)))
        regions = join_regions(parts)
        return regions, known[regions.image]

    def _shown(self, target: Target, number: int) -> Tensor:
        """The classes (K,) of an image, 0 or 1; an image without boxes must say them."""
        if not len(target["labels"]) and "image_labels" not in target and not bool(target.get("has_boxes", True)):
            raise ValueError(
                f"target {number} has neither boxes nor labels: expected image_labels ({self.num_classes},)"
            )
        if "image_labels" in target:
            if target["image_labels"].shape != (self.num_classes,):
                raise ValueError(
                    f"image_labels must have the shape ({self.num_classes},), got {tuple(target['image_labels'].shape)}"
                )
            return target["image_labels"].float()
        return torch.zeros(self.num_classes, device=target["labels"].device).index_fill(0, target["labels"] - 1, 1.0)

    def _ranked(self, raw: dict[str, Tensor], cams: Sequence[Tensor]) -> dict[str, Tensor]:
        plain = raw["objectness"]  # whose precision, which suppression wants, may make ties but turns no order round
        return raw | {"objectness": ranking(plain, cams, self.rpn.per_cell, self.rank_by).to(plain)}

    def _pool(self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
        return pool_regions(*region_maps(maps, self.strides), boxes, image)
