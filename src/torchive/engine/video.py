"""Predictions on a video: the same video with the results drawn, and one JSON file with a list of frames.

Frames are read, predicted and written a few at a time, so that length is no matter. PyAV, which comes with the extra
``torchive[video]``, reads and writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchive.data.faults import DataError
from torchive.engine.checkpoint import write_atomically
from torchive.engine.evaluate import evaluating
from torchive.engine.predictions import predict_images, values_of
from torchive.engine.run import LoadedRun

SUFFIXES = (".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_GROUP = 16
#: What a video is written with: the first that this PyAV has.
_CODECS = ("libx264", "libopenh264", "mpeg4")


def is_video(path: Path) -> bool:
    """Whether a file's name says that it is a video."""
    return path.suffix.lower() in SUFFIXES


def predict_video(loaded: LoadedRun, path: Path, stem: Path, out: Path, *, threshold: float) -> dict[str, Any]:
    """Write ``STEM.mp4`` and ``STEM.json`` into ``out``; returns what the list of predictions holds of them.

    Raises:
        DataError: the file is not a video that can be read to its end, the model refuses its frames, or PyAV is not
            installed.
    """
    from torchive.report.draw import draw_prediction

    target = out / stem
    target.parent.mkdir(parents=True, exist_ok=True)
    picture, partial = target.with_name(f"{target.name}.mp4"), target.with_name(f".{target.name}.mp4")
    frames: list[dict[str, Any]] = []
    try:
        with _Writer(partial) as writer, evaluating(loaded.model):
            reading = _frames(path)
            while group := list(islice(reading, _GROUP)):
                found = predict_images(loaded, [image for image, _, _ in group])
                for (image, time, rate), one in zip(group, found, strict=True):
                    writer.add(draw_prediction(image, one, loaded.names, threshold=threshold, smallest=1), rate)
                    frames.append({"time": round(time, 4), **values_of(one, loaded.names)})
            if not frames:
                raise DataError(f"{path}: holds no frames")
        partial.replace(picture)
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    height, width = image.shape[-2:]
    values = {"source": str(path), "width": width, "height": height, "task": loaded.recipe.task}
    values |= {"classes": list(loaded.classes), "picture": picture.relative_to(out).as_posix()}
    values |= {"frames_per_second": float(rate)}
    beside = target.with_name(f"{target.name}.json")
    write_atomically(beside, json.dumps(values | {"frames": frames}, indent=1, ensure_ascii=False).encode())
    return values | {"frames": len(frames)}


def _av(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise DataError(f"{path}: reading videos needs PyAV: pip install 'torchive[video]'") from None
    return av


def _frames(path: Path) -> Iterator[tuple[Tensor, float, Fraction]]:
    """Each frame as uint8 (3, H, W), turned as the file says, its time in seconds, and the frames per second."""
    av = _av(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = Fraction(stream.average_rate or 25)
            for index, frame in enumerate(container.decode(stream)):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), k=(frame.rotation // 90) % 4)
                time = frame.time if frame.time is not None else float(index / rate)
                yield torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), time, rate
    except (av.error.FFmpegError, OSError) as error:
        reason = "does not exist" if not path.exists() else f"cannot be read as a video: {error.strerror or error}"
        raise DataError(f"{path}: {reason}") from None


class _Writer:
    """An MP4 file of the first frame's size; later frames of another size are cut or continued."""

    def __init__(self, path: Path) -> None:
        self.av, self.path = _av(path), path
        self.container: Any = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self.container is not None:
            if error[0] is None:
                self.container.mux(self.stream.encode())
            self.container.close()

    def add(self, image: Tensor, rate: Fraction) -> None:
        height, width = image.shape[-2:]
        if self.container is None:
            codec = next(name for name in _CODECS if name in self.av.codecs_available)
            self.container = self.av.open(str(self.path), "w", format="mp4")
            self.stream = self.container.add_stream(codec, rate=rate)
            self.stream.width, self.stream.height = (
                width + width % 2,
                height + height % 2,
            )  # the format wants even sides
            self.stream.pix_fmt = "yuv420p"
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        more = ((0, max(self.stream.height - height, 0)), (0, max(self.stream.width - width, 0)), (0, 0))
        pixels = np.pad(pixels, more, mode="edge")[: self.stream.height, : self.stream.width]
        frame = self.av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self.container.mux(self.stream.encode(frame))
