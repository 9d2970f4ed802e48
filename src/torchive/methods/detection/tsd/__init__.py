r"""TSD: the class and the box of a proposal are read at two different places, which the proposal's own features choose.

Paper    Song, Liu, Wang, "Revisiting the Sibling Head in Object Detector", CVPR 2020, arXiv:2003.07540.
Formula  P_r = P + gamma (dx w, dy h),  (dx, dy) = F_r(F)                                             (eq. 3 and 4)
         F^_c(i, j) = mean over bin (i, j) of x(p + gamma (dx_ij w, dy_ij h)),  (dx_ij, dy_ij) = F_c(F)   (eq. 5)
         L = L_rpn + L_cls + L_loc + L_cls^TSD + L_loc^TSD + M_cls + M_loc                            (eq. 2 and 8)
         M_cls = |s + m_c - s^TSD|_+ ,  M_loc = |IoU + m_r - IoU^TSD|_+ ,  m <= 0.2                   (eq. 6 and 7)
Symbols  P proposal of sides w, h, F its pooled features (R, C, 7, 7); gamma = 0.1; s softmax score of the assigned
         class, IoU with the assigned box, without TSD of the ordinary head, through which no gradient passes; m is cut
         to 1 - s and 1 - IoU; R regions, K classes without background; N, C, H, W of the images.
Differs  bins average ``samples`` points along each side, evenly as RoIAlign does; ``points="release"`` takes the
         release's operator, whose boxes are rounded and whose points lie at corners. Margins are the paper's 0.2, not
         the released configurations' 0.3. An image without objects has no term in the constraints' mean, where the
         release counts a zero for it. The TSD outputs start like its other layers; the release leaves PyTorch's start.
         Boxes are continuous, without the release's added pixel.
"""

from torchive.methods.detection.tsd.head import TSDHead
from torchive.methods.detection.tsd.loss import progressive_constraint
from torchive.methods.detection.tsd.model import TSD

__all__ = ["TSD", "TSDHead", "progressive_constraint"]
