r"""Sparse shift layer: each channel is moved by a learnt whole number of pixels, most of them by none.

Paper    Chen, Xie, Zhang and Pu, "All You Need is a Few Shifts: Designing Efficient Convolutional Neural Networks for
         Image Classification", CVPR 2019, arXiv:1903.05285.
Formula  y_c(h, w) = x_c(h + round(a_c), w + round(b_c)), zero outside                                        (forward)
         dL/da_c = sum_(n, h, w) dL/dy_c(h, w) [ (1 - v)(x_10 - x_00) + v (x_11 - x_01) ]                    (backward)
         dL/db_c = sum_(n, h, w) dL/dy_c(h, w) [ (1 - u)(x_01 - x_00) + u (x_11 - x_10) ]
         x_ij = x_c(h + floor(a_c) + i, w + floor(b_c) + j),  u = a_c - floor(a_c),  v = b_c - floor(b_c)
         L = cross-entropy + lambda sum_c ( |a_c| + |b_c| )                                                   (sparsity)
Symbols  a, b displacements in pixels, real numbers that are learnt; halves are rounded away from zero. Active shift
         interpolates forward, too; grouped shift stands still on a grid of displacements.
         FE-Net: channels are cut into groups of 1/8, 1/8, 1/4 and 1/2 (1/4, 1/4 and 1/2 where a block has three units);
         a unit works on the groups that came before and one more, so the others pass a block's first units untouched.
Differs  The release drops the fraction of h + a_c where the formula takes the floor, which gives wrong gradients of
         negative displacements at the upper and the left border; here it is the floor. The release's grid has
         fractions, as Python 3 divides; here it is whole. The head is a linear layer.
"""

from torchive.methods.blocks.sparse_shift.folding import FoldedShift, fold_shifts
from torchive.methods.blocks.sparse_shift.network import FEBlock, FENet, ShiftUnit
from torchive.methods.blocks.sparse_shift.shift import SparseShift, round_half_away, translate
from torchive.methods.blocks.sparse_shift.training import ShiftClassifier, moved_share, shift_depthwise, shift_layers

__all__ = [
    "FEBlock",
    "FENet",
    "FoldedShift",
    "ShiftClassifier",
    "ShiftUnit",
    "SparseShift",
    "fold_shifts",
    "moved_share",
    "round_half_away",
    "shift_depthwise",
    "shift_layers",
    "translate",
]
