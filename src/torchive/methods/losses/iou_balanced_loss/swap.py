"""The losses in torchvision's detectors, which a user trains with a loop of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD

from torchive.methods.losses.iou_balanced_loss.loss import (
    IoUBalancedLocalisation,
    IoUBalancedLoss,
    balance_weights,
)
from torchive.nn.exchanged_heads import exchange_region_loss
from torchive.nn.regions import WEIGHTS
from torchive.nn.retinanet import dense_loss
from torchive.ops.boxes import code_iou, encode_boxes
from torchive.ops.matching import hard_negatives


def balance_losses(
    model: nn.Module,
    *,
    eta: float = 1.5,
    power: float = 1.5,
    loss_weight: float | None = None,
    beta: float | None = None,
) -> nn.Module:
    """Put both IoU-balanced losses into a detector of torchvision's, in place, and return it.

    Training goes on as before: ``losses = model(images, targets)`` has the same names. Weights keep their names; the
    state also has w and what it was found from. RetinaNet is normalised by the positives of the batch, as in the paper;
    torchvision does so image by image.

    Args:
        model: torchvision's ``RetinaNet``, ``SSD`` (also SSDLite), or ``FasterRCNN`` and what is built on it, where the
            second stage is balanced. What is exchanged must be torchvision's own class: a subclass's changes were lost.
        eta: power of the overlap in the classification loss; 0 is the plain loss.
        power: lambda, that of the localisation loss.
        loss_weight: w of the localisation; found on the first batches if None, see ``IoUBalancedLocalisation``.
        beta: where smooth L1 turns; 0.11, 1 and 1/9 if None.

    Raises:
        TypeError: another model. ValueError: its losses were exchanged already.
    """
    if isinstance(model, BalancedSSD) or isinstance(getattr(model, "head", None), BalancedRetinaNetHead):
        raise ValueError(
            "the model already has an IoUBalancedLocalisation, which another exchange would undo; build the model anew"
        )
    options: dict[str, Any] = {"power": power, "loss_weight": loss_weight, "reduction": "none"}
    if isinstance(model, RetinaNet) and type(model.head) is RetinaNetHead:
        model.head.__class__ = BalancedRetinaNetHead
        model.head.classification_loss = IoUBalancedLoss(eta=eta, reduction="none")
        model.head.localisation_loss = IoUBalancedLocalisation(beta=0.11 if beta is None else beta, **options)
    elif isinstance(model, SSD) and type(model) is SSD:
        model.__class__ = BalancedSSD
        model.eta = eta
        model.localisation_loss = IoUBalancedLocalisation(beta=1.0 if beta is None else beta, **options)
    elif isinstance(model, FasterRCNN):
        weights = model.roi_heads.box_coder.weights
        box = IoUBalancedLocalisation(beta=1 / 9 if beta is None else beta, box_weights=weights, **options)
        exchange_region_loss(model.roi_heads, BalancedRegionLoss(eta, box))
    else:
        own = model.head if isinstance(model, RetinaNet) else model
        raise TypeError(f"expected torchvision's RetinaNet, SSD or FasterRCNN, got {type(own).__name__}")
    return model


class BalancedRetinaNetHead(RetinaNetHead):
    """torchvision's head with exchanged losses; made by ``balance_losses``."""

    classification_loss: nn.Module
    localisation_loss: nn.Module

    def compute_loss(
        self, targets: Any, head_outputs: dict[str, Tensor], anchors: list[Tensor], matched_idxs: list[Tensor]
    ) -> dict[str, Tensor]:
        """As torchvision's; its labels are columns, counted from 0."""
        raw = {
            "logits": head_outputs["cls_logits"],
            "deltas": head_outputs["bbox_regression"],
            "anchors": torch.stack(anchors),
        }
        losses = dense_loss(
            raw,
            torch.stack(matched_idxs),
            [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets],
            classification=self.classification_loss,
            localisation=self.localisation_loss,
        )
        return {"classification": losses["classification"], "bbox_regression": losses["localisation"]}


class BalancedSSD(SSD):
    """torchvision's SSD with balanced positives; made by ``balance_losses``. Negatives are mined as before."""

    eta: float
    localisation_loss: nn.Module

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """As torchvision's, over the positives of the batch."""
        logits, deltas = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        matches = torch.stack(matched_idxs)  # (N, A)
        positive = matches >= 0
        image, place = torch.nonzero(positive, as_tuple=True)  # (P,)
        first = torch.tensor([0, *(len(target["labels"]) for target in targets)], device=matches.device).cumsum(0)
        row = matches[image, place] + first[image]
        boxes, names = (torch.cat([target[key] for target in targets]) for key in ("boxes", "labels"))
        weights = self.box_coder.weights
        code = encode_boxes(boxes[row].to(deltas), torch.stack(anchors)[image, place], weights)
        found = deltas[image, place]
        overlap = code_iou(found.detach(), code, weights)

        labels = torch.zeros_like(matches)
        labels[image, place] = names[row]
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        negative = hard_negatives(each, positive, self.neg_to_pos_ratio)
        spread = torch.zeros_like(each)
        spread[image, place] = overlap.to(each.dtype)
        weight = balance_weights(each.flatten(), positive.flatten(), spread.flatten(), eta=self.eta).view(each.shape)
        count = positive.sum().clamp(min=1)
        return {
            "bbox_regression": self.localisation_loss(found, code, overlap).sum() / count,
            "classification": (each * weight * (positive | negative)).sum() / count,
        }


class BalancedRegionLoss(nn.Module):
    """Both losses of a second stage over its R regions: cross-entropy of K + 1 classes, smooth L1 of the positives.

    Args:
        eta: power of the overlap in the classification loss.
        localisation: loss of codes (P, 4), with the reduction "none" and the ``box_weights`` of the stage's codes; a
            second stage's usual ones, (10, 10, 5, 5), where it has none.
    """

    def __init__(self, eta: float, localisation: IoUBalancedLocalisation) -> None:
        super().__init__()
        self.classification = IoUBalancedLoss(eta=eta, variant="softmax", reduction="none")
        self.localisation = localisation

    def forward(self, logits: Tensor, deltas: Tensor, labels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (R, K + 1), deltas (R, 4 (K + 1)), labels (R,), 0 for background, and codes (R, 4): two scalars."""
        positive = torch.nonzero(labels > 0)[:, 0]
        found = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]  # (P, 4)
        overlap = code_iou(found.detach(), codes[positive], self.localisation.box_weights or WEIGHTS)
        spread = torch.zeros_like(logits[:, 0]).index_copy(0, positive, overlap.to(logits.dtype))
        count = max(len(labels), 1)
        score = self.classification(logits, labels, spread).sum() / count
        return score, self.localisation(found, codes[positive], overlap).sum() / count
