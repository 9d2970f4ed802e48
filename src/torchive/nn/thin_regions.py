"""Second stages on position-sensitive maps, and the loss of the regions that cost most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers

from torchive.nn.regions import Regions, offset_errors
from torchive.ops.roi import pool_position_sensitive, pool_regions


class ProposalHead(nn.Module):
    """Maps to objectness and offsets of the anchors, through a body of one's own, for ``RegionProposals``.

    Args:
        body: a map to a map of ``channels``.
        channels: of what the body gives.
        num_anchors: of each cell.
    """

    def __init__(self, body: nn.Module, channels: int, num_anchors: int) -> None:
        super().__init__()
        self.body = body
        self.cls_logits = nn.Conv2d(channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(channels, 4 * num_anchors, 1)
        for layer in (self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def flat(self, maps: Sequence[Tensor], _condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Objectness (N, A) and deltas (N, A, 4) of all maps."""
        features = [self.body(x) for x in maps]
        objectness, deltas = [self.cls_logits(x) for x in features], [self.bbox_pred(x) for x in features]
        flat, code = concat_box_prediction_layers(objectness, deltas)
        images = maps[0].shape[0]  # not len(), which an export would take for a constant
        return flat.view(images, -1), code.view(images, -1, 4)


class ThinRegionStage(nn.Module):
    """Regions of one thin map to class scores and offsets: position-sensitive RoIAlign, one layer, two outputs.

    Args:
        channels: C of a pooled region; the map has C size^2.
        num_classes: K.
        hidden: of the layer.
        size: side of the pooled features.
        samples: points along each side of a bin.
        per_class: whether each class has offsets of its own, (R, 4 (K + 1)) instead of (R, 4).
        position_sensitive: whether each bin reads a map of its own; otherwise the map has C channels and RoIAlign
            pools it.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        hidden: int = 2048,
        size: int = 7,
        samples: int = 2,
        per_class: bool = False,
        position_sensitive: bool = True,
    ) -> None:
        super().__init__()
        self.size, self.samples, self.position_sensitive = size, samples, position_sensitive
        self.in_channels = channels * size**2 if position_sensitive else channels
        self.layer = nn.Linear(channels * size**2, hidden)
        self.class_score = nn.Linear(hidden, num_classes + 1)
        self.box_delta = nn.Linear(hidden, 4 * (num_classes + 1) if per_class else 4)
        for layer, std in ((self.layer, 0.01), (self.class_score, 0.01), (self.box_delta, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, stride: int, boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and deltas of boxes (R, 4), in pixels of the batch, on the images ``image`` (R,)."""
        if self.position_sensitive:
            pooled = pool_position_sensitive(x, boxes, image, stride=stride, size=self.size, samples=self.samples)
        else:
            pooled = pool_regions([x], [stride], boxes, image, size=self.size, sampling_ratio=self.samples)
        hidden = self.layer(pooled.flatten(1)).relu()
        return self.class_score(hidden), self.box_delta(hidden)


class VotedRegionStage(nn.Module):
    """Regions to class scores and offsets without a layer of their own: the mean of position-sensitive bins.

    Dai et al., "R-FCN: Object Detection via Region-based Fully Convolutional Networks", NeurIPS 2016, arXiv:1605.06409,
    its voting; a bin is pooled by RoIAlign.

    Args:
        num_classes: K.
        size: bins along each side; each class and each offset has size^2 maps, ``in_channels`` in all, scores first.
        samples: points along each side of a bin.
        per_class: whether each class has offsets of its own, (R, 4 (K + 1)) instead of (R, 4).
    """

    def __init__(self, num_classes: int, *, size: int = 7, samples: int = 2, per_class: bool = False) -> None:
        super().__init__()
        self.size, self.samples = size, samples
        self.outputs = [num_classes + 1, 4 * (num_classes + 1) if per_class else 4]
        self.in_channels = sum(self.outputs) * size**2

    def forward(self, x: Tensor, stride: int, boxes: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and deltas of boxes (R, 4), in pixels of the batch, on the images ``image`` (R,)."""
        bins = pool_position_sensitive(x, boxes, image, stride=stride, size=self.size, samples=self.samples)
        logits, deltas = bins.mean((2, 3)).split(self.outputs, 1)
        return logits, deltas


def hard_region_loss(
    logits: Tensor, deltas: Tensor, regions: Regions, *, count: int = 256, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Loss of the class scores and of the offsets over the ``count`` regions of the batch that cost most.

    Online hard example mining, Shrivastava et al., CVPR 2016, arXiv:1604.03540, as Light-Head R-CNN does it: what a
    region costs is the sum of both, the losses are sums over the chosen ones divided by their number.

    Args:
        logits: (R, K + 1), background first.
        deltas: (R, 4 (K + 1)), or (R, 4) where the classes share them.
        regions: as of ``sample_regions``; all of them are candidates.
        count: regions that are learnt from, fewer where there are no more.
        beta: error of an offset up to which its loss is a square.
    """
    score = F.cross_entropy(logits, regions.labels, reduction="none")
    offset = offset_errors(deltas, regions, beta=beta)
    hardest = (score + offset).detach().topk(min(count, len(score))).indices
    number = max(len(hardest), 1)
    return score[hardest].sum() / number, offset[hardest].sum() / number


class HardestAnchors:
    """A sampler for ``rpn_loss``: drawn positives as torchvision's, and of the negatives those of highest objectness.

    Args:
        objectness: (N, A) logits.
        count: anchors of an image.
        positives: share of ``count`` that may be positive.
    """

    def __init__(self, objectness: Tensor, *, count: int = 256, positives: float = 0.5) -> None:
        self.objectness, self.count, self.positives = objectness.detach(), count, positives

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks (A,) of each image's positives and negatives."""
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for label, score in zip(labels, self.objectness, strict=True):
            found = torch.nonzero(label >= 1)[:, 0]
            found = found[torch.randperm(len(found), device=found.device)[: int(self.count * self.positives)]]
            negative = label == 0
            left = min(self.count - len(found), int(negative.sum()))
            hard = score.masked_fill(~negative, -torch.inf).topk(left).indices
            for masks, index in zip(chosen, (found, hard), strict=True):
                masks.append(torch.zeros_like(negative).index_fill(0, index, True))
        return chosen
