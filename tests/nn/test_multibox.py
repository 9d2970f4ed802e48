"""Default boxes of any detector that stands on them: scales, half precision, and what is no box."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchive.methods.detection.netnet import NETNet
from torchive.methods.detection.ssd import SSD
from torchive.nn.multibox import decode_multibox, source_shapes
from torchive.ops.boxes import encode_boxes


def test_scales_of_300_and_512_pixels() -> None:
    """Section 2.2 for six sources, 3.1 for seven."""
    for sources, wanted in (
        (6, [0.1, 0.2, 0.375, 0.55, 0.725, 0.9]),
        (7, [0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9]),
    ):
        found = [shapes[0] for shapes in source_shapes(sources)]
        assert [w for w, _ in found] == pytest.approx(wanted)
        assert [h for _, h in found] == pytest.approx(wanted)
    last = source_shapes(7)[-1][1][0]
    assert last == pytest.approx((0.9 * 1.05) ** 0.5)  # the formula continued, as the authors' script for 512
    with torch.device("meta"):
        assert SSD(image_size=512).shapes0.shape == (4, 2)


@pytest.mark.parametrize("detector", [SSD, NETNet])
def test_a_pixel_is_coded_in_float32_under_autocast(detector: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = detector(num_classes=2, backbone="timm/test_efficientnet", image_size=300).eval()
    targets = [{"boxes": torch.tensor([[270.0, 271.0, 271.0, 272.0]]), "labels": torch.tensor([1])}]
    image = torch.rand(1, 3, 300, 300)
    with torch.no_grad():
        wanted = net.losses(image, targets)
        with torch.autocast("cpu", torch.bfloat16):
            found = net.losses(image, targets)
    assert wanted["localisation"] > 5
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), rel=0.02), name


def test_boxes_without_area_are_no_detections() -> None:
    """A box beyond the border is cut to a line; it must neither come out nor suppress."""
    anchors = torch.tensor([[0.2, 0.2, 0.6, 0.6], [0.5, 0.5, 0.9, 0.9], [0.1, 0.1, 0.3, 0.3]])
    outside, thin = torch.tensor([1.1, 0.2, 1.5, 0.6]), torch.tensor([0.5, 0.5, 0.5 + 0.9e-4, 0.9])
    wanted = torch.stack([outside, thin, anchors[2]])
    raw = {
        "deltas": encode_boxes(wanted, anchors, (10.0, 10.0, 5.0, 5.0))[None],
        "logits": torch.tensor([[[0.0, 9.0], [0.0, 8.0], [0.0, 7.0]]]),
        "anchors": anchors,
    }
    (found,) = decode_multibox(raw, [(100, 100)], score_threshold=0.0)
    torch.testing.assert_close(found.boxes, torch.tensor([[10.0, 10, 30, 30]]))
    (found,) = decode_multibox(raw, [(100, 120)], score_threshold=0.0)  # 0.0108 pixels wide there
    assert len(found) == 2
