"""Reading image files: a bad one gives a fault of a known kind, and none can exhaust the memory or run code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from torchive.data.faults import DataError

#: File suffixes that are taken for images.
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
#: Images of more pixels are never decoded (Pillow's own limit).
MAX_PIXELS = 89_478_485
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
_CUT = ("truncat", "unrecognized data stream", "premature", "broken", "unexpected end", "not enough", "not large")


class ImageFault(DataError):
    """An image that cannot be read; ``kind`` is one of ``faults.KINDS``."""

    def __init__(self, path: Path, kind: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.kind, self.message = kind, message


def is_image(path: Path) -> bool:
    """Whether a file's name says that it is an image."""
    return path.suffix.lower() in SUFFIXES


def read_image(path: Path | str) -> Tensor:
    """An image file as uint8 (3, H, W), turned as its EXIF orientation says; 16 bits become 8, alpha is dropped.

    Raises:
        ImageFault: the file is missing, empty, truncated, too large or not an image.
    """
    with _opened(Path(path)) as picture:
        pixels = np.array(_eight_bits(ImageOps.exif_transpose(picture)).convert("RGB"))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_mask(path: Path | str) -> Tensor:
    """A mask file as int64 (H, W): its pixel values, or palette indices, as they are.

    Raises:
        ImageFault: as ``read_image``, or the file has several channels.
    """
    path = Path(path)
    with _opened(path) as picture:
        if picture.mode not in ("1", "L", "P", "I;16", "I"):
            message = f"a mask holds one index for each pixel, this file has mode {picture.mode}"
            raise ImageFault(path, "unreadable", message)
        return torch.from_numpy(np.array(picture).astype(np.int64))


def read_ids(path: Path | str) -> Tensor:
    """A picture of segment ids as int64 (H, W): red + 256 green + 65,536 blue, or its only channel as it is.

    Raises:
        ImageFault: as ``read_image``.
    """
    with _opened(Path(path)) as picture:
        if picture.mode in ("L", "I;16", "I"):
            return torch.from_numpy(np.array(picture).astype(np.int64))
        pixels = np.array(picture.convert("RGB")).astype(np.int64)  # (H, W, 3)
    return torch.from_numpy(pixels @ np.array([1, 256, 65536]))


def _eight_bits(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.max(initial=0) > 255:
            values = values.clip(0, 65535) // 257
        return Image.fromarray(values.astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("images of 32-bit floats are not read; convert them to 8 or 16 bits")
    return picture.convert("RGBA") if picture.mode == "P" else picture


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open and wholly decoded picture; whatever Pillow raises becomes an ImageFault."""
    head = _head(path)
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                message = f"{width} x {height} pixels; at most {MAX_PIXELS} are loaded"
                raise ImageFault(path, "bomb", message)
            picture.load()
            yield picture
    except ImageFault:
        raise
    except Image.DecompressionBombError as error:
        raise ImageFault(path, "bomb", "more pixels than can be loaded safely") from error
    except UnidentifiedImageError as error:
        if any(head.startswith(magic) for magic in _MAGIC):
            raise ImageFault(path, "truncated", "the file ends or breaks within its header") from error
        raise ImageFault(path, "unreadable", f"not an image of a known format ({', '.join(_FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        text = f"{error}" or type(error).__name__
        cut = any(word in text.lower() for word in _CUT) or _cut_riff(path, head)
        kind = "truncated" if cut else "unreadable"
        raise ImageFault(path, kind, text) from error


def _head(path: Path) -> bytes:
    try:
        if not path.is_dir() and path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ImageFault(path, "unreadable", "a pipe or a device, not a file")
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError as error:
        raise ImageFault(path, "missing", "no such file") from error
    except OSError as error:
        raise ImageFault(path, "unreadable", f"{error.strerror}") from error
    except ValueError as error:
        if isinstance(error, ImageFault):
            raise
        raise ImageFault(path, "missing", f"not a file's name: {error}") from error
    if not head:
        raise ImageFault(path, "zero-byte", "the file is empty")
    return head


def _cut_riff(path: Path, head: bytes) -> bool:
    """Whether a WebP file is shorter than its own header says; its decoder does not tell."""
    return head.startswith(b"RIFF") and int.from_bytes(head[4:8], "little") + 8 > path.stat().st_size


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of an image tensor."""
    return int(image.shape[-2]), int(image.shape[-1])
