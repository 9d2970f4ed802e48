"""The detector: backbone, context, proposals, attention, the thin second stage, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.detection.thundernet.modules import ContextEnhancement, ProposalMap, SpatialAttention
from torchive.methods.detection.thundernet.snet import SNet
from torchive.nn.network import build_features
from torchive.nn.region_proposals import RegionProposals, rpn_loss
from torchive.nn.regions import decode_regions, image_of, region_loss, sample_regions, scored_regions
from torchive.nn.thin_regions import HardestAnchors, ProposalHead, ThinRegionStage, hard_region_loss
from torchive.ops.boxes import encode_boxes
from torchive.ops.images import (
    batch_images,
    check_images,
    image_sizes,
    pad_batch,
    scale_targets,
    stack_resized,
    training_targets,
)
from torchive.protocols import Level
from torchive.structures import Detections

#: More regions than any image has: all of them are candidates for mining.
ALL = 2**31


class ThunderNet(nn.Module):
    """Two-stage detector for phones: images (N, C, H, W), or a list of (C, H, W), to proposals, their class scores and
    box offsets.

    A list is resized to squares of ``image_size`` first, a tensor goes into ``forward`` as it is; ``losses`` and
    ``predict`` resize both. Boxes go in and come out in pixels of the images given.

    Args:
        num_classes: K, the background not counted; labels run from 1 to K.
        in_channels: C.
        backbone: "snet49", "snet146", "snet535", ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels`` that
            has maps of strides 16 and 32.
        image_size: side of the square that the network sees; None leaves images as they are.
        channels: of a pooled region; the context map has 49 times as many.
        width: of the proposal network's map.
        hidden: of the second stage's layer.
        global_branch: context of stride 32 and of the whole image; without it the baseline of one map.
        attention: what weighs the context map for the second stage: "rpn", the proposal network's map; "own", a map
            of its own of the same form; or "none".
        depthwise_act: an activation behind the proposal network's depthwise convolution, as in the port.
        per_class: whether each class has offsets of its own.
        mining: learn from the hardest anchors and regions instead of drawn ones.
        anchor_sizes: sides of the anchors in pixels of the network's input.
        aspect_ratios: height / width of the anchors.
        before_nms, after_nms: proposals in training and in test.
        rois_per_image: regions that the second stage learns from, for each image.
        train_sizes: sides of which one is drawn for each batch of ``losses``; ``image_size`` if None. The paper has
            240, 320, 480.

    Raises:
        ValueError: an argument outside the above, or a backbone without maps of strides 16 and 32.
    """

    task = "detection"

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "snet146",
        image_size: int | None = 320,
        channels: int = 5,
        width: int = 256,
        hidden: int = 1024,
        global_branch: bool = True,
        attention: Literal["rpn", "own", "none"] = "rpn",
        depthwise_act: bool = False,
        per_class: bool = False,
        mining: bool = True,
        anchor_sizes: Sequence[float] = (32.0, 64.0, 128.0, 256.0, 512.0),
        aspect_ratios: Sequence[float] = (0.5, 0.75, 1.0, 4 / 3, 2.0),
        before_nms: tuple[int, int] = (12000, 6000),
        after_nms: tuple[int, int] = (2000, 200),
        rois_per_image: int = 256,
        train_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if min(num_classes, channels, rois_per_image) < 1 or (image_size is not None and image_size < 1):
            raise ValueError(
                "num_classes, channels, rois_per_image and image_size must be >= 1, "
                f"got {num_classes}, {channels}, {rois_per_image} and {image_size}"
            )
        if attention not in ("rpn", "own", "none"):
            raise ValueError(f"attention must be rpn, own or none, got {attention!r}")
        if train_sizes is not None and (not train_sizes or min(train_sizes) < 1):
            raise ValueError(f"train_sizes must be sides >= 1, got {list(train_sizes)}")
        self.num_classes, self.in_channels, self.image_size = num_classes, in_channels, image_size
        self.mining, self.rois_per_image = mining, rois_per_image
        self.train_sizes = tuple(train_sizes) if train_sizes is not None else None
        if isinstance(backbone, str) and backbone.startswith("snet"):
            backbone = SNet(_variant(backbone), in_channels=in_channels)  # type: ignore[arg-type]
        self.backbone = build_features(backbone, in_channels=in_channels)
        levels: Any = self.backbone.levels
        strides = [level.stride for level in levels]
        if 16 not in strides or 32 not in strides:
            raise ValueError(f"expected a backbone with maps of strides 16 and 32, its strides are {strides}")
        self.fine, self.coarse, self.stride = strides.index(16), strides.index(32), 16
        thin = channels * 49
        self.context = ContextEnhancement(
            levels[self.fine].channels, levels[self.coarse].channels, out_channels=thin, global_branch=global_branch
        )
        self.proposal_map = ProposalMap(thin, out_channels=width, depthwise_act=depthwise_act)
        self.rpn = RegionProposals(
            [Level(width, 16)],
            anchor_sizes=[list(anchor_sizes)],
            aspect_ratios=aspect_ratios,
            before_nms=before_nms,
            after_nms=after_nms,
            head=ProposalHead(nn.Identity(), width, len(anchor_sizes) * len(aspect_ratios)),
        )
        self.own_map = (
            ProposalMap(thin, out_channels=width, depthwise_act=depthwise_act) if attention == "own" else None
        )
        self.attention = None if attention == "none" else SpatialAttention(thin, width)
        self.second = ThinRegionStage(channels, num_classes, hidden=hidden, per_class=per_class)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs, P proposals of each image in fixed shapes.

        ``objectness`` (N, A), ``rpn_deltas`` (N, A, 4), ``anchors`` (A, 4), ``proposals`` (N, P, 4) with
        ``proposal_scores`` (N, P), -1 where a row is empty, ``class_logits`` (N, P, K + 1), ``box_deltas`` (N, P, 4)
        or (N, P, 4 (K + 1)), and ``sizes`` (N, 2), height and width of the images in the network, in whose pixels the
        boxes are.
        """
        check_images(inputs, self.in_channels)
        x, sizes = batch_images(inputs) if isinstance(inputs, Tensor) else self._batch(inputs, self.image_size)
        raw, seen, thin = self._first(x)
        raw["proposals"], raw["proposal_scores"] = self.rpn.propose(raw, [seen], sizes)
        boxes, image = raw["proposals"].flatten(0, 1), image_of(raw["proposals"])
        logits, deltas = self.second(thin, self.stride, boxes, image)
        count = raw["proposals"].shape[1]
        raw["class_logits"], raw["box_deltas"] = logits.unflatten(0, (-1, count)), deltas.unflatten(0, (-1, count))
        raw["sizes"] = sizes
        return raw

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Of joint training: ``loss_objectness``, ``loss_rpn_box_reg``, ``loss_classifier``, ``loss_box_reg``."""
        check_images(inputs, self.in_channels)
        side = self.image_size
        if self.train_sizes is not None and self.training:
            side = self.train_sizes[int(torch.randint(len(self.train_sizes), ()))]
        x, sizes = self._batch(inputs, side)
        targets = training_targets(targets, len(x), self.num_classes)
        targets = scale_targets(targets, sizes, image_sizes(inputs))
        raw, seen, thin = self._first(x)
        labels, matched = self.rpn.assign(raw["anchors"], targets, sizes)
        losses = rpn_loss(
            raw["objectness"],
            raw["rpn_deltas"],
            labels,
            [encode_boxes(boxes, raw["anchors"]) for boxes in matched],
            HardestAnchors(raw["objectness"]) if self.mining else self.rpn.fg_bg_sampler,
            normalisation="sampled",
        )
        proposals = self.rpn.training_proposals(raw, [seen], sizes)
        if self.mining:
            regions = sample_regions(proposals, targets, count=ALL, positives=1.0)
        else:
            regions = sample_regions(proposals, targets, count=self.rois_per_image)
        logits, deltas = self.second(thin, self.stride, regions.boxes, regions.image)
        if self.mining:
            found = hard_region_loss(logits, deltas, regions, count=self.rois_per_image * len(x))
        else:
            found = region_loss(logits, deltas, regions, beta=1.0)
        losses["loss_classifier"], losses["loss_box_reg"] = found
        return losses

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode_regions(raw, image_sizes, **{"soft_sigma": 0.5, **options})

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        soft_sigma: float | None = 0.5,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes in pixels of the image that went in; hard suppression without a sigma."""
        check_images(inputs, self.in_channels)
        framed = inputs if self.image_size is None else stack_resized(inputs, (self.image_size, self.image_size))
        return self.decode(
            self(framed),
            image_sizes(inputs),
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            soft_sigma=soft_sigma,
        )

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, P, K, 4) in pixels of images of ``size`` (height, width), scores
        (N, P, K)."""
        return scored_regions(raw, size)

    def _batch(self, inputs: Tensor | Sequence[Tensor], side: int | None) -> tuple[Tensor, Tensor]:
        """Images resized and padded to (N, C, H, W), and their sizes (N, 2) before padding."""
        if side is None:
            return batch_images(inputs)
        x = stack_resized(inputs, (side, side))
        sizes = torch.full((len(x), 2), float(side), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return pad_batch(x, 32), sizes

    def _first(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The proposal network's outputs, the map they come from, and the thin map of the second stage."""
        maps = self.backbone(x)
        context = self.context(maps[self.fine], maps[self.coarse])
        seen = self.proposal_map(context)
        thin = context
        if self.attention is not None:
            thin = self.attention(context, seen if self.own_map is None else self.own_map(context))
        return self.rpn([seen]), seen, thin


def _variant(name: str) -> int:
    number = name.removeprefix("snet")
    if number not in ("49", "146", "535"):
        raise ValueError(f"expected snet49, snet146 or snet535, got {name!r}")
    return int(number)
