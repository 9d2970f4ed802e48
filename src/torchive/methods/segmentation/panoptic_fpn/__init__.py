r"""Panoptic FPN: one feature pyramid under Mask R-CNN and a light semantic branch; their results merge into one map.

Paper    Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv:1901.02446. Merging and quality:
         Kirillov et al., "Panoptic Segmentation", CVPR 2019, arXiv:1801.00868.
Formula  L = lambda_i (L_c + L_b + L_m) + lambda_s L_s                                                   (sec. 3)
         PQ = sum_hits IoU / (hits + false / 2 + missed / 2)                                 (1801.00868, sec. 4)
Symbols  L_c, L_b, L_m classification, box and mask loss, L_s pixel cross-entropy, lambda_i = 1, lambda_s = 0.5; A
         anchors, P proposals, D detections of an image, K thing classes, S side of a mask, C, H, W channels and size.
Differs  the proposal network's losses are weighted by lambda_i, too. Suppression sees the 2,000 best pairs of box and
         class of an image. Background, category 0, is stuff of its own unless ``background`` is False.
"""

from torchive.methods.segmentation.panoptic_fpn.model import PanopticFPN
from torchive.methods.segmentation.panoptic_fpn.semantic import PyramidSemanticHead

__all__ = ["PanopticFPN", "PyramidSemanticHead"]
