r"""Hybrid Task Cascade: three stages refine boxes and masks in turn, each mask stage reads the features of the one
before, and a semantic branch lends its context to both.

Paper    Chen et al., "Hybrid Task Cascade for Instance Segmentation", CVPR 2019, arXiv:1901.07518.
Formula  x_t^box = P(x, r_(t-1)) + P(S(x), r_(t-1)),  r_t = B_t(x_t^box)                                (eq. 5)
         x_t^mask = P(x, r_t) + P(S(x), r_t),  m_t = M_t(F(x_t^mask, m^-_(t-1)))                        (eq. 3, 5)
         F(x, m) = x + G_t(m)                                                                           (eq. 4)
         L = sum_t alpha_t (L_t^box + L_t^mask) + beta L_seg                                            (eq. 6)
Symbols  x features, r_t boxes after stage t (r_0 the proposals), m_t masks, m^- their features before the transposed
         convolution, P pooling of regions, B, M box and mask head, G a 1x1 convolution, S the semantic branch, alpha =
         1, 0.5, 0.25, beta = 0.2; A anchors, P proposals, D detections of an image, K classes, T stages, S side of a
         mask, C, H, W channels and size of images.
Differs  beta is the release's. Suppression sees the 2,000 best pairs of box and class of an image.
"""

from torchive.methods.segmentation.htc.mask_cascade import MaskCascade
from torchive.methods.segmentation.htc.model import HTC
from torchive.methods.segmentation.htc.semantic import FusedSemanticBranch

__all__ = ["HTC", "FusedSemanticBranch", "MaskCascade"]
