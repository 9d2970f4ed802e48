r"""IoU-balanced losses: positives count by how well their regressed boxes overlap the object, in the class scores and
in the boxes.

Paper    Wu, Yang, Wang, Li, "IoU-balanced Loss Functions for Single-stage Object Detection", 2019, arXiv:1908.05641.
Formula  L_cls = sum_pos w_i l_i + sum_neg l_i,  w_i = IoU_i^eta (sum_pos l) / (sum_pos IoU^eta l)
         L_loc = sum_pos w_loc IoU_i^lambda smooth_L1(delta_i - target_i), all four numbers with one weight
Symbols  R entries of a batch, P positives among them, K classes; l focal loss, or cross-entropy; IoU_i of the decoded
         box of positive i and its object; eta = lambda = 1.5; w_loc chosen so that the first batch's sum is the plain
         one. No gradient passes through a weight. Sums are divided by the number of positives.
Differs  the overlaps come from the box codes, since one anchor's moves and stretches leave an overlap as it is; the
         release decodes both boxes first. Weights are scaled over all positives of the batch, as the formula says; the
         release scales those of each pyramid level apart. w_loc is found on the first batch where none is given, or
         on the first ones until 64 positives were seen, and is at most 10.
"""

from torchive.methods.losses.iou_balanced_loss.loss import (
    IoUBalancedLocalisation,
    IoUBalancedLoss,
    balance_weights,
    iou_balanced_classification,
    iou_balanced_localisation,
    matching_weight,
)
from torchive.methods.losses.iou_balanced_loss.swap import BalancedRegionLoss, balance_losses

__all__ = [
    "BalancedRegionLoss",
    "IoUBalancedLocalisation",
    "IoUBalancedLoss",
    "balance_losses",
    "balance_weights",
    "iou_balanced_classification",
    "iou_balanced_localisation",
    "matching_weight",
]
