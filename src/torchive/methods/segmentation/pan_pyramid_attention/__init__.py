r"""Pyramid attention network: a pyramid of pixel attention on the deepest map, a decoder in which it weighs channels.

Paper    Li et al., "Pyramid Attention Network for Semantic Segmentation", BMVC 2018, arXiv:1805.10180, section 3.
Formula  FPA(x) = m(x) a(x) + g(x),   m = 1x1 conv-BN-ReLU,  g = 1x1 conv-BN-ReLU of the global mean
         d_i = conv_k_i( down(d_i-1) ), d_0 = x, k = 7, 5, 3;   e_3 = conv_3(d_3),  e_i = conv_k_i(d_i) + up(e_i+1)
         a = up(e_1); every conv with BN and ReLU                                            (feature pyramid attention)
         GAU(l, h) = up(h) + w l',   l' = 3x3 conv-BN-ReLU(l),  w = act(BN(1x1 conv(mean h)))     (upsampling by it)
         y_5 = FPA(f_5), y_4 = GAU(f_4, y_5), y_3 = GAU(f_3, y_4), y_2 = GAU(f_2, y_3), logits = up(1x1 conv(y_2))
Symbols  N batch, f_2 to f_5 the backbone's maps at strides 4, 8, 16, 16; a and w the attentions: a over positions, w
         over channels; up bilinear, to the exact size of the map that it meets.
Differs  The pyramid has one channel, as in the common library; the paper does not say its width, and
         ``pyramid_channels`` sets it. Pooling rounds sizes up, so that a map of one cell has a pyramid, too. The
         gate of the channels is a ReLU as in the paper's text; the library's is a sigmoid, which is ``act``.
"""

from torchive.methods.segmentation.pan_pyramid_attention.fpa import FeaturePyramidAttention
from torchive.methods.segmentation.pan_pyramid_attention.gau import GlobalAttentionUpsample
from torchive.methods.segmentation.pan_pyramid_attention.model import PyramidAttentionNetwork

__all__ = ["FeaturePyramidAttention", "GlobalAttentionUpsample", "PyramidAttentionNetwork"]
