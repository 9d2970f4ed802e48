r"""CondInst: each object's mask comes from a head of three 1x1 convolutions whose filters are predicted for it alone.

Paper    Tian, Shen, Chen, "Conditional Convolutions for Instance Segmentation", ECCV 2020, arXiv:2003.05664.
Formula  m_i = sigmoid(up(W3 relu(W2 relu(W1 [r_i; F] + b1) + b2) + b3)), (W, b) = theta_i, 169 numbers   (sec. 3.3)
         r_i(p) = (c_i - p) / s_i, the place relative to the object's location                             (sec. 3.2)
         L = L_fcos + L_mask                                                                                (eq. 1)
         L_mask = mean_i [1 - 2 sum m g / (sum m^2 + sum g^2 + eps)] over the positive locations            (eq. 2)
Symbols  F mask features (8, h, w) at the finest map's stride, theta_i the controller's output at location c_i, s_i the
         largest size that the location's map answers for, g the true mask at the output's stride; A locations of all
         maps, n instances, K classes; C, H, W channels and size of the images.
Differs  the generalised IoU has no smoothing and the mask comes out at stride 2, as in the paper; the release adds 1 to
         its areas and has stride 4: ``smooth`` and ``mask_stride``. Boxes are cut to the image before suppression.
"""

from torchive.methods.segmentation.condinst.mask_branch import MaskBranch, SemanticBranch
from torchive.methods.segmentation.condinst.mask_head import DynamicMaskHead
from torchive.methods.segmentation.condinst.model import CondInst

__all__ = ["CondInst", "DynamicMaskHead", "MaskBranch", "SemanticBranch"]
