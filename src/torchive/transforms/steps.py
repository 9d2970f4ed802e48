"""The named augmentations of each task. Boxes and masks follow the image, by torchvision's typed tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2

#: Names that a recipe may list under ``augment``, by task: from the image's size to the augmentation.
_COMMON: dict[str, Callable[[int | None], nn.Module]] = {
    "flip": lambda size: v2.RandomHorizontalFlip(0.5),
    "vflip": lambda size: v2.RandomVerticalFlip(0.5),
    "light": lambda size: v2.ColorJitter(brightness=0.2, contrast=0.2),
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
    "detection": {**_COMMON, "iou_crop": lambda size: RandomIoUCrop()},
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
    centre is
    outside are dropped, the others are cut. An image without boxes is left as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.crop = v2.RandomIoUCrop()
        self.clean = v2.SanitizeBoundingBoxes(min_size=1.0, labels_getter=_per_box)

    def forward(self, image: Any, target: Mapping[str, Any]) -> Any:
        if len(target["boxes"]) == 0:
            return image, target
        return self.clean(*self.crop(image, target))


#: What loses its rows by itself, and what speaks of the whole image.
_NOT_PER_BOX = ("boxes", "masks", "image_labels", "has_boxes", "semantic")


def _per_box(inputs: Any) -> tuple[torch.Tensor, ...]:
    """The plain tensors that have a row for each box and must lose the rows of dropped boxes."""
    target = next(part for part in inputs if isinstance(part, dict))
    return tuple(value for key, value in target.items() if key not in _NOT_PER_BOX)
