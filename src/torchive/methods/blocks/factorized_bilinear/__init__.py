r"""Factorized bilinear layer: a linear layer with a low-rank quadratic form for each output.

Paper    Li, Wang, Liu and Hou, "Factorized Bilinear Models for Image Recognition", ICCV 2017, arXiv:1611.05709.
Formula  y_j = b_j + w_j^T x + x^T F_j^T F_j x = b_j + w_j^T x + |F_j x|^2, F_j (k, n)
         training: y_j = b_j + w_j^T x + sum_f m_jf (F_j x)_f^2, m_jf = 1 with probability 1 - drop         (DropFactor)
         testing: the quadratic term times 1 - drop
         head: y = mean_l FB(tanh(z_l)), the layer at each position of the last map, then the mean
         network: the last ReLU is a tanh, and the head takes the place of mean pooling and linear layer
Symbols  N batch, n or C input features, K outputs, k factors, L positions.
Differs  Each output and each sample has factors of its own dropped; the release drops the same for a whole batch, which
         is ``shared_drop``. The release leaves out the products of a feature with itself (``diagonal=False``) and
         divides by 1 - drop in training but multiplies by it in testing, too; here the mean over masks is the test's
         value. ``signed`` gives half of the factors a minus, since a sum of squares makes every output convex.
"""

from torchive.methods.blocks.factorized_bilinear.head import FactorizedBilinearHead
from torchive.methods.blocks.factorized_bilinear.layer import FactorizedBilinear, FactorizedBilinearConv, slow_start
from torchive.methods.blocks.factorized_bilinear.network import FactorizedInception, FactorizedResNet
from torchive.methods.blocks.factorized_bilinear.place import factorize_classifier

__all__ = [
    "FactorizedBilinear",
    "FactorizedBilinearConv",
    "FactorizedBilinearHead",
    "FactorizedInception",
    "FactorizedResNet",
    "factorize_classifier",
    "slow_start",
]
