"""Trained weights: they are read right, and a part that starts as the identity leaves what they say."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from torchive.catalogue.matrix import recorded_matrix
from torchive.data.archives import members
from torchive.data.faults import DataError
from torchive.data.packages import obtain, wheel
from torchive.data.weights import load_weights, weights_info
from torchive.engine.convert import convert
from torchive.engine.pretrained import PretrainedFeatures, pretrained_network

NAME = "efficientnet_lite0"
#: Twenty photographs whose names end in their ImageNet class.
PHOTOGRAPHS = wheel(
    "foolbox",
    "3.3.4",
    "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
    1.7,
)
KEEP = [m for m, row in recorded_matrix().items() if row["EfficientNet-Lite0"].get("keeps")]


@pytest.fixture(scope="module")
def photographs() -> tuple[Tensor, Tensor]:
    info = weights_info(NAME)
    images, labels = [], []
    for name, content in members(obtain(PHOTOGRAPHS), lambda n: "/imagenet_" in n and n.endswith(".jpg")):
        image = Image.open(io.BytesIO(content)).convert("RGB").resize((info.size, info.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
        images.append((pixels - info.mean) / info.std)
        labels.append(int(name.rpartition("_")[2].removesuffix(".jpg")))
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="module")
def plain(photographs: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return pretrained_network(NAME)(photographs[0])


def test_the_weights_know_the_photographs(photographs: tuple[Tensor, Tensor], plain: Tensor) -> None:
    labels = photographs[1]
    assert len(labels) == 20
    assert int((plain.argmax(1) == labels).sum()) >= 17
    assert int((plain.topk(5).indices == labels[:, None]).any(1).sum()) >= 19


def test_a_known_part_keeps_the_function() -> None:
    assert "gcnet" in KEEP


@pytest.mark.parametrize("method", KEEP)
def test_parts_that_start_as_the_identity_keep_what_was_learnt(
    method: str, photographs: tuple[Tensor, Tensor], plain: Tensor
) -> None:
    model = pretrained_network(NAME)
    assert convert(model, method).changes
    with torch.no_grad():
        found = model.eval()(photographs[0])
    assert torch.allclose(found, plain, rtol=0, atol=1e-5)
    assert torch.equal(found.argmax(1), plain.argmax(1))


def test_features_of_a_detector_are_the_networks_own(photographs: tuple[Tensor, Tensor]) -> None:
    features, info = PretrainedFeatures(weights=NAME), weights_info(NAME)
    x = photographs[0][:2]
    with torch.no_grad():
        maps = features.train()(x * info.std + info.mean)  # images in [0, 1]; its norms do not move in training
        wanted = pretrained_network(NAME).forward_intermediates(x)[1]
    assert [(m.shape[1], 224 // m.shape[2]) for m in maps] == [(v.channels, v.stride) for v in features.levels]
    for a, b in zip(maps, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="are a whole method's, not a backbone's"):
        PretrainedFeatures(weights="blazeface_short_range")


def test_features_of_any_size_are_those_of_the_filled_image() -> None:
    features = PretrainedFeatures(weights=NAME)
    x = torch.rand(2, 3, 75, 100)
    filled = torch.full((2, 3, 96, 128), features.mean)  # zero, once it is normalised
    filled[:, :, :75, :100] = x
    with torch.no_grad():
        for a, b in zip(features(x), features(filled), strict=True):
            assert torch.equal(a, b)
    assert [tuple(m.shape[2:]) for m in features(x)] == [(48, 64), (24, 32), (12, 16), (6, 8), (3, 4)]


def test_a_dilated_stage_keeps_the_weights_and_the_stride() -> None:
    features = PretrainedFeatures(weights=NAME, output_stride=16)
    assert [level.stride for level in features.levels] == [2, 4, 8, 16, 16]
    with torch.no_grad():
        maps = features(torch.rand(1, 3, 64, 64))
    assert [tuple(m.shape[2:]) for m in maps] == [(32, 32), (16, 16), (8, 8), (4, 4), (4, 4)]
    plain = PretrainedFeatures(weights=NAME).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in features.state_dict().items())


def test_unknown_weights_are_told_with_what_was_meant() -> None:
    with pytest.raises(DataError, match="did you mean efficientnet_lite0"):
        load_weights("efficientnet_lite1")
