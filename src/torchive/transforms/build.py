"""One transform from names: resize, augment, normalise.

A pipeline has two halves. ``prepare`` resizes and fixes the channels, draws nothing and gives uint8, so that a loader
may keep its result. ``finish`` augments, cuts, and turns uint8 into float32. Training and prediction use the same
fixed mean and deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from torchive.structures import Sample
from torchive.transforms.steps import AUGMENTATIONS, CUTTING, DEFAULTS, RandomIoUCrop

#: ImageNet's statistics, which pretrained networks expect; for one channel their means over the three colours.
_COLOUR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = ((0.449,), (0.226,))
_AS_CLASSIFICATION = ("embedding", "selfsupervised")
_MARGIN = 1.125  # a random crop is cut from an image this much larger
_VIEW_MARGIN = 1.5  # and views from one this much larger
_MOST = 89_478_485  # pixels after resizing, as many as are read from a file

Augment = str | Sequence[Any] | Callable[[Tensor], Tensor]


def normalisation(task: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel that ``build`` uses.

    ImageNet's, so that pretrained networks fit; none (0 and 1) for detection, where images are in [0, 1] as
    torchvision's detectors take them. Theirs normalise inside, the detectors of this archive do not: the backbone sees
    what went in, and a trained one (``torchive.engine.pretrained.PretrainedFeatures``) normalises for itself.
    """
    if task == "detection":
        return (0.0,) * channels, (1.0,) * channels
    if channels == 3:
        return _COLOUR
    return _GREY[0] * channels, _GREY[1] * channels


def denormalise(image: Tensor, task: str) -> Tensor:
    """Images (..., C, H, W) back in [0, 1], for pictures."""
    mean, deviation = normalisation(task, image.shape[-3])
    shape = (-1, 1, 1)
    return (image * image.new_tensor(deviation).view(shape) + image.new_tensor(mean).view(shape)).clamp(0, 1)


def build(
    task: str,
    *,
    image_size: int | None,
    train: bool,
    channels: int | None = None,
    augment: Augment = "default",
) -> Pipeline:
    """The transform of a task.

    - classification: the shorter side becomes ``image_size`` and the middle square is cut out; in training a random
      square is cut out of an image 1.125 times as large.
    - segmentation: image and mask become ``image_size`` squared (the sides' ratio is not kept); in training cut as
      above.
    - detection: the longer side becomes ``image_size``; the ratio is kept, boxes and masks follow. What an augmentation
      made longer is made as long again.
    - embedding: as classification.
    - selfsupervised: as classification; ``augment`` may be a callable that makes the views.

    Args:
        task: classification, detection, segmentation, embedding or selfsupervised.
        image_size: pixels of the side; None leaves the images as they are.
        train: whether to augment.
        channels: 1 or 3 turns colour into grey or grey into colour; None leaves them as they are.
        augment: "default", "none", a list of names of ``AUGMENTATIONS`` and of torchvision v2 transforms, or a
            callable from a float image (C, H, W) in [0, 1], its shorter side 1.5 times ``image_size``, to an image or
            to views (V, C, H, W), which are normalised afterwards.

    Raises:
        ValueError: an unknown task or name, or a size below 1.
    """
    if task not in (*AUGMENTATIONS, *_AS_CLASSIFICATION):
        raise ValueError(f"task must be one of {', '.join((*AUGMENTATIONS, *_AS_CLASSIFICATION))}, got {task!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels}")
    if not isinstance(augment, str) and callable(augment):
        if not train:
            return Pipeline(task, image_size, channels, (), 1.0)
        return Pipeline(task, image_size, channels, (), _VIEW_MARGIN, views=augment)
    known = "classification" if task in _AS_CLASSIFICATION else task
    named = {"default": DEFAULTS[known], "none": ()}
    names = list(named.get(augment, (augment,)) if isinstance(augment, str) else augment)
    if augment == "default" and image_size is None:
        names = [name for name in names if name not in CUTTING]
    steps = tuple(_step(known, name, image_size) for name in names)
    if not train:
        return Pipeline(task, image_size, channels, (), 1.0)
    cuts = any(isinstance(step, v2.RandomCrop | v2.RandomResizedCrop) for step in steps)
    return Pipeline(task, image_size, channels, steps, _MARGIN if cuts else 1.0)


def _step(task: str, name: Any, size: int | None) -> nn.Module:
    if isinstance(name, nn.Module):
        return name
    known = AUGMENTATIONS[task]
    if name not in known:
        close = get_close_matches(str(name), [*known, "default", "none"], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"no augmentation {name!r} for {task}; {hint}")
    return known[name](size)


class Pipeline:
    """A transform in two halves; calling it runs both. ``views`` replaces the augmentation."""

    def __init__(
        self,
        task: str,
        image_size: int | None,
        channels: int | None,
        steps: tuple[nn.Module, ...],
        margin: float,
        views: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.task, self.image_size, self.channels, self.steps, self.views = task, image_size, channels, steps, views
        self.larger = None if image_size is None else round(image_size * margin)

    def __call__(self, sample: Sample) -> Sample:
        return self.finish(self.prepare(sample))

    def prepare(self, sample: Sample) -> Sample:
        """Channels and size; uint8 stays uint8, nothing is drawn."""
        image, target = sample.image, sample.target
        if self.channels is not None and image.shape[0] != self.channels:
            image = F.rgb_to_grayscale(image) if self.channels == 1 else F.grayscale_to_rgb(image)
        if self.larger is None:
            return Sample(image, target, sample.id)
        height, width = image.shape[-2:]
        if self.task == "detection":
            scale = self.larger / max(height, width)
            size = max(round(height * scale), 1), max(round(width * scale), 1)
            if size != (height, width):
                image, target = self._resize_detection(image, target, size)
            return Sample(image, target, sample.id)
        if self.task == "segmentation":
            size = (self.larger, self.larger)
            if isinstance(target, Tensor):
                target = F.resize_mask(target[None], list(size))[0]
        else:
            scale = self.larger / min(height, width)
            size = max(round(height * scale), self.larger), max(round(width * scale), self.larger)
            if size[0] * size[1] > _MOST:
                raise ValueError(
                    f"an image of {width} x {height} would become {size[1]} x {size[0]} pixels, more than {_MOST}; "
                    "cut such a strip into parts"
                )
        if size != (height, width):
            image = F.resize_image(image, list(size), antialias=True)
        return Sample(image, target, sample.id)

    @staticmethod
    def _resize_detection(image: Tensor, target: Any, size: tuple[int, int]) -> tuple[Tensor, Any]:
        height, width = image.shape[-2:]
        image = F.resize_image(image, list(size), antialias=True)
        if target is None:
            return image, None
        target = dict(target)
        factors = target["boxes"].new_tensor([size[1] / width, size[0] / height])
        target["boxes"] = target["boxes"] * factors.repeat(2)
        if "area" in target:
            target["area"] = target["area"] * factors.prod()
        if "masks" in target:
            masks = target["masks"]
            target["masks"] = F.resize_mask(masks, list(size)) if len(masks) else masks.new_zeros((0, *size))
        if "keypoints" in target:
            target["keypoints"] = target["keypoints"] * torch.cat([factors, factors.new_ones(1)])
        if "semantic" in target:
            target["semantic"] = F.resize_mask(target["semantic"][None], list(size))[0]
        return image, target

    def finish(self, sample: Sample) -> Sample:
        """Augment, cut to size, and turn into float32."""
        image, target = sample.image, sample.target
        if self.views is not None:
            image = self.views(F.to_dtype_image(image, torch.float32, scale=True))
            return Sample(self._normalise(image), target, sample.id)
        if self.steps:
            image, target = self._augment(image, target)
            if self.task == "detection" and self.larger is not None and max(image.shape[-2:]) > self.larger:
                fitting = self.prepare(Sample(image, target, sample.id))
                image, target = fitting.image, fitting.target
        if (
            self.image_size is not None
            and self.task != "detection"
            and image.shape[-2:] != (self.image_size, self.image_size)
        ):
            image = F.center_crop_image(image, [self.image_size, self.image_size])
            if self.task == "segmentation" and isinstance(target, Tensor):
                target = F.center_crop_mask(target[None], [self.image_size, self.image_size])[0]
        image = F.to_dtype_image(image, torch.float32, scale=True)
        return Sample(self._normalise(image), target, sample.id)

    def _normalise(self, image: Tensor) -> Tensor:
        mean, deviation = normalisation(self.task, image.shape[-3])
        return image if self.task == "detection" else F.normalize_image(image, list(mean), list(deviation))

    def _augment(self, image: Tensor, target: Any) -> tuple[Tensor, Any]:
        if self.task == "detection" and target is not None:
            return self._augment_boxes(image, target)
        if self.task == "segmentation" and isinstance(target, Tensor):
            picture, mask = tv_tensors.Image(image), tv_tensors.Mask(target)
            for step in self.steps:
                picture, mask = step(picture, mask)
            return picture.as_subclass(Tensor), mask.as_subclass(Tensor)
        for step in self.steps:
            if not isinstance(step, RandomIoUCrop):
                image = step(image)
        return image, target

    def _augment_boxes(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        if "keypoints" in target:
            _refuse_moving(self.steps)
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
        typed: dict[str, Any] = {**target, "boxes": boxes}
        typed |= {key: tv_tensors.Mask(target[key]) for key in ("masks", "semantic") if key in target}
        picture: Any = tv_tensors.Image(image)
        for step in self.steps:
            picture, typed = step(picture, typed)
        plain = {key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in typed.items()}
        if "area" in plain:
            sides = plain["boxes"][:, 2:] - plain["boxes"][:, :2]
            plain["area"] = plain["masks"].flatten(1).sum(1).float() if "masks" in plain else sides.prod(1)
        return picture.as_subclass(Tensor), plain


def _refuse_moving(steps: Sequence[nn.Module]) -> None:
    """Landmarks stay where they are: no step may move the picture under them."""
    for step in steps:
        if isinstance(step, RandomIoUCrop) or "_geometry" in type(step).__module__:
            raise ValueError(
                f"{type(step).__name__} does not move landmarks, nor does it know left from right; for data with "
                "landmarks list others, as augment: [light]"
            )
