"""The system: pyramid, proposals, boxes, masks, landmarks and matching, in the three verbs and two more to match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchive.methods.detection.deepfashion2_match_rcnn.decoding import decode_detections, decode_landmarks
from torchive.methods.detection.deepfashion2_match_rcnn.heads import LandmarkHead, landmark_counts
from torchive.methods.detection.deepfashion2_match_rcnn.losses import (
    check_landmarks,
    check_pairs,
    landmark_loss,
    landmark_targets,
    pair_loss,
    sample_pairs,
)
from torchive.methods.detection.deepfashion2_match_rcnn.matching import FEATURES, MatchingNetwork, branches_of
from torchive.nn.mask_head import MaskHead, detection_values, mask_loss, mask_targets, of_label, positive_regions
from torchive.nn.pyramid import Pyramid
from torchive.nn.region_proposals import RegionProposals
from torchive.nn.regions import RegionStage, class_boxes, image_of, region_loss, region_maps, sample_regions
from torchive.nn.two_stage import DetectsInForward
from torchive.ops.images import image_sizes, scale_targets, training_targets
from torchive.ops.masks import check_masks
from torchive.ops.roi import pool_regions
from torchive.ops.suppression import fixed_detections
from torchive.structures import Detections

_SIZE = 14  # side of the pooled features of masks, landmarks and matching


class MatchRCNN(DetectsInForward):
    """Detector with masks and landmarks, and a matching network: images (N, C, H, W), or a list of (C, H, W).

    Targets hold ``boxes`` (L, 4), ``labels`` (L,), ``masks`` (L, H, W), ``keypoints`` (L, P, 3), x, y and 0 for not
    marked, 1 for occluded, 2 for visible, zeros outside the run of the label's own class, and of each item ``pair_id``,
    ``style`` and ``source`` (L,), 0 for a shop's and 1 for a user's photograph. What a branch needs it does without
    where it is switched off. A batch should hold both photographs of some pairs.

    To search a gallery: ``predict`` it once, keep the ``features`` of its detections, then ``retrieve`` with those of
    a query; or ``describe`` boxes that are known.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        landmarks: number of landmarks of each class; "deepfashion2" is its 13 categories' 294; () does without.
        masks: the mask branch.
        matching: which branches' features items are matched by: "class", the pooled features themselves, "pose",
            "mask", "pose+class" or "mask+class"; None does without matching.
        channels: of the pyramid's maps and of the mask branch.
        hidden: of the box branch's two layers.
        landmark_channels: of the landmark branch's eight convolutions.
        embedding_dim: E, length of an item's vector.
        negatives: different pairs that are learnt for each same pair of a batch.
        image_size: shorter side to which images are resized, the longer at most 5/3 of it; as they are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 32 on the finest, doubled on the next, if
            None.
        aspect_ratios: height / width of the anchors.
        before_nms, after_nms: proposals in training and in test, of a level and of an image.
        rois_per_image: proposals that train the second stage.

    Raises:
        ValueError: an argument outside the above, or features of a branch that is switched off.
    """

    detected: ClassVar[dict[str, Any]] = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100}

    def __init__(
        self,
        *,
        num_classes: int = 13,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        landmarks: Sequence[int] | Literal["deepfashion2"] = "deepfashion2",
        masks: bool = True,
        matching: str | None = "pose+class",
        channels: int = 256,
        hidden: int = 1024,
        landmark_channels: int = 512,
        embedding_dim: int = 256,
        negatives: float = 3.0,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before_nms: tuple[int, int] = (2000, 1000),
        after_nms: tuple[int, int] = (2000, 1000),
        rois_per_image: int = 512,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        counts = landmark_counts(landmarks, num_classes)
        read = branches_of(matching, landmarks=bool(counts), masks=masks)
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.rois_per_image, self.negatives, self.reads = rois_per_image, negatives, read
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
        self.boxes = RegionStage(channels, num_classes, hidden=hidden)
        self.masks = MaskHead(channels, num_classes, width=channels, size=_SIZE) if masks else None
        self.landmarks = LandmarkHead(channels, counts, width=landmark_channels) if counts else None
        widths = {"class": channels, "pose": landmark_channels, "mask": channels}
        self.matching: MatchingNetwork | None = None
        if read:
            width = sum(widths[name] for name in read)
            self.matching = MatchingNetwork(width, width=channels, embedding_dim=embedding_dim)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, D detections of each image in fixed shapes, boxes and points in pixels of the batch.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P', 4) with
        ``proposal_scores`` (N, P'), -1 where a row is empty, ``class_logits`` (N, P', K + 1), ``box_deltas`` (N, P',
        4 (K + 1)), ``boxes`` (N, D, 4), ``labels`` (N, D), ``scores`` (N, D), -1 where a row is empty, and of the
        branches there are ``masks`` (N, D, 28, 28) in [0, 1], ``landmarks`` (N, D, M, 3), x, y and probability, and
        ``features`` (N, D, E); ``sizes`` (N, 2).
        """
        return self._raw(inputs, **self.detected)

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``, and of the branches there
        are ``loss_mask``, ``loss_keypoint`` and ``loss_pair``; all have weight 1.
        """
        x, sizes = self._batch(inputs)
        originals = image_sizes(inputs)
        targets = scale_targets(self._checked(targets, originals), sizes, originals)
        maps = self.backbone(x)
        raw = self.rpn(maps)
        losses = self.rpn.losses(raw, maps, targets, sizes)
        proposals = self.rpn.training_proposals(raw, maps, sizes)
        regions = sample_regions(proposals, targets, count=self.rois_per_image)
        used, strides = region_maps(maps, self.strides)
        logits, deltas = self.boxes(used, strides, regions.boxes, regions.image)
        losses["loss_classifier"], losses["loss_box_reg"] = region_loss(logits, deltas, regions)
        regions = positive_regions(regions)
        pooled = pool_regions(used, strides, regions.boxes, regions.image, size=_SIZE)
        if self.masks is not None:
            found = self.masks.mask_predictor(self.masks.mask_head(pooled))
            truth = mask_targets(regions, targets, sizes, originals, found.shape[-1])
            losses["loss_mask"] = mask_loss(found, regions.labels, truth)
        if self.landmarks is not None:
            maps_of = self.landmarks(self.landmarks.convs(pooled), regions.labels)
            cells, counts = landmark_targets(regions, targets, sizes, originals, self.landmarks, maps_of.shape[-1])
            losses["loss_keypoint"] = landmark_loss(maps_of, cells, counts)
        if self.matching is not None:
            losses["loss_pair"] = self._pair_loss(used, strides, targets)
        return losses

    def describe(self, inputs: Tensor | Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
        """The vectors (L, E) of boxes (L, 4) of each image, in pixels of the image that goes in.

        Raises:
            ValueError: there is no matching network, or not one list of boxes for each image.
        """
        self._network()
        x, sizes = self._batch(inputs)
        if len(boxes) != len(x):
            raise ValueError(f"expected boxes of {len(x)} images, got {len(boxes)}")
        scaled = scale_targets([{"boxes": box} for box in boxes], sizes, image_sizes(inputs))
        flat, image = _joined([target["boxes"] for target in scaled])
        vectors = self._vectors(*region_maps(self.backbone(x), self.strides), flat, image)
        return list(vectors.split([len(box) for box in boxes]))

    def match(self, query: Tensor, gallery: Tensor) -> Tensor:
        """The probability (Q, G) that items of vectors (Q, E) and (G, E) are the same; it does not ask which is which.

        Raises:
            ValueError: there is no matching network, or other shapes.
        """
        return self._network().match(query, gallery)

    def retrieve(self, query: Tensor, gallery: Tensor, *, k: int = 20) -> tuple[Tensor, Tensor]:
        """The k best items of vectors (G, E) for each of vectors (Q, E), best first: probabilities (Q, k), rows (Q, k).

        Raises:
            ValueError: there is no matching network, or other shapes.
        """
        return self._network().retrieve(query, gallery, k=k)

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], *, mask_threshold: float = 0.5
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes`` (height, width)."""
        return decode_detections(raw, image_sizes, self.landmarks, mask_threshold=mask_threshold)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        mask_threshold: float = 0.5,
    ) -> list[Detections]:
        """One ``Detections`` per image, in pixels of the image that went in.

        ``keypoints`` (L, P, 2) are zero outside the run of each item's class; ``features`` (L, E)
        are what ``match`` and ``retrieve`` take.
        """
        raw = self.detect(
            inputs, score_threshold=score_threshold, nms_threshold=nms_threshold, max_detections=max_detections
        )
        return self.decode(raw, image_sizes(inputs), mask_threshold=mask_threshold)

    def _raw(self, inputs: Tensor | Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
        x, sizes = self._batch(inputs)
        maps = self.backbone(x)
        raw: dict[str, Tensor] = self.rpn(maps)
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(raw, maps, sizes)
        used, strides = region_maps(maps, self.strides)
        logits, deltas = self.boxes(used, strides, raw["proposals"].flatten(0, 1), image_of(raw["proposals"]))
        count = raw["proposals"].shape[1]
        raw["class_logits"], raw["box_deltas"] = (part.unflatten(0, (-1, count)) for part in (logits, deltas))
        raw["sizes"] = sizes
        raw["boxes"], raw["labels"], raw["scores"], _ = fixed_detections(*class_boxes(raw), **options)

        def run(boxes: Tensor, image: Tensor, labels: Tensor) -> list[Tensor]:
            return self._details(pool_regions(used, strides, boxes, image, size=_SIZE), boxes, labels)

        branches = (("masks", self.masks), ("landmarks", self.landmarks), ("features", self.matching))
        names = [name for name, part in branches if part is not None]
        if names:
            found = detection_values(run, raw["boxes"], raw["labels"], raw["scores"])
            raw |= dict(zip(names, found, strict=True))
        return raw

    def _details(self, pooled: Tensor, boxes: Tensor, labels: Tensor) -> list[Tensor]:
        """Masks (R, 28, 28), landmarks (R, M, 3) and vectors (R, E) of detections, as far as there are branches."""
        read, found = self._read(pooled, ("class", "pose", "mask")), []
        if self.masks is not None:
            found.append(of_label(self.masks.mask_predictor(read["mask"]), labels).sigmoid())
        if self.landmarks is not None:
            found.append(decode_landmarks(self.landmarks(read["pose"], labels), boxes))
        if self.matching is not None:
            found.append(self.matching(torch.cat([read[name] for name in self.reads], 1)))
        return found

    def _read(self, pooled: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The features that branches make of pooled ones (R, C, 14, 14), of those that there are."""
        parts = {"class": nn.Identity()}
        if self.landmarks is not None:
            parts["pose"] = self.landmarks.convs
        if self.masks is not None:
            parts["mask"] = self.masks.mask_head
        return {name: parts[name](pooled) for name in names if name in parts}

    def _vectors(self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, image: Tensor) -> Tensor:
        pooled = pool_regions(maps, strides, boxes, image, size=_SIZE)
        vectors: Tensor = self._network()(torch.cat(list(self._read(pooled, self.reads).values()), 1))
        return vectors

    def _pair_loss(
        self, maps: Sequence[Tensor], strides: Sequence[int], targets: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        boxes, image = _joined([target["boxes"] for target in targets])
        items = [torch.cat([target[key] for target in targets]) for key in ("pair_id", "style", "source")]
        user, shop, same = sample_pairs(*items, negatives=self.negatives)
        used, row = torch.cat([user, shop]).unique(return_inverse=True)  # items that stand in no pair are not pooled
        first, second = self._vectors(maps, strides, boxes[used], image[used])[row].chunk(2)
        return pair_loss(self._network().pair_logits(first, second), same)

    def _network(self) -> MatchingNetwork:
        if self.matching is None:
            raise ValueError(f"built with matching=None; it must be one of {', '.join(FEATURES)} to match items")
        return self.matching

    def _checked(
        self, targets: Sequence[dict[str, Tensor]], originals: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        targets = training_targets(targets, len(originals), self.num_classes)
        if self.masks is not None:
            check_masks(targets, originals)
        if self.landmarks is not None:
            check_landmarks(targets, self.landmarks.space.total)
        if self.matching is not None:
            check_pairs(targets)
        return targets


def _joined(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Boxes (L, 4) of each image one after the other, and the numbers of their images."""
    counts = torch.tensor([len(box) for box in boxes], device=boxes[0].device)
    return torch.cat(list(boxes)), torch.arange(len(boxes), device=counts.device).repeat_interleave(counts)
