r"""TernaryNet: weights and activations become -1, 0 or 1, so that a convolution counts the bits in which words differ.

Paper    Heinrich, Blendowski and Oktay, "TernaryNet: Faster Deep Model Inference without GPUs for Medical 3D
         Segmentation using Sparse and Binary Convolutions", IJCARS 2018, arXiv:1801.09449.
         Weights: Li and Liu, "Ternary Weight Networks", 2016, arXiv:1605.04711.
Formula  y = tanh(b (2 x - 1)) / 2 + tanh(b (2 x + 1)) / 2                                       (activation, training)
         y = sign(x) [ |x| > 1/2 ], the limit of b -> inf                                            (activation, test)
         W_t = a sign(W) [ |W| > d ],  d = 0.7 mean |W|,  a = mean of |W| over |W| > d                (for each filter)
         u . v = |M| - 2 |(s_u xor s_v) and M|,  M = m_u and m_v                               (masked Hamming distance)
Symbols  b slope, 3 at the start of training and 8 at its end, on a line; x comes from a batch norm. W the stored
         weights: passes use W_t, and the gradient of W_t changes W. m says which entries are not zero, s which are
         positive, 64 of them in one word; |.| counts bits.
Differs  The network's linear upsampling takes cells by their centres (``align_corners=True`` as the release ran it):
         then pooled and upsampled maps are multiples of 1/16, which the packed form takes exactly, as a few ternary
         planes. The slope grows with each step rather than each epoch. The release never changes its slope and never
         tests with hard activations, whatever its comments say; here both happen.
"""

from torchive.methods.blocks.ternarynet.activation import TernaryTanh, hard_ternary, soft_ternary
from torchive.methods.blocks.ternarynet.bits import pack, popcount, ternary_dot
from torchive.methods.blocks.ternarynet.convolution import (
    TernaryConv2d,
    TernaryConv3d,
    TernaryUnit,
    binary_weights,
    ternary_weights,
)
from torchive.methods.blocks.ternarynet.network import TernaryUNet
from torchive.methods.blocks.ternarynet.packed import (
    PackedTernaryConv,
    PackedTernaryUnit,
    TernaryCost,
    pack_ternary,
    ternary_cost,
)
from torchive.methods.blocks.ternarynet.place import ternarize

__all__ = [
    "PackedTernaryConv",
    "PackedTernaryUnit",
    "TernaryConv2d",
    "TernaryConv3d",
    "TernaryCost",
    "TernaryTanh",
    "TernaryUNet",
    "TernaryUnit",
    "binary_weights",
    "hard_ternary",
    "pack",
    "pack_ternary",
    "popcount",
    "soft_ternary",
    "ternarize",
    "ternary_cost",
    "ternary_dot",
    "ternary_weights",
]
