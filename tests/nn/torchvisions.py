"""Torchvision's detectors over our parts, for equality on copied weights."""

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

#: The maps that regions are pooled from.
LEVELS = ["0", "1", "2", "3"]


class Named(nn.Module):
    """A backbone that gives a list of maps of ``channels``, as torchvision wants one."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.inner, self.out_channels = backbone, channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {str(k): m for k, m in enumerate(self.inner(x))}


def of_parts(kind: type, net: nn.Module, *, sizes: Sequence[Sequence[float]], **heads: object) -> nn.Module:
    """A two-stage detector of torchvision with a network's backbone (8 channels), proposals and heads, to evaluate."""
    theirs = kind(
        Named(net.backbone, 8),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=50,
        box_roi_pool=MultiScaleRoIAlign(LEVELS, 7, 2),
        **heads,
    ).eval()
    theirs.rpn.head.load_state_dict(net.rpn.head.state_dict())
    return theirs


def mask_predictor(ours: MaskRCNNPredictor, num_classes: int) -> MaskRCNNPredictor:
    """Torchvision's outputs of a mask branch, which have a channel for the background, with the weights of ours."""
    own = ours.mask_fcn_logits
    theirs = MaskRCNNPredictor(own.in_channels, own.in_channels, num_classes + 1)
    theirs.conv5_mask = ours.conv5_mask
    theirs.mask_fcn_logits.weight.data[1:] = own.weight
    theirs.mask_fcn_logits.bias.data[1:] = own.bias
    return theirs


def detect(theirs: nn.Module, images: Tensor) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Detections and maps of a torchvision detector without its resizing and pasting."""
    listed = torchvision.models.detection.image_list.ImageList(images, [tuple(images.shape[2:])] * len(images))
    features = theirs.backbone(images)
    proposals, _ = theirs.rpn(listed, features)
    return theirs.roi_heads(features, proposals, listed.image_sizes)[0], features


def assert_same(raw: dict[str, Tensor], expected: list[dict[str, Tensor]]) -> None:
    """More than five detections in each image, the same ones; masks as well where ``expected`` has them."""
    for k, other in enumerate(expected):
        there = raw["scores"][k] >= 0
        assert there.sum() == len(other["scores"]) > 5
        assert torch.equal(raw["labels"][k][there], other["labels"])
        torch.testing.assert_close(raw["boxes"][k][there], other["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(raw["scores"][k][there], other["scores"], rtol=0, atol=1e-5)
        if "masks" in other:
            torch.testing.assert_close(raw["masks"][k][there], other["masks"][:, 0], rtol=0, atol=1e-5)
