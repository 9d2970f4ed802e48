r"""Slim convolution: channels are weighted by a gate and by its flipped copy, folded, and convolved by two slim paths.

Paper    Qiu, Chen, Liu and Zeng, "SlimConv: Reducing Channel Redundancy in Convolutional Neural Networks by Weights
         Flipping", 2020, arXiv:2003.07469; the journal (TIP 2021) says "by Features Recombining".
Formula  w = sigmoid( W_2 relu( norm( W_1 mean_hw(x) ) ) ),  w'_c = w_(C-1-c)                        (weights flipping)
         t_j = sum_i w_(i C/r + j) x_(i C/r + j),  b_j the same with w',  i = 0..r-1, j = 0..C/r-1       (reconstruct)
         y = [ norm(W_u * t), norm(W_l * relu(norm(W_p b))) ]                                    (transform and fuse)
Symbols  x (N, C, H, W); r folds, 2 in the paper's networks; t and b (N, C/r, H, W); W_p 1x1 to C/(2r) channels, W_u and
         W_l 3x3; y has C/r + C/(2r) = C/k channels, k = 2r/3 (4/3, 2 and 8/3 for 2, 3 and 4 folds). W_1 squeezes by 32.
         No norm follows y; the activation behind it is the host's, and the next convolution reads C/k channels.
         The gate's norm sees one position an image, so a training batch of one needs gate_norm = "layer".
"""

from torchive.methods.blocks.slimconv.convolution import SlimConv, fold_channels
from torchive.methods.blocks.slimconv.network import slim, slim_resnet

__all__ = ["SlimConv", "fold_channels", "slim", "slim_resnet"]
