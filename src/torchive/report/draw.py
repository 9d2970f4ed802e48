"""Pictures of results: an image and a prediction in, an image with the result drawn out. Nothing is read or written.

Images are (C, H, W), uint8 or float in [0, 1], one or three channels; results are uint8 (3, H', W').
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from torchive.report.fonts import font_for
from torchive.structures import Classification, Detections, Panoptic, Prediction

#: Colours that stay apart for colour-blind eyes (Okabe and Ito), then more by the golden angle.
_FIRST = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
_MANY = 12
_Place = tuple[float, float, float, float]
_PAPER, _INK = (250, 250, 250), (25, 25, 25)


def colour(index: int) -> tuple[int, int, int]:
    """The colour of a class."""
    if index < len(_FIRST):
        return _FIRST[index]
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.65, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_prediction(
    image: Tensor,
    prediction: Prediction,
    classes: Sequence[str],
    *,
    target: Any = None,
    threshold: float = 0.3,
    smallest: int = 256,
) -> Tensor:
    """The image with the prediction drawn, and the target where one is given.

    Args:
        classes: names; of detections without the background, then those of stuff; of segmentations with it.
        target: of the same sample, as ``structures/batch.py`` says.
        threshold: detections below this score are left out.
        smallest: an image whose longer side is shorter is enlarged to it.
    """
    if isinstance(prediction, Classification):
        return draw_class(image, prediction, classes, target=target, smallest=smallest)
    if isinstance(prediction, Detections):
        kept = prediction.scores >= threshold
        return draw_boxes(
            image,
            prediction.boxes[kept],
            prediction.labels[kept],
            classes,
            scores=prediction.scores[kept],
            masks=None if prediction.masks is None else prediction.masks[kept],
            keypoints=None if prediction.keypoints is None else prediction.keypoints[kept],
            truth=None if target is None else target["boxes"],
            stuff=None if prediction.panoptic is None else _stuff_of(prediction.panoptic),
            smallest=smallest,
        )
    return draw_regions(image, prediction.labels, classes, truth=target, smallest=smallest)


def draw_target(image: Tensor, target: Any, classes: Sequence[str], *, smallest: int = 256) -> Tensor:
    """The image with its target drawn: the class's name, boxes and masks, or regions; None draws nothing."""
    if target is None:
        return _array(_enlarged(image, smallest)[0])
    if isinstance(target, dict):
        masks, stuff = target.get("masks"), target.get("semantic")
        if stuff is not None and masks is not None:
            stuff = torch.where(masks.bool().any(0), 0, stuff)
        return draw_boxes(
            image, target["boxes"], target["labels"], classes, masks=masks, stuff=stuff, smallest=smallest
        )
    if isinstance(target, Tensor) and target.ndim == 2:
        return draw_regions(image, target, classes, smallest=smallest)
    return _array(_banner(_enlarged(image, smallest)[0], [(_name(classes, int(target)), None)]))


def draw_class(
    image: Tensor, prediction: Classification, classes: Sequence[str], *, target: Any = None, smallest: int = 256
) -> Tensor:
    """A banner below the image with the class and its score; with a target, whether it is right."""
    label = prediction.label
    lines: list[tuple[str, tuple[int, int, int] | None]] = [
        (f"{_name(classes, label)}  {float(prediction.scores[label]):.2f}", None)
    ]
    if target is not None:
        right = int(target) == label
        lines[0] = (lines[0][0], (0, 130, 90) if right else (190, 60, 0))
        if not right:
            lines.append((f"is: {_name(classes, int(target))}", None))
    return _array(_banner(_enlarged(image, smallest)[0], lines))


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    scores: Tensor | None = None,
    masks: Tensor | None = None,
    keypoints: Tensor | None = None,
    truth: Tensor | None = None,
    stuff: Tensor | None = None,
    smallest: int = 256,
) -> Tensor:
    """Boxes (L, 4) with labels from 1 and scores, masks (L, H, W) as a tint, key points (L, P, 2) as dots, true boxes
    as thin white lines; categories (H, W) of stuff as a tint with a legend, 0 and 255 stay clear.

    Of many boxes those too small for name and score get the name alone, or nothing, and so do those whose words would
    cover those of a better one; of one class none gets a score.
    """
    picture, scale = _enlarged(image, smallest)
    picture, legend = (picture, []) if stuff is None else _with_regions(picture, stuff, classes, first=1)
    if masks is not None and len(masks):
        layers = torch.stack([masks.bool() & (labels == label)[:, None, None] for label in labels.unique()])
        for label, layer in zip(labels.unique().tolist(), layers.any(1), strict=True):
            picture = _tinted(picture, layer, colour(label - 1))
    draw = ImageDraw.Draw(picture)
    width = max(round(max(picture.size) / 300), 1)
    for box in [] if truth is None else (truth * scale).tolist():
        draw.rectangle(box, outline=(255, 255, 255), width=max(width // 2, 1))
    font = font_for(" ".join(classes), max(min(picture.size) // 28, 11))
    best_first = list(range(len(boxes))) if scores is None else scores.argsort(descending=True).tolist()
    crowded, corners, tints = len(boxes) > _MANY, (boxes * scale).tolist(), [colour(k - 1) for k in labels.tolist()]
    for index in reversed(best_first):
        draw.rectangle(corners[index], outline=tints[index], width=width)
        for x, y in [] if keypoints is None else (keypoints[index] * scale).tolist():
            if x or y:  # zeros: this class has no such point
                draw.ellipse((x - width, y - width, x + width, y + width), fill=tints[index])
    taken: list[_Place] = []
    for index in best_first if crowded else reversed(best_first):
        box = corners[index]
        name = [] if len(classes) == 1 else [_name(classes, int(labels[index]) - 1)]
        score = [] if scores is None or (not name and crowded) else [f"{float(scores[index]):.2f}"]
        room = 1.3 * (box[2] - box[0]) if crowded else picture.width
        for words in (" ".join([*name, *score]), "".join(name)):
            if words and font.getlength(words) <= room:
                place = _tag_place(draw, box, words, font)
                if not (crowded and any(_meet(place, other) for other in taken)):
                    _tag(draw, place, words, tints[index], font)
                    taken.append(place)
                    break
    count = f"{classes[0] if len(classes) == 1 else 'objects'}: {len(boxes)}"
    return _array(_banner(picture, [(count, None), *legend]))


def draw_regions(
    image: Tensor, labels: Tensor, classes: Sequence[str], *, truth: Tensor | None = None, smallest: int = 256
) -> Tensor:
    """Classes (H, W) as a tint with outlines, and a legend of those present; class 0 and 255 stay clear.

    With ``truth`` (H, W) the true regions stand as white outlines.
    """
    picture, _ = _enlarged(image, smallest)
    picture, lines = _with_regions(picture, labels, classes)
    for k in [] if truth is None else [k for k in truth.unique().tolist() if 0 < k < 255]:
        picture = _tinted(picture, truth == k, (255, 255, 255), share=0.0)
    return _array(_banner(picture, lines or [("nothing found", None)]))


def grid(pictures: Sequence[Tensor], columns: int = 4, gap: int = 6) -> Tensor:
    """Pictures (3, H, W) of any sizes in rows on light paper; each row is as high as its highest."""
    if not pictures:
        raise ValueError("a grid needs at least one picture, got none")
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(sum(p.shape[2] + gap for p in row) for row in rows) + gap
    height = sum(max(p.shape[1] for p in row) + gap for row in rows) + gap
    sheet = torch.tensor(_PAPER, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    top = gap
    for row in rows:
        left = gap
        for picture in row:
            sheet[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
            left += picture.shape[2] + gap
        top += max(p.shape[1] for p in row) + gap
    return sheet


def to_picture(image: Tensor) -> Image.Image:
    """A Pillow picture of an image tensor."""
    if image.is_floating_point():
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    if image.shape[0] == 1:
        image = image.expand(3, -1, -1)
    return Image.fromarray(image[:3].permute(1, 2, 0).contiguous().cpu().numpy())


def _array(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _enlarged(image: Tensor, smallest: int) -> tuple[Image.Image, float]:
    picture = to_picture(image)
    scale = max(smallest / max(picture.size), 1.0)
    if scale > 1:
        size = round(picture.width * scale), round(picture.height * scale)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return picture, scale


def _tinted(picture: Image.Image, where: Tensor, tint: tuple[int, int, int], share: float = 0.45) -> Image.Image:
    """Covered in part by a colour, with its outline in full."""
    mask = Image.fromarray(where.cpu().numpy() * np.uint8(255)).resize(picture.size, Image.Resampling.NEAREST)
    inside = np.asarray(mask) > 0
    shrunk = inside.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            shrunk &= np.roll(inside, step, axis)
    pixels = np.array(picture, dtype=np.float32)
    pixels[inside] = (1 - share) * pixels[inside] + share * np.array(tint, dtype=np.float32)
    pixels[inside & ~shrunk] = tint
    return Image.fromarray(pixels.round().astype(np.uint8))


def _with_regions(
    picture: Image.Image, labels: Tensor, classes: Sequence[str], *, first: int = 0
) -> tuple[Image.Image, list[tuple[str, tuple[int, int, int] | None]]]:
    """The picture with a tint for each category (H, W) but 0 and 255, and lines for six of them; the names count from
    ``first``."""
    present = [k for k in labels.unique().tolist() if 0 < k < 255]
    for k in present:
        picture = _tinted(picture, labels == k, colour(k - 1))
    shares = {k: float((labels == k).double().mean()) for k in present[:6]}
    return picture, [(f"{_name(classes, k - first)} {share:.0%}", colour(k - 1)) for k, share in shares.items()]


def _stuff_of(panoptic: Panoptic) -> Tensor:
    """The category (H, W) of each pixel of stuff; 0 elsewhere."""
    table = torch.zeros(max((segment.id for segment in panoptic.segments), default=0) + 1, dtype=torch.int64)
    for segment in panoptic.segments:
        table[segment.id] = 0 if segment.isthing else segment.category
    return table[panoptic.ids.long().cpu()]


def _banner(picture: Image.Image, lines: Sequence[tuple[str, tuple[int, int, int] | None]]) -> Image.Image:
    """Lines of text below the picture, each with a square of its colour where it has one."""
    size = max(min(picture.width // 18, 22), 11)
    high = round(size * 1.5)
    sheet = Image.new("RGB", (picture.width, picture.height + high * len(lines) + size // 3), _PAPER)
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    for index, (text, tint) in enumerate(lines):
        top = picture.height + size // 4 + index * high
        left = size // 2
        if tint is not None:
            draw.rectangle((left, top + size // 4, left + size * 3 // 4, top + size), fill=tint)
            left += size + size // 4
        draw.text((left, top), _fitting(text, size, picture.width - left), fill=_INK, font=font_for(text, size))
    return sheet


def _fitting(text: str, size: int, width: int) -> str:
    font = font_for(text + "…", size)
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _tag_place(draw: ImageDraw.ImageDraw, box: Sequence[float], text: str, font: Any) -> _Place:
    """Left, top, right and bottom of a label above the box, or inside where there is no room."""
    width, height = font.getlength(text) + 4, font.size + 3
    left = max(min(box[0], draw.im.size[0] - width), 0.0)
    top = box[1] - height if box[1] >= height else box[1]
    return left, top, left + width, top + height


def _meet(one: _Place, other: _Place) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _tag(draw: ImageDraw.ImageDraw, place: _Place, text: str, tint: tuple[int, int, int], font: Any) -> None:
    """The label on its colour."""
    left, top = place[:2]
    draw.rectangle(place, fill=tint)
    bright = 0.3 * tint[0] + 0.59 * tint[1] + 0.11 * tint[2] > 130
    draw.text((left + 2, top), text, fill=_INK if bright else _PAPER, font=font)


def _name(classes: Sequence[str], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else f"class {index}"
