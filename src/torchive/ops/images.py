"""Lists of images to one batch, for detectors: resized to one size, or padded to a common one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchive.ops.boxes import size_tensor


def check_images(images: Tensor | Sequence[Tensor], channels: int) -> None:
    """Refuse what is neither a list of images (C, H, W) nor a stacked (N, C, H, W) tensor.

    Raises:
        TypeError: neither, or images that are not floating point.
        ValueError: another rank or channel count, or no image.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != channels or images.shape[0] == 0:
            raise ValueError(f"expected (N, {channels}, H, W) or a list of images, got shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"expected floating-point images, got {images.dtype}")
        return
    if not isinstance(images, list | tuple):
        raise TypeError(f"expected a tensor or a list of tensors, got {type(images).__name__}")
    if not images:
        raise ValueError("expected at least one image, got an empty list")
    for image in images:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise TypeError(f"expected floating-point images, got {getattr(image, 'dtype', type(image).__name__)}")
        if image.ndim != 3 or image.shape[0] != channels:
            raise ValueError(f"expected images ({channels}, H, W), got shape {tuple(image.shape)}")


def image_sizes(images: Tensor | Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each image."""
    if isinstance(images, Tensor):
        return [(int(images.shape[-2]), int(images.shape[-1]))] * len(images)
    return [(int(image.shape[-2]), int(image.shape[-1])) for image in images]


def stack_resized(images: Tensor | Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Images of any sizes to (N, C, *size), bilinear; nothing is copied where a batch has that size already."""
    if isinstance(images, Tensor):
        return images if tuple(images.shape[-2:]) == size else _resize(images, size)
    return torch.stack([i if tuple(i.shape[-2:]) == size else _resize(i[None], size)[0] for i in images])


def letterbox(images: Tensor | Sequence[Tensor], size: tuple[int, int], *, value: float = 0.5) -> Tensor:
    """Images of any sizes to (N, C, *size), their sides in proportion, centred on grey; boxes move by ``fit_boxes``."""
    if isinstance(images, Tensor):
        inside = letterbox_place((int(images.shape[-2]), int(images.shape[-1])), size)
        return _framed(images, inside, size, value)
    places = [letterbox_place(place, size) for place in image_sizes(images)]
    return torch.cat([_framed(i[None], place, size, value) for i, place in zip(images, places, strict=True)])


def letterbox_place(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height, in whole pixels, of an image (height, width) in a frame ``size``."""
    scale = min(size[0] / image[0], size[1] / image[1])
    height, width = max(round(image[0] * scale), 1), max(round(image[1] * scale), 1)
    return (size[1] - width) // 2, (size[0] - height) // 2, width, height


def fit_boxes(boxes: Tensor, image: tuple[int, int], size: tuple[int, int], *, back: bool = False) -> Tensor:
    """Boxes (..., 4) of an image (height, width), xyxy in pixels, as ``letterbox`` moves them; ``back`` undoes it."""
    left, top, width, height = letterbox_place(image, size)
    scale = boxes.new_tensor([width / image[1], height / image[0]] * 2)
    shift = boxes.new_tensor([left, top] * 2)
    return (boxes - shift) / scale if back else boxes * scale + shift


def _framed(batch: Tensor, place: tuple[int, int, int, int], size: tuple[int, int], value: float) -> Tensor:
    left, top, width, height = place
    if tuple(batch.shape[-2:]) != (height, width):
        batch = _resize(batch, (height, width))
    border = (left, size[1] - width - left, top, size[0] - height - top)
    return F.pad(batch, border, value=value) if any(border) else batch


def pad_batch(images: Tensor | Sequence[Tensor], divisor: int) -> Tensor:
    """Images of any sizes to (N, C, H, W), zeros at the right and below; H and W are multiples of ``divisor``."""
    if isinstance(images, Tensor):
        height, width = images.shape[-2:]
        # without `%`, of which the compiler makes sizes that a pyramid's upsampling cannot be compiled with
        right, below = ((side + divisor - 1) // divisor * divisor - side for side in (width, height))
        if torch.compiler.is_compiling() or right or below:  # an exported file must pad whatever comes
            return F.pad(images, (0, right, 0, below))
        return images
    height = max(-(-i.shape[-2] // divisor) * divisor for i in images)
    width = max(-(-i.shape[-1] // divisor) * divisor for i in images)
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for k, image in enumerate(images):
        batch[k, :, : image.shape[-2], : image.shape[-1]] = image
    return batch


def batch_images(
    images: Tensor | Sequence[Tensor], *, shorter: int | None = None, divisor: int = 32
) -> tuple[Tensor, Tensor]:
    """Images of any sizes to a padded batch (N, C, H, W), and their sizes (N, 2), height and width, in it.

    Args:
        images: a list of (C, H, W), or (N, C, H, W).
        shorter: side to which the shorter one is resized, the longer at most 5/3 of it; as they are if None.
        divisor: H and W are multiples of it.
    """
    if shorter is not None:
        if isinstance(images, Tensor):
            images = _resize_shorter(images, shorter)
        else:
            images = [_resize_shorter(image[None], shorter)[0] for image in images]
    first = images if isinstance(images, Tensor) else images[0]
    dtype = torch.promote_types(first.dtype, torch.float32)  # half precision does not hold pixel numbers
    if isinstance(images, Tensor):
        height, width = images.shape[2:]
        sizes = torch.tensor([[height, width]], device=images.device, dtype=dtype).expand(images.shape[0], 2)
    else:
        sizes = torch.tensor(image_sizes(images), device=first.device, dtype=dtype)
    return pad_batch(images, divisor), sizes


def _resize_shorter(images: Tensor, side: int) -> Tensor:
    short, long = min(images.shape[2:]), max(images.shape[2:])
    scale = min(side / short, round(side * 5 / 3) / long)
    if scale == 1:
        return images
    return F.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False, recompute_scale_factor=True)


def scale_targets(
    targets: Sequence[dict[str, Tensor]], sizes: Tensor, originals: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """Targets with their boxes moved from images of ``originals`` (height, width) to those of ``sizes`` (N, 2).

    Everything else stays as it is; masks are read where they lie.
    """
    scaled = []
    for target, size, original in zip(targets, sizes, originals, strict=True):
        ratio = (size / size.new_tensor(original))[[1, 0, 1, 0]]
        scaled.append({**target, "boxes": target["boxes"].to(sizes.dtype) * ratio})
    return scaled


def box_factors(size: Tensor, original: tuple[int, int]) -> Tensor:
    """What boxes (..., 4) in an image of the batch of ``size`` (2,) are multiplied by for one of ``original``.

    Both are height and width; the result is (4,), for x and y alike.
    """
    return (size.new_tensor(original) / size)[[1, 0, 1, 0]]


def side_factors(sizes: Tensor, original: Sequence[int]) -> Tensor:
    """``box_factors`` (N, 4) of images in a batch of ``sizes`` (N, 2), all of one ``original``; for graphs, too."""
    return (size_tensor(original, sizes) / sizes)[:, [1, 0, 1, 0]]


#: Keys of a target with one row for each object; ``depth`` is read with the crowds in.
_ROWS = ("boxes", "labels", "masks", "iscrowd", "area", "keypoints", "pair_id", "style", "source", "rotated")


def training_targets(
    targets: Sequence[dict[str, Tensor]], count: int, num_classes: int, *, crowds: bool = False
) -> list[dict[str, Tensor]]:
    """Targets that a detector learns from: one dict per image, boxes (L, 4) with area, labels (L,) int64 from 1 to K.

    Objects with ``iscrowd`` are nobody's to find and are left out; where they have masks, ``ignored`` (H, W) bool are
    their pixels.

    Args:
        targets: as a user gives them, see ``torchive.structures.batch``.
        count: number of images.
        num_classes: K.
        crowds: leave the crowds in.

    Raises:
        ValueError: naming the image and what is wrong.
    """
    if len(targets) != count:
        raise ValueError(f"expected {count} targets, one for each image, got {len(targets)}")
    found = []
    for k, target in enumerate(targets):
        for key in ("boxes", "labels"):
            if key not in target:
                raise ValueError(f"target {k}: expected boxes and labels, got {', '.join(target) or 'nothing'}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"target {k}: expected boxes (L, 4) and labels (L,), got {tuple(boxes.shape)} and {tuple(labels.shape)}"
            )
        if len(labels) and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise ValueError(f"target {k}: expected int64 labels, got {labels.dtype}")
        found.append({**target, "labels": labels.long()})
    if found:
        _check_values(found, num_classes)
    return found if crowds else [without_crowds(target) for target in found]


def _check_values(targets: Sequence[dict[str, Tensor]], num_classes: int) -> None:
    """One look at all boxes and labels; the culprit is sought only where there is one."""
    boxes, labels = (torch.cat([target[key] for target in targets]) for key in ("boxes", "labels"))
    wrong = (boxes[:, 2:] <= boxes[:, :2]).any() | ((labels < 1) | (labels > num_classes)).any() | boxes.isnan().any()
    if not bool(wrong):
        return
    for k, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        flat = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
        if bool(flat.any()):
            raise ValueError(f"target {k}: boxes must have width and height above zero, got {boxes[flat][0].tolist()}")
        if len(labels) and (labels.min() < 1 or labels.max() > num_classes):
            raise ValueError(
                f"target {k}: labels must lie in 1 to {num_classes}, got {int(labels.min())} to {int(labels.max())}"
            )


def without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """One of ``training_targets``, which had the crowds left in, without them."""
    crowd = target["iscrowd"].bool() if "iscrowd" in target else None
    if crowd is None or not bool(crowd.any()):
        return target
    kept = {key: value[~crowd] if key in _ROWS and len(value) == len(crowd) else value for key, value in target.items()}
    if "masks" in target:
        kept["ignored"] = (target["masks"][crowd] != 0).any(0)
    return kept


def _resize(batch: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(batch, size=size, mode="bilinear", align_corners=False)
