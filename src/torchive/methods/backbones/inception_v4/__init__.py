r"""Inception-v4 and Inception-ResNet: parallel branches of factorised convolutions, plain or added to their input.

Paper    Szegedy, Ioffe, Vanhoucke and Alemi, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
         Learning", AAAI 2017, arXiv:1602.07261. Before it: v1 arXiv:1409.4842; v2 and v3 arXiv:1512.00567.
Formula  y = [b_1(x); b_2(x); ...]                                              (Inception: branches b_i, concatenated)
         y = relu( x + s W [b_1(x); b_2(x); ...] )             (Inception-ResNet: W a linear 1x1 convolution, s a scale)
Symbols  x (N, C, H, W); each convolution of a branch without bias, with batch norm (eps 1e-3) and ReLU; s 0.1 to 0.3.
Differs  One table describes all networks, so that width, depth and scale are free; timm's are those of width one
         and their weights load. Where the release is not as the figures (the order of 1x7 and 7x1, stem and depth
         of Inception-ResNet-v2), it is the release's form. Padding may be "same" for dense prediction.
"""

from torchive.methods.backbones.inception_v4.network import Inception, load_timm
from torchive.methods.backbones.inception_v4.parts import LINEAGE, Branches, ResidualBranches, lineage_module

__all__ = ["LINEAGE", "Branches", "Inception", "ResidualBranches", "lineage_module", "load_timm"]
