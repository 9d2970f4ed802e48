r"""Guided anchoring: the features say where anchors stand and which shapes they have, and are adapted to the shapes.

Paper    Wang, Chen, Yang, Loy, Lin, "Region Proposal by Guided Anchoring", CVPR 2019, arXiv:1901.03278.
Formula  p(x, y, w, h | I) = p(x, y | I) p(w, h | x, y, I)                                             (eq. 1)
         w = sigma s exp(dw),  h = sigma s exp(dh),  at ((i + 1/2) s, (j + 1/2) s)                     (eq. 2)
         f'_i = N_T(f_i, w_i, h_i), a 3x3 convolution whose offsets are a 1x1 convolution of (dw, dh)  (eq. 3)
         L = lambda_1 L_loc + lambda_2 L_shape + L_cls + L_reg                                         (eq. 4)
         vIoU(a_wh, gt) = max over w, h > 0 of IoU(a_wh, gt),  nine (w, h) stand for all               (eq. 5)
         L_shape = L1(1 - min(w / w_g, w_g / w)) + L1(1 - min(h / h_g, h_g / h)),  L1 smooth           (eq. 6)
Symbols  (x, y), w, h an anchor's centre and sides, s the map's stride, sigma = 8 (4 in the one-stage form), dw = std
         times the prediction, std = 0.14 (1); A positions of all maps, L objects, P proposals or positives, K classes,
         R chosen positions, G groups of channels; N, C, H, W of images and maps.
Differs  lambda_2 is the release's 1, which by its authors' word stands for the paper's 0.1 with another scale of the
         location loss. Anchors stand in the middle of their cells, as the paper says; ``centre="corner"`` is the
         release's. Locations learn 1 where a centre is; release 3.3 hands the opposite to its focal loss, whose class 0
         is the object. A position in the middle of one object stays positive where another object says ignore; in the
         release the later of the two decides. The released shape loss also sums the terms of the centres, which no
         prediction changes, and adds 0.001 to its denominators. An object without any overlap has no best anchor.
         Where a position is left out, its features are not adapted either. Log ratios of sides end at +-log(1000 / 16).
"""

from torchive.methods.detection.guided_anchoring.adaption import FeatureAdaption
from torchive.methods.detection.guided_anchoring.loss import bounded_iou_loss
from torchive.methods.detection.guided_anchoring.model import GuidedAnchoring
from torchive.methods.detection.guided_anchoring.one_stage import GuidedRetinaNet
from torchive.methods.detection.guided_anchoring.proposals import GuidedProposals

__all__ = ["FeatureAdaption", "GuidedAnchoring", "GuidedProposals", "GuidedRetinaNet", "bounded_iou_loss"]
