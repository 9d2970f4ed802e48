r"""Deformable convolution: a second convolution says, position by position, where the taps of the first are taken.

Paper    Dai, Qi, Xiong, Li, Zhang, Hu, Wei, "Deformable Convolutional Networks", ICCV 2017, arXiv:1703.06211.
         Version 2: Zhu, Hu, Lin, Dai, "Deformable ConvNets v2", CVPR 2019, arXiv:1811.11168.
Formula  y(p0) = sum_n w(pn) x(p0 + pn + dpn),  dp = conv(x), zero at the start                              (eq. 2)
         x(p) = sum_q max(0, 1 - |q_y - p_y|) max(0, 1 - |q_x - p_x|) x(q), zero outside               (eq. 3 and 4)
         regions: y(i, j) = sum_{p in bin(i, j)} x(p0 + p + dp_ij) / n_ij                                    (eq. 5)
                  dp_ij = gamma dp^_ij (w, h),  dp^ = fc(plain pooling)
         position-sensitive: the same, bin (i, j) of class c read from a map of its own, dp^ pooled from maps (eq. 6)
         version 2: each tap is multiplied by m_n = sigmoid(conv(x)), each bin by m_ij
Symbols  x (N, C, H, W); p0 a position, pn the K taps, dpn their offsets in cells, for each of G groups of channels;
         gamma = 0.1; (w, h) the region's sides.
Differs  a bin averages 4 x 4 points that stand for its area, as the release does, not every cell. The points lie in the
         middle of their parts, as in RoIAlign; those of the release at the corners are ``points="release"``. A
         convolution that becomes modulated doubles its weights, since the mask starts at 1/2. Sampling is bilinear up
         to one cell outside, as in the release since 2018; its first operator gave zero there. ``deformize`` gives the
         offsets a tenth of the learning rate, as version 2 does; the layer's own default is the paper's.
"""

from torchive.methods.blocks.deformable_conv.analysis import (
    effective_dilation,
    effective_receptive_field,
    field_radius,
    sampled_locations,
)
from torchive.methods.blocks.deformable_conv.convolution import DeformConv2d, deform_conv
from torchive.methods.blocks.deformable_conv.modulation import ChannelModulation, total_variation
from torchive.methods.blocks.deformable_conv.network import deformable_resnet, deformize
from torchive.methods.blocks.deformable_conv.pooling import DeformablePSRoIPool, DeformableRoIPool, deformable_roi_pool

__all__ = [
    "ChannelModulation",
    "DeformConv2d",
    "DeformablePSRoIPool",
    "DeformableRoIPool",
    "deform_conv",
    "deformable_resnet",
    "deformable_roi_pool",
    "deformize",
    "effective_dilation",
    "effective_receptive_field",
    "field_radius",
    "sampled_locations",
    "total_variation",
]
