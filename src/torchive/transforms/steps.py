"""The named augmentations of each task. Boxes and masks follow the image, by torchvision's typed tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from torchive.ops.boxes import clip_to

#: Names that a recipe may list under ``augment``, by task: from the image's size to the augmentation.
_COMMON: dict[str, Callable[[int | None], nn.Module]] = {
    "flip": lambda size: v2.RandomHorizontalFlip(0.5),
    "vflip": lambda size: v2.RandomVerticalFlip(0.5),
    "light": lambda size: v2.ColorJitter(brightness=0.2, contrast=0.2),
    "colour": lambda size: v2.ColorJitter(brightness=(2 / 3, 1.5), saturation=(2 / 3, 1.5), hue=0.1),
    "blur": lambda size: v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], 0.3),
}


def _zoom(size: int | None) -> nn.Module:
    if size is None:
        raise ValueError("augmentation 'zoom' needs an image_size, got None")
    return v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)


def _crop(size: int | None) -> nn.Module:
    if size is None:
        raise ValueError("augmentation 'crop' needs an image_size, got None")
    return v2.RandomCrop(size)


AUGMENTATIONS: dict[str, dict[str, Callable[[int | None], nn.Module]]] = {
    "classification": {
        **_COMMON,
        "crop": _crop,
        "zoom": _zoom,
        "rotate": lambda size: v2.RandomRotation(15, v2.InterpolationMode.BILINEAR),
    },
    "detection": {
        **_COMMON,
        "iou_crop": lambda size: RandomIoUCrop(),
        "shift_scale": lambda size: RandomShiftScale(),
        "zoom_out": lambda size: RandomZoomOut(),
        "photometric": lambda size: v2.RandomPhotometricDistort(),
    },
    "segmentation": {**_COMMON, "crop": _crop, "zoom": _zoom},
}

DEFAULTS: dict[str, tuple[str, ...]] = {
    "classification": ("crop", "flip", "light"),
    "detection": ("flip", "light"),
    "segmentation": ("crop", "flip", "light"),
}

#: Those that cut to the final size; without one, the middle is cut out.
CUTTING = ("crop", "zoom")


class RandomIoUCrop(nn.Module):
    """SSD's crop (Liu et al. 2016, section 2.2): a random part that keeps at least one box's centre; boxes whose
    centre is outside are dropped, the others are cut. An image without boxes is left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.crop = v2.RandomIoUCrop()

    def forward(self, image: Any, target: Mapping[str, Any]) -> Any:
        if len(target["boxes"]) == 0:
            return image, target
        part, found = self.crop(image, target)
        boxes = found["boxes"]  # without sides where the centre is outside; the others keep half of each at least
        return part, _with_rows(found, (boxes[:, 2:] > boxes[:, :2]).all(1).as_subclass(torch.Tensor))


class RandomZoomOut(nn.Module):
    """SSD's expansion (Liu et al. 2016, section 3.6): the picture somewhere on a larger grey canvas, one time in two.

    The picture itself keeps its size and loses nothing: boxes, masks and landmarks move with it. What was not in the
    picture is category 255 of a semantic map.

    Args:
        scale: how many times as long the canvas's sides are at most; drawn evenly from 1 on.
        chance: how often it is done.
        grey: of the canvas, in [0, 1].

    Raises:
        ValueError: scale below 1, or a chance or grey outside [0, 1].
    """

    def __init__(self, *, scale: float = 4.0, chance: float = 0.5, grey: float = 0.5) -> None:
        super().__init__()
        if scale < 1 or not 0 <= chance <= 1 or not 0 <= grey <= 1:
            raise ValueError(f"expected scale >= 1, chance and grey in [0, 1], got {scale}, {chance} and {grey}")
        self.scale, self.chance, self.grey = scale, chance, grey

    def forward(self, image: Any, target: Mapping[str, Any] | None = None) -> Any:
        done, larger, across, down = torch.rand(4).tolist()
        if done >= self.chance:
            return image if target is None else (image, target)
        height, width = image.shape[-2:]
        factor = 1 + larger * (self.scale - 1)
        tall, wide = int(height * factor), int(width * factor)
        left, top = int((wide - width) * across), int((tall - height) * down)
        border = [left, top, wide - width - left, tall - height - top]
        grey = self.grey if image.is_floating_point() else round(self.grey * 255)
        placed = F.pad(image, border, fill=grey)
        if target is None:
            return placed
        boxes = target["boxes"].as_subclass(torch.Tensor)
        boxes = boxes + boxes.new_tensor([left, top] * 2)
        found = {**target, "boxes": tv_tensors.wrap(boxes, like=target["boxes"], canvas_size=(tall, wide))}
        for key, outside in (("masks", 0), ("semantic", 255)):
            if key in target:
                rows = target[key].new_full((*target[key].shape[:-2], tall, wide), outside)
                rows[..., top : top + height, left : left + width] = target[key]
                found[key] = tv_tensors.Mask(rows)
        if "keypoints" in target:
            points, seen = target["keypoints"].split([2, 1], -1)
            moved = torch.cat([points + points.new_tensor([left, top]), seen], -1)
            found["keypoints"] = torch.where(seen > 0, moved, target["keypoints"])
        return placed, found


class RandomShiftScale(nn.Module):
    """Another size and place of the picture on a canvas that stays, with grey around it, as YOLO is trained.

    The picture grows or shrinks about its middle by one factor and is moved by shares of its sides. Boxes are cut at
    the border; what shows less than a pixel of its box, or of its mask nothing, is dropped. Landmarks follow, and those
    that leave the picture are marked as absent. What was not in the picture is category 255 of a semantic map.

    Args:
        scale: the largest factor; its logarithm is drawn evenly from those of 1 / scale to scale.
        shift: the largest share of a side.
        grey: of the border, in [0, 1].

    Raises:
        ValueError: scale below 1, or a share or grey outside [0, 1].
    """

    def __init__(self, *, scale: float = 1.5, shift: float = 0.2, grey: float = 0.5) -> None:
        super().__init__()
        if scale < 1 or not 0 <= shift <= 1 or not 0 <= grey <= 1:
            raise ValueError(f"expected scale >= 1, shift and grey in [0, 1], got {scale}, {shift} and {grey}")
        self.scale, self.shift, self.grey = scale, shift, grey

    def forward(self, image: Any, target: Mapping[str, Any] | None = None) -> Any:
        draws = torch.rand(3) * 2 - 1
        height, width = image.shape[-2:]
        factor = float(self.scale ** draws[0])
        by = [round(float(draws[1]) * self.shift * width), round(float(draws[2]) * self.shift * height)]
        place: dict[str, Any] = {"angle": 0.0, "translate": by, "scale": factor, "shear": [0.0, 0.0]}
        grey = self.grey if image.is_floating_point() else round(self.grey * 255)
        moved = F.affine(image, **place, interpolation=InterpolationMode.BILINEAR, fill=[float(grey)])
        if target is None:
            return moved
        found = dict(target)
        for key, outside in (("masks", 0.0), ("semantic", 255.0)):
            if key in target and target[key].numel():
                found[key] = F.affine(target[key], **place, fill=[outside])
        middle = target["boxes"].new_tensor([width / 2, height / 2])
        offset = middle.new_tensor(by) + middle * (1 - factor)
        boxes = target["boxes"].as_subclass(torch.Tensor) * factor + offset.repeat(2)
        boxes = clip_to(boxes[None], (height, width))[0]
        left = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        if "masks" in found:
            left &= (found["masks"].as_subclass(torch.Tensor) > 0).flatten(1).any(1)
        if "keypoints" in target:
            points, seen = target["keypoints"].split([2, 1], -1)
            points = points * factor + offset
            inside = ((points >= 0) & (points < 2 * middle)).all(-1, keepdim=True)
            found["keypoints"] = torch.cat([points, seen], -1) * (inside & (seen > 0))
        found["boxes"] = tv_tensors.wrap(boxes, like=target["boxes"])
        return moved, _with_rows(found, left)


#: What speaks of the whole image.
_NOT_PER_BOX = ("image_labels", "has_boxes", "semantic")


def _with_rows(target: Mapping[str, Any], left: torch.Tensor) -> dict[str, Any]:
    """The target of the boxes that are ``left`` (L,) alone."""
    return {
        key: value if key in _NOT_PER_BOX else tv_tensors.wrap(value.as_subclass(torch.Tensor)[left], like=value)
        for key, value in target.items()
    }
