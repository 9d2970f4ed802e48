r"""ThunderNet: a two-stage detector for phones, light from backbone to head, whose second stage sees what the proposal
network learnt about foreground.

Paper    Qin, Li, Zhang, Bao, Yu, Peng, Sun, "ThunderNet: Towards Real-time Generic Object Detection on Mobile Devices",
         ICCV 2019, arXiv:1903.11752.
Formula  CEM = conv(C4) + up(conv(C5)) + conv(mean(C5)), each 1x1 to 245 channels                    (sec. 3.2, fig. 4)
         RPN = relu(BN(conv_1x1(BN(depthwise_5x5(CEM))))), 256 channels                                      (sec. 3.2)
         SAM = CEM * sigmoid(BN(conv_1x1(RPN)))                                                       (eq. 1 and fig. 5)
         region = relu(FC_1024(5 * 7 * 7)), bin (i, j) of channel c = mean of SAM's map c 49 + i 7 + j       (sec. 3.2)
Symbols  C4, C5 the backbone's maps of stride 16 and 32; A anchors, 25 for each cell; P proposals; K classes without
         background; N, C, H, W of the images.
Differs  the paper does not say how many regions or anchors are mined, nor how the terms are weighed: here 256 of all
         regions as in Light-Head R-CNN, whose second stage this is, 256 anchors of an image of which the negatives are
         the hardest, all weights one. Objectness is one sigmoid for an anchor. Soft suppression is Gaussian.
"""

from torchive.methods.detection.thundernet.model import ThunderNet
from torchive.methods.detection.thundernet.modules import ContextEnhancement, SpatialAttention
from torchive.methods.detection.thundernet.snet import SNet

__all__ = ["ContextEnhancement", "SNet", "SpatialAttention", "ThunderNet"]
