r"""Octave convolution: a share of the channels lives at half the resolution, and both parts are told of each other.

Paper    Chen et al., "Drop an Octave: Reducing Spatial Redundancy in Convolutional Neural Networks with Octave
         Convolution", ICCV 2019, arXiv:1904.05049.
Formula  Y_H = W_HH * X_H + up(W_LH * X_L)                                                       (high frequency)
         Y_L = W_LL * X_L + W_HL * pool(X_H)                                                     (low frequency)
         With a stride of 2: Y_H = W_HH * pool(X_H) + W_LH * X_L,  Y_L = W_LL * pool(X_L) + W_HL * pool4(X_H)
         W = [[W_HH, W_LH], [W_HL, W_LL]] has the shape of the plain kernel: no parameter is added or lost.
         Operations over those of a plain convolution: 1 - 3/4 a (2 - a); numbers in a map: 1 - 3/4 a.
Symbols  X_H (N, (1 - a) C, H, W), X_L (N, a C, ceil(H / 2), ceil(W / 2)); a_in and a_out are the shares at both ends.
         * is convolution with equal padding, up doubles by nearest neighbour, pool averages windows of 2 x 2, pool4 of
         4 x 4. Clips (N, C, T, H, W) keep their frames: only H and W are halved.
Differs  Odd sizes: windows at the border average what they hold, and what is enlarged is cropped. In whole networks the
         pair travels by itself (``Octave``); a plain map that meets a pair is split, its low channels pooled.
"""

from torchive.methods.blocks.octconv.convolution import OctaveConv, relative_memory, relative_operations
from torchive.methods.blocks.octconv.network import oct_mobilenet, oct_resnet, octavize
from torchive.methods.blocks.octconv.pair import Octave, join, split

__all__ = [
    "Octave",
    "OctaveConv",
    "join",
    "oct_mobilenet",
    "oct_resnet",
    "octavize",
    "relative_memory",
    "relative_operations",
    "split",
]
