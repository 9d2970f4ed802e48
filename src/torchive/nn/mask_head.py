"""The mask branch of a second stage: pooled regions to a mask of each class, its targets and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from torchive.nn.regions import Regions, image_of, take_regions
from torchive.ops.images import box_factors
from torchive.ops.masks import crop_masks
from torchive.ops.roi import pool_regions


class MaskHead(nn.Module):
    """Mask R-CNN's branch: RoIAlign, convolutions, a transposed one, logits of a mask for each class.

    He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870, figure 4. The layers are torchvision's; a mask of label k is
    channel k - 1, since the background has none.

    Args:
        channels: C of the maps.
        num_classes: K.
        width: of the convolutions.
        depth: their number.
        size: side of the pooled features, half of the mask's.
    """

    def __init__(self, channels: int, num_classes: int, *, width: int = 256, depth: int = 4, size: int = 14) -> None:
        super().__init__()
        self.size = size
        self.mask_head = MaskRCNNHeads(channels, (width,) * depth, 1)
        self.mask_predictor = MaskRCNNPredictor(width, width, num_classes)

    def forward(self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, image: Tensor) -> Tensor:
        """Logits (R, K, 2 size, 2 size) of boxes (R, 4), in pixels of the batch, on the images ``image`` (R,)."""
        logits: Tensor = self.mask_predictor(self.mask_head(pool_regions(maps, strides, boxes, image, size=self.size)))
        return logits


def positive_regions(regions: Regions) -> Regions:
    """The regions that have an object."""
    return take_regions(regions, torch.nonzero(regions.labels > 0)[:, 0])


def mask_targets(
    regions: Regions,
    targets: Sequence[dict[str, Tensor]],
    sizes: Tensor,
    originals: Sequence[tuple[int, int]],
    size: int,
    **options: bool,
) -> Tensor:
    """What the masks (R, size, size) of regions with objects are to be, each in its own box.

    Args:
        regions: as of ``positive_regions``, image by image, in pixels of the batch.
        targets: with ``masks`` (L, H, W) in pixels of ``originals`` (height, width).
        sizes: (N, 2), height and width of the images in the batch.
        originals: of the images that went in.
        size: side of the masks.
        options: ``aligned`` and ``binary`` of ``crop_masks``.
    """
    parts = [regions.boxes.new_zeros(0, size, size)]
    for k, (target, original) in enumerate(zip(targets, originals, strict=True)):
        rows = torch.nonzero(regions.image == k)[:, 0]
        boxes = regions.boxes[rows] * box_factors(sizes[k], original)
        parts.append(crop_masks(target["masks"], regions.matched[rows], boxes, size, **options))
    return torch.cat(parts)


def detection_values(
    run: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]], boxes: Tensor, labels: Tensor, scores: Tensor
) -> list[Tensor]:
    """What a further stage says of detections, each value (N, D, ...) in fixed shapes, zero where a row is empty.

    Args:
        run: boxes (R, 4), their images (R,) and labels (R,) to values (R, ...); outside an export it sees only the
            rows that are not empty.
        boxes, labels, scores: as of ``fixed_detections``.
    """
    images, count = boxes.shape[:2]
    flat, label, there = boxes.flatten(0, 1), labels.flatten(), scores.flatten() >= 0
    image = image_of(boxes)
    if torch.compiler.is_compiling():
        found = run(flat, image, label)
        whole = [torch.where(there.view(-1, *[1] * (value.ndim - 1)), value, 0) for value in found]
    else:
        rows = torch.nonzero(there)[:, 0]
        found = run(flat[rows], image[rows], label[rows])
        whole = [value.new_zeros(len(flat), *value.shape[1:]).index_copy(0, rows, value) for value in found]
    return [value.view(images, count, *value.shape[1:]) for value in whole]


def detection_masks(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], boxes: Tensor, labels: Tensor, scores: Tensor
) -> Tensor:
    """The masks (N, D, S, S) of detections, ``detection_values`` of one value."""
    return detection_values(lambda *rows: [run(*rows)], boxes, labels, scores)[0]


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each region's own class, the mean over regions and pixels; zero without regions.

    Args:
        logits: (R, K, S, S), or (R, 1, S, S) where the classes share one mask.
        labels: (R,), from 1 to K.
        targets: (R, S, S) in [0, 1].
    """
    if not len(labels):
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(of_label(logits, labels), targets.to(logits.dtype))


def of_label(masks: Tensor, labels: Tensor) -> Tensor:
    """The mask (R, S, S) of each row's label, from 1 to K, out of masks (R, K, S, S)."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    place = (labels - 1).clamp(min=0)[:, None, None, None].expand(-1, 1, *masks.shape[2:])
    return masks.gather(1, place)[:, 0]
