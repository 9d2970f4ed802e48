r"""ReZero: every residual branch is multiplied by one learnt number that starts at zero.

Paper    Bachlechner et al., "ReZero is All You Need: Fast Convergence at Large Depth", UAI 2021, arXiv:2003.04887.
Formula  x_{i+1} = x_i + alpha_i F_i(x_i),  alpha_i = 0 at the start                                   (eq. 1)
         so that J = dx_L / dx_0 = I at the start, whatever the depth                                  (section 3)
         Transformer: x + alpha SelfAttn(x), then x + alpha FFN(x); no norm, one alpha for a layer      (section 5)
         chi = mean of the squared singular values of J                                                 (section 4)
         folded: alpha (W h + b) = (alpha W) h + (alpha b), W and b the last linear layer of F
Symbols  N batch, C channels, L tokens or layers; F a residual branch, started as usual.
Differs  In a network that is converted the branch keeps its norms, as in the paper's ResNet-56, and a last norm that
         starts at zero gets gamma = 1: with both at zero neither would ever get a gradient. One alpha for each channel
         is on offer and is LayerScale, not ReZero.
"""

from torchive.methods.blocks.rezero.diagnostics import (
    jacobian_singular_values,
    mean_squared_singular_value,
    residual_weights,
)
from torchive.methods.blocks.rezero.fold import fold
from torchive.methods.blocks.rezero.gate import ReZero
from torchive.methods.blocks.rezero.mlp import ReZeroMLP
from torchive.methods.blocks.rezero.transformer import ReZeroDecoderLayer, ReZeroEncoderLayer

__all__ = [
    "ReZero",
    "ReZeroDecoderLayer",
    "ReZeroEncoderLayer",
    "ReZeroMLP",
    "fold",
    "jacobian_singular_values",
    "mean_squared_singular_value",
    "residual_weights",
]
