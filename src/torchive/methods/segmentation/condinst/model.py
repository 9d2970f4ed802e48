"""The model: pyramid, detector, controller, mask features, and the three verbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.segmentation.condinst.decode import decode
from torchive.methods.segmentation.condinst.loss import choose, sampled_masks, semantic_loss
from torchive.methods.segmentation.condinst.mask_branch import MaskBranch, SemanticBranch
from torchive.methods.segmentation.condinst.mask_head import DynamicMaskHead
from torchive.methods.segmentation.condinst.upsampling import aligned_bilinear
from torchive.nn.dice import mask_dice
from torchive.nn.fcos import (
    FCOSHead,
    fcos_loss,
    flat_rows,
    init_conv,
    interest_of,
    lay_points,
    match_points,
    scored_points,
)
from torchive.nn.pyramid import Pyramid
from torchive.ops.images import check_images, image_sizes, pad_batch, training_targets
from torchive.ops.masks import check_masks
from torchive.ops.points import centres_of_mass
from torchive.structures import Detections


class CondInst(nn.Module):
    """Instance segmentation: images (N, C, H, W), or a list of (C, H, W), to boxes, classes and masks.

    A list is padded to one size, a multiple of the backbone's largest stride; so is a tensor. Boxes and masks go in and
    come out in pixels of the images given.

    Args:
        num_classes: K; labels run from 1 to K.
        in_channels: C.
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        channels: of the pyramid's maps.
        finest: stride of the finest map, 8 in the paper; 4 serves small objects.
        top: "convolutions", two more maps on the coarsest one as in the paper, or "none", for small images.
        sizes_of_interest: borders in pixels between the maps, by a box's farthest side from the location; 64, 128, 256,
            512, eight strides each, if None.
        radius: strides around an object's centre of mass within which locations are positive; None is its whole box.
        depth: convolutions of each of the detector's towers and of the mask branch.
        mask_channels: of the mask branch.
        mask_stride: of the masks: 2 in the paper, 4 in the released configuration.
        coordinates: whether the mask heads read places relative to the object.
        conditional: whether each object has its own filters; False is the baseline with one learnt head for all.
        semantic: whether the auxiliary semantic branch takes part in training.
        max_masks: locations of a batch that learn a mask, drawn at random; None takes all.
        masks_per_image: instead, locations of an image, the same number for each object, the best first.
        prior: score of every class at the start.
        smooth: added to areas in the box loss, in squared strides; 1 in the release.

    Raises:
        ValueError: an argument outside the above.
    """

    task = "detection"
    interest: Tensor
    reach: Tensor

    def __init__(
        self,
        *,
        num_classes: int = 80,
        in_channels: int = 3,
        backbone: str | nn.Module = "timm/resnet50",
        channels: int = 256,
        finest: int = 8,
        top: Literal["convolutions", "none"] = "convolutions",
        sizes_of_interest: Sequence[float] | None = None,
        radius: float | None = 1.5,
        depth: int = 4,
        mask_channels: int = 128,
        mask_stride: int = 2,
        coordinates: bool = True,
        conditional: bool = True,
        semantic: bool = False,
        max_masks: int | None = 500,
        masks_per_image: int | None = None,
        prior: float = 0.01,
        smooth: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 1 or depth < 0:
            raise ValueError(f"num_classes must be >= 1 and depth >= 0, got {num_classes} and {depth}")
        limits = [limit for limit in (max_masks, masks_per_image) if limit is not None]
        if min(limits, default=1) < 1:
            raise ValueError(f"max_masks and masks_per_image must be >= 1, got {max_masks} and {masks_per_image}")
        self.backbone = Pyramid(backbone, in_channels=in_channels, channels=channels, finest=finest, top=top)
        self.strides = tuple(level.stride for level in self.backbone.levels)
        if mask_stride < 1 or self.strides[0] % mask_stride:
            raise ValueError(f"mask_stride must divide the finest stride {self.strides[0]}, got {mask_stride}")
        self.num_classes, self.in_channels = num_classes, in_channels
        self.radius, self.mask_stride, self.smooth = radius, mask_stride, smooth
        self.max_masks, self.masks_per_image = max_masks, masks_per_image
        interest = interest_of(self.strides, sizes_of_interest)
        self.register_buffer("interest", interest, persistent=False)
        reach = interest[:, 1].clone()
        reach[-1] = 2 * interest[-1, 0] if len(reach) > 1 else 8 * self.strides[0]
        self.register_buffer("reach", reach, persistent=False)  # as the release, twice the last border on top
        self.detector = FCOSHead(channels, num_classes, levels=len(self.strides), depth=depth, prior=prior)
        self.mask_head = DynamicMaskHead(coordinates=coordinates)
        length = self.mask_head.parameters_per_object
        self.controller: nn.Conv2d | None = nn.Conv2d(channels, length, 3, padding=1) if conditional else None
        if self.controller is not None:
            init_conv(self.controller)
        else:
            self.filters = nn.Parameter(torch.randn(length) / 8**0.5)
        own = len(self.backbone.kept)
        if any(b != 2 * a for a, b in zip(self.strides[: min(own, 3)], self.strides[1 : min(own, 3)], strict=False)):
            raise ValueError(f"the backbone's strides must double from map to map, got {self.strides[:own]}")
        self.mask_branch = MaskBranch(channels, channels=mask_channels, levels=min(own, 3), depth=depth)
        self.semantic = SemanticBranch(channels, num_classes, channels=mask_channels) if semantic else None
        self.divisor = self.strides[own - 1]

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs of A locations, map by map, row by row, cell by cell.

        ``logits`` (N, A, K), ``distances`` (N, A, 4) in strides, ``centerness`` (N, A), ``filters`` (N, A, 169),
        ``features`` (N, 8, h, w) of the mask branch; ``points`` (A, 2), ``strides`` (A,), ``levels`` (A,) and ``reach``
        (A,), the pixels of a unit of the relative coordinates.
        """
        return self._raw(self._maps(inputs))

    def losses(self, inputs: Tensor | Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``classification``, ``localisation``, ``centerness``, ``mask``, and ``semantic`` with that branch.

        Without a positive location all but the first are zero. Targets have ``masks`` (L, H, W), too.
        """
        check_images(inputs, self.in_channels)
        sizes = image_sizes(inputs)
        targets = training_targets(targets, len(sizes), self.num_classes)
        check_masks(targets, sizes)
        maps = self._maps(inputs)
        raw = self._raw(maps)
        boxes = [target["boxes"] for target in targets]
        centres = [centres_of_mass(target["masks"], target["boxes"]) for target in targets]
        match = match_points(raw, self.interest, boxes, radius=self.radius, centres=centres)
        labels = torch.cat([target["labels"] for target in targets])
        losses = fcos_loss(raw, match, torch.cat(boxes), labels, smooth=self.smooth)
        losses["mask"] = self._mask_loss(raw, match, targets)
        if self.semantic is not None:
            losses["semantic"] = semantic_loss(self.semantic(maps[0]), targets, self.strides[0])
        return losses

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        return decode(raw, image_sizes, self.mask_head, stride=self.strides[0], mask_stride=self.mask_stride, **options)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        *,
        score_threshold: float = 0.05,
        candidates: int = 1000,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        mask_threshold: float = 0.5,
    ) -> list[Detections]:
        """One ``Detections`` per image, boxes and masks in pixels of the image that went in.

        ``score_threshold`` is of class times centerness; the score given is the root of that.
        """
        return self.decode(
            self(inputs),
            image_sizes(inputs),
            score_threshold=score_threshold,
            candidates=candidates,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
            mask_threshold=mask_threshold,
        )

    def _maps(self, inputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
        check_images(inputs, self.in_channels)
        maps: list[Tensor] = self.backbone(pad_batch(inputs, self.divisor))
        return maps

    def _raw(self, maps: list[Tensor]) -> dict[str, Tensor]:
        raw, towers = self.detector(maps)
        raw |= lay_points(maps, self.strides)
        raw["features"] = self.mask_branch(maps)
        raw["reach"] = self.reach.to(raw["points"])[raw["levels"]]
        if self.controller is not None:
            raw["filters"] = flat_rows([self.controller(tower) for tower in towers])
        else:
            raw["filters"] = self.filters.expand(*raw["centerness"].shape, -1)
        return raw

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, A, 1, 4) in pixels of images of ``size`` (height, width), scores
        (N, A, K), the root of class times centerness."""
        return scored_points(raw, size)

    def score_cut(self, threshold: float) -> float:
        """What scores of ``scored_boxes`` are compared with: the root of a threshold of class times centerness."""
        return threshold**0.5

    def masks_of(self, raw: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Scores ``masks`` (N, D, h, w) of the locations ``rows`` (N, D), at ``mask_stride``, of the padded images.

        Pixels of the images are those of ``aligned_bilinear(masks, mask_stride)``, cut to their size.
        """
        filters = raw["filters"].gather(1, rows[..., None].expand(-1, -1, raw["filters"].shape[2]))
        stride = self.strides[0]
        logits = self.mask_head(
            raw["features"].float(), filters.float(), raw["points"][rows], raw["reach"][rows], stride
        )
        return {"masks": aligned_bilinear(logits[:, :, 0], stride // self.mask_stride).sigmoid()}

    def _mask_loss(self, raw: dict[str, Tensor], match: Tensor, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        image, place = torch.nonzero(match >= 0, as_tuple=True)  # (P,)
        row = match[image, place]
        with torch.no_grad():
            score = raw["logits"][image, place].amax(-1).sigmoid() * raw["centerness"][image, place].sigmoid()
        kept = choose(image, row, score, most=self.max_masks, per_image=self.masks_per_image)
        image, place, row = image[kept], place[kept], row[kept]
        features = raw["features"]
        stride, start = self.strides[0], 0
        canvas = (features.shape[2] * stride, features.shape[3] * stride)
        each = []
        for k, target in enumerate(targets):
            mine = image == k
            if bool(mine.any()):
                where = place[mine]
                logits = self.mask_head(
                    features[k], raw["filters"][k, where], raw["points"][where], raw["reach"][where], stride
                )
                scores = aligned_bilinear(logits.float(), stride // self.mask_stride).sigmoid()
                truth = sampled_masks(target["masks"], row[mine] - start, self.mask_stride, canvas)
                each.append(mask_dice(scores, truth.to(scores.dtype)))
            start += len(target["boxes"])
        if not each:
            return features.sum() * 0 + raw["filters"].sum() * 0
        return torch.cat(each).mean()
