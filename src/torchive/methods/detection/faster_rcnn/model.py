"""The detector: features, proposals, second stage, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork

from torchive.methods.detection.faster_rcnn.decode import WEIGHTS, decode
from torchive.methods.detection.faster_rcnn.rpn import ConditionedRPNHead, propose, rpn_loss
from torchive.nn.pyramid import Pyramid, SingleMap, VGGFeatures
from torchive.ops.anchors import cell_anchors, grid_anchors
from torchive.ops.boxes import decode_boxes, encode_boxes
from torchive.ops.images import check_images, check_targets, image_sizes, pad_batch
from torchive.ops.roi import pool_regions
from torchive.structures import Detections


class FasterRCNN(nn.Module):
    """Two-stage detector: images (N, C, H, W), or a list of (C, H, W), to proposals, their class scores and box
    offsets.

    Boxes go in and come out in pixels of the images given. Options that are None follow the paper with one feature
    map, and torchvision with a pyramid.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: "vgg16" (the paper's), ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        pyramid: feature pyramid over the backbone's maps instead of one map of stride 16; None is True except for
            "vgg16".
        channels: of the pyramid's maps.
        hidden: of the second stage's two layers; 4096 or 1024 if None.
        image_size: shorter side to which images are resized (the paper's 600), the longer at most 5/3 of it; as they
            are if None.
        anchor_sizes: sides of the anchors in pixels, a list for each map; 128, 256, 512, or 32 to 512 over the
            pyramid if None.
        aspect_ratios: height / width of the anchors.
        ignore_crossing: leave anchors that cross the image's border out of the RPN's training; True or False if None.
        rpn_normalisation: "paper" is equation 1, "sampled" averages over the sampled anchors, as the authors' later
            code.
        before_nms, after_nms: proposals in training and in test; (12000, 6000) and (2000, 300), or (2000, 1000) twice
            if None.
        min_proposal: smallest side of a proposal in pixels; 16 or 0 if None.
        rois_per_image: proposals that train the second stage; 128 or 512 if None.
        stages: 2, or 1 for the baseline that takes the proposals as detections (K must be 1).
        condition_channels: width of a vector that modulates the RPN's 3x3 convolution; 0, the default, is the
            standard RPN.

    Raises:
        ValueError: an argument outside the above.
    """

    task = "detection"

    def __init__(
        self,
        *,
        num_classes: int = 20,
        in_channels: int = 3,
        backbone: str | nn.Module = "vgg16",
        pyramid: bool | None = None,
        channels: int = 256,
        hidden: int | None = None,
        image_size: int | None = None,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        ignore_crossing: bool | None = None,
        rpn_normalisation: Literal["paper", "sampled"] | None = None,
        before_nms: tuple[int, int] | None = None,
        after_nms: tuple[int, int] | None = None,
        min_proposal: float | None = None,
        rois_per_image: int | None = None,
        stages: Literal[1, 2] = 2,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 1 or (stages == 1 and num_classes != 1):
            raise ValueError(f"num_classes must be >= 1, and 1 with one stage; got {num_classes} with stages={stages}")
        if stages not in (1, 2) or rpn_normalisation not in (None, "paper", "sampled"):
            raise ValueError(
                f"expected stages 1 or 2 and rpn_normalisation paper or sampled, got {stages} and {rpn_normalisation!r}"
            )
        pyramid = backbone != "vgg16" if pyramid is None else pyramid
        self.num_classes, self.in_channels, self.image_size, self.stages = num_classes, in_channels, image_size, stages
        self.ignore_crossing = not pyramid if ignore_crossing is None else ignore_crossing
        self.rpn_normalisation = rpn_normalisation or ("sampled" if pyramid else "paper")
        self.before_nms = before_nms or ((2000, 1000) if pyramid else (12000, 6000))
        self.after_nms = after_nms or ((2000, 1000) if pyramid else (2000, 300))
        self.min_proposal = (0.0 if pyramid else 16.0) if min_proposal is None else min_proposal
        self.condition_channels = condition_channels

        self.backbone: nn.Module
        if pyramid:
            self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels)
        else:
            self.backbone = VGGFeatures(in_channels) if backbone == "vgg16" else SingleMap(backbone, in_channels)
        levels: Any = self.backbone.levels
        self.strides = tuple(level.stride for level in levels)
        if anchor_sizes is None:
            anchor_sizes = [[32.0 * 2**k] for k in range(len(levels))] if pyramid else [[128.0, 256.0, 512.0]]
        if len(anchor_sizes) != len(levels) or len({len(sizes) for sizes in anchor_sizes}) != 1:
            raise ValueError(
                f"anchor_sizes must have {len(levels)} lists of one length, one for each map, got {list(anchor_sizes)}"
            )
        for k, sizes in enumerate(anchor_sizes):
            self.register_buffer(f"cell{k}", cell_anchors(sizes, aspect_ratios), persistent=False)
        width = levels[0].channels
        head = ConditionedRPNHead(width, len(anchor_sizes[0]) * len(aspect_ratios), condition_channels)
        # the paper's: positive from 0.7, negative below 0.3, 256 anchors, at most half of them positive
        self.rpn = RegionProposalNetwork(None, head, 0.7, 0.3, 256, 0.5, {}, {}, 0.7)
        self.roi_heads: RoIHeads | None = None
        if stages == 2:
            hidden = hidden or (1024 if pyramid else 4096)
            self.roi_heads = RoIHeads(
                None,
                TwoMLPHead(width * 49, hidden),
                FastRCNNPredictor(hidden, num_classes + 1),
                0.5,
                0.5,
                rois_per_image or (512 if pyramid else 128),
                0.25,
                WEIGHTS,
                0.05,
                0.5,
                100,
            )

    def forward(self, inputs: Tensor | Sequence[Tensor], condition: Tensor | None = None) -> dict[str, Tensor]:
        """Raw outputs, P proposals of each image in fixed shapes.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``class_logits`` (N, P, K + 1), ``box_deltas`` (N, P, 4
        (K + 1)), and ``sizes`` (N, 2), height and width of the images in the network, in whose pixels the boxes are.
        ``condition`` is (N, condition_channels).
        """
        x, sizes = self._batch(inputs)
        maps, raw = self._propose(x, condition)
        boxes = decode_boxes(raw["rpn_deltas"], raw["anchors"])
        raw["proposals"], raw["proposal_scores"] = self._filter(raw["objectness"], boxes, maps, sizes, 1)
        raw["sizes"] = sizes
        if self.roi_heads is not None:
            count = raw["proposals"].shape[1]
            image = torch.arange(x.shape[0], device=x.device)[:, None].expand(-1, count).flatten()
            logits, deltas = self._second(maps, raw["proposals"].flatten(0, 1), image)
            raw["class_logits"], raw["box_deltas"] = logits.unflatten(0, (-1, count)), deltas.unflatten(0, (-1, count))
        return raw

    def losses(
        self,
        inputs: Tensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Of joint training: ``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``."""
        x, sizes = self._batch(inputs)
        check_targets(targets, len(x), self.num_classes)
        targets = self._scale_targets(targets, sizes, image_sizes(inputs))
        maps, raw = self._propose(x, condition)
        anchors, objectness, deltas = raw["anchors"], raw["objectness"], raw["rpn_deltas"]
        labels, matched = self.assign(anchors, targets, sizes)
        codes = [encode_boxes(boxes, anchors) for boxes in matched]
        losses = rpn_loss(
            objectness,
            deltas,
            labels,
            codes,
            self.rpn.fg_bg_sampler,
            normalisation=self.rpn_normalisation,
            positions=sum(m.shape[2] * m.shape[3] for m in maps),
        )
        if self.roi_heads is None:
            return losses
        boxes, scores = self._filter(objectness, decode_boxes(deltas.detach(), anchors), maps, sizes, 0)
        proposals = [box[score >= 0] for box, score in zip(boxes, scores, strict=True)]
        proposals, _, classes, codes = self.roi_heads.select_training_samples(proposals, list(targets))
        image = torch.cat([torch.full((len(p),), k, device=x.device) for k, p in enumerate(proposals)])
        logits, offsets = self._second(maps, torch.cat(proposals), image)
        losses["loss_classifier"], losses["loss_box_reg"] = fastrcnn_loss(logits, offsets, classes, codes)
        return losses

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode(raw, image_sizes, **options)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        condition: Tensor | None = None,
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in."""
        return decode(
            self(inputs, condition),
            image_sizes(inputs),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )

    def assign(
        self, anchors: Tensor, targets: Sequence[dict[str, Tensor]], sizes: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The RPN's labels (A,) of each image, 1, 0 or -1, and the box (A, 4) that each anchor is to regress to."""
        labels, matched = [], []
        for target, size in zip(targets, sizes, strict=True):
            inside = torch.ones_like(anchors[:, 0], dtype=torch.bool)
            if self.ignore_crossing:
                inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= size[1]) & (anchors[:, 3] <= size[0])
            label, box = torch.full_like(anchors[:, 0], -1), anchors.clone()
            if inside.any():
                found, boxes = self.rpn.assign_targets_to_anchors([anchors[inside]], [target])
                label[inside] = found[0].to(label.dtype)
                # an anchor of an image without boxes is never positive: its own box stands in, whose code is finite
                if len(target["boxes"]):
                    box[inside] = boxes[0].to(box.dtype)
            labels.append(label)
            matched.append(box)
        return labels, matched

    def _batch(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images resized and padded to (N, C, H, W), and their sizes (N, 2) before padding."""
        check_images(inputs, self.in_channels)
        if self.image_size is not None:
            if isinstance(inputs, Tensor):
                inputs = self._resize(inputs)
            else:
                inputs = [self._resize(image[None])[0] for image in inputs]
        first = inputs if isinstance(inputs, Tensor) else inputs[0]
        dtype = torch.promote_types(first.dtype, torch.float32)  # half precision does not hold pixel numbers
        if isinstance(inputs, Tensor):
            height, width = inputs.shape[2:]
            sizes = torch.tensor([[height, width]], device=inputs.device, dtype=dtype).expand(inputs.shape[0], 2)
        else:
            sizes = torch.tensor(image_sizes(inputs), device=first.device, dtype=dtype)
        return pad_batch(inputs, max(self.strides[-1] // 2, 16)), sizes

    def _resize(self, images: Tensor) -> Tensor:
        assert self.image_size is not None
        short, long = min(images.shape[2:]), max(images.shape[2:])
        scale = min(self.image_size / short, round(self.image_size * 5 / 3) / long)
        if scale == 1:
            return images
        return F.interpolate(
            images, scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=True
        )

    def _propose(self, x: Tensor, condition: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor]]:
        if condition is not None and condition.shape != (len(x), self.condition_channels):
            raise ValueError(
                f"expected a condition ({len(x)}, {self.condition_channels}), got {tuple(condition.shape)}"
            )
        maps = self.backbone(x)
        objectness, deltas = self.rpn.head.flat(maps, condition)
        parts = [
            grid_anchors(m.shape[2:], s, getattr(self, f"cell{k}"))
            for k, (m, s) in enumerate(zip(maps, self.strides, strict=True))
        ]
        return maps, {"objectness": objectness, "rpn_deltas": deltas, "anchors": torch.cat(parts)}

    def _filter(
        self, objectness: Tensor, boxes: Tensor, maps: Sequence[Tensor], sizes: Tensor, test: int
    ) -> tuple[Tensor, Tensor]:
        per_cell = len(self.cell0)  # type: ignore[arg-type]
        return propose(
            objectness,
            boxes,
            [per_cell * m.shape[2] * m.shape[3] for m in maps],
            sizes,
            before_nms=self.before_nms[test],
            after_nms=self.after_nms[test],
            min_size=self.min_proposal,
        )

    def _second(self, maps: Sequence[Tensor], boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, K + 1) and box deltas (R, 4 (K + 1)) of boxes (R, 4) on the images ``image`` (R,)."""
        assert self.roi_heads is not None
        used = maps if len(maps) == 1 else maps[:-1]  # the pooled map on top serves the proposals only
        pooled = pool_regions(used, self.strides[: len(used)], boxes, image)
        return self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))

    def _scale_targets(
        self, targets: Sequence[dict[str, Tensor]], sizes: Tensor, originals: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scaled = []
        for target, size, original in zip(targets, sizes, originals, strict=True):
            boxes = target["boxes"].to(sizes.dtype)
            ratio = (size / size.new_tensor(original))[[1, 0, 1, 0]]
            scaled.append({"boxes": boxes * ratio, "labels": target["labels"]})
        return scaled
