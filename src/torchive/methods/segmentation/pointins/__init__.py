r"""PointINS: an object's mask comes from the feature at one point, filtered with weights made for that object.

Paper    Qi, Wang, Chen, Chen, Zhang, Sun, Jia, "PointINS: Point-based Instance Segmentation", 2020, arXiv:2003.06148
         (TPAMI 2021).
Formula  T_i = reshape(U f_i) in R^(c x k x k)                    the template, which knows nothing of the object
         w_i = G([f_i; b_i]), A_i = relu(w_i * T_i)               the instance-aware convolution
         m_i = sigmoid(P(A_i)) in (2k x 2k), laid over the object's box
         L = L_detector + mean_i BCE(m_i, g_i), g_i the true mask cut out by the box
Symbols  f_i (C) the mask tower's feature at point of interest i, one location or anchor; b_i (4) its predicted box, as
         distances in strides or as anchor deltas, without gradient; U a 1x1 convolution, G two linear layers, * a
         convolution, P the shared predictor; k template size, c and c' channels; A points of all maps, K classes; C, H,
         W channels and size of the images.
Differs  no code was published, and k, c, the inputs of G and the box in training could not be confirmed: k = 14,
         c = c' = 16, feature and box, the true box; all are options. Templates are made for the chosen points alone,
         which gives what a convolution over all points gives there.
"""

from torchive.methods.segmentation.pointins.head import InstanceAwareHead
from torchive.methods.segmentation.pointins.model import PointINS

__all__ = ["InstanceAwareHead", "PointINS"]
