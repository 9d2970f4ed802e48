r"""SAN: self-attention with a weight for each channel, over a small footprint, in the place of spatial convolution.

Paper    Zhao, Jia and Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020, arXiv:2004.13621.
Formula  y_i = sum_{j in R(i)} alpha_ij * beta(x_j), * for each channel                              (eq. 2 and 4)
         pairwise: alpha_ij = softmax_j gamma([delta(phi(x_i), psi(x_j)), P_i - P_j])                       (eq. 3)
           delta: phi - psi (subtraction), phi + psi, phi * psi (hadamard), phi . psi (dot), [phi, psi] (concatenation)
         patchwise: alpha_i = gamma(delta(x_R(i))), no soft-max                                             (eq. 5)
           delta: [phi(x_i), psi(x_j) for all j] (concatenation), [phi(x_i) . psi(x_j)] (star),
           [phi(x_j) . psi(x_k) for all j, k] (clique)
         gamma: BN, ReLU, 1x1, BN, ReLU, 1x1; it gives C_mid / 8 weights, channel c takes number c mod (C_mid / 8).
         block: x + conv(relu(bn(attention(relu(bn(x))))))
Symbols  N batch, C channels (r = C / 16 for phi and psi, C_mid = C / 4 for beta), R(i) k x k positions, G = C_mid / 8;
         P a learnt linear map of the coordinates in [-1, 1]. Borders are reflected.
Differs  Plain tensor operations instead of kernels for one GPU; with ``chunk`` memory does not grow with the map. The
         soft-max of the pairwise form and the reflected borders are the release's; the paper leaves them open.
"""

from torchive.methods.backbones.san_self_attention.aggregation import aggregate
from torchive.methods.backbones.san_self_attention.attention import PairwiseAttention, PatchwiseAttention
from torchive.methods.backbones.san_self_attention.network import SAN, SANClassifier, load_release
from torchive.methods.backbones.san_self_attention.place import attend

__all__ = ["SAN", "PairwiseAttention", "PatchwiseAttention", "SANClassifier", "aggregate", "attend", "load_release"]
