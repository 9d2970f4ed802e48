"""torchvision's second stage with another loss, for models that a user trains with a loop of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import clip_boxes_to_image

from torchive.ops.suppression import best_detections


class ExchangedRoIHeads(RoIHeads):
    """torchvision's ``RoIHeads`` whose ``region_loss`` gives ``loss_classifier`` and ``loss_box_reg``.

    Made of a stage by ``exchange_region_loss``; names of weights, masks and key points stay as they are.
    """

    region_loss: nn.Module
    _drawn: Any

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        """As torchvision's; labels (R,) and codes (R, 4) are kept for the loss."""
        found = super().select_training_samples(proposals, targets)
        self._drawn = torch.cat(found[2]), torch.cat(found[3])
        return found

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        """As torchvision's."""
        given: list[tuple[Tensor, Tensor]] = []
        handle = self.box_predictor.register_forward_hook(lambda _module, _inputs, output: given.append(output))
        self._drawn = ()
        try:
            result, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            handle.remove()
        drawn, self._drawn = self._drawn, ()
        if drawn:
            losses["loss_classifier"], losses["loss_box_reg"] = self.region_loss(*given[0], *drawn)
        return result, losses


class SigmoidRoIHeads(ExchangedRoIHeads):
    """A second stage that scores each class by a sigmoid of its own; the first column, the background's, is left."""

    def postprocess_detections(
        self, class_logits: Tensor, box_regression: Tensor, proposals: Any, image_shapes: Any
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As torchvision's: boxes, scores and labels of each image."""
        counts = [len(proposal) for proposal in proposals]
        scores = class_logits[:, 1:].sigmoid().split(counts)
        boxes = self.box_coder.decode(box_regression, proposals)[:, 1:].split(counts)  # (R, K, 4)
        rows = []
        for box, score, shape in zip(boxes, scores, image_shapes, strict=True):
            kept, label, sure, _ = best_detections(
                clip_boxes_to_image(box, shape),
                score,
                score_threshold=self.score_thresh,
                nms_threshold=self.nms_thresh,
                max_detections=self.detections_per_img,
            )
            rows.append((kept, sure, label))
        return tuple(list(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def exchange_region_loss(stage: RoIHeads, loss: nn.Module, cls: type[ExchangedRoIHeads] = ExchangedRoIHeads) -> None:
    """Give a torchvision second stage another loss, in place.

    Args:
        stage: ``model.roi_heads``.
        loss: of logits (R, K + 1), deltas (R, 4 (K + 1)), labels (R,), 0 for background, and codes (R, 4), to two
            scalars.
        cls: what the stage becomes.

    Raises:
        TypeError: the stage is of another class than torchvision's. ValueError: its loss was exchanged already.
    """
    if isinstance(stage, ExchangedRoIHeads):
        raise ValueError(
            f"the second stage already has a {type(stage.region_loss).__name__}, which another exchange would undo; "
            "build the model anew"
        )
    if type(stage) is not RoIHeads:
        raise TypeError(f"expected torchvision's RoIHeads, got {type(stage).__name__}")
    stage.__class__ = cls
    stage.region_loss = loss
