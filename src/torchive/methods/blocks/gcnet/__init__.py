r"""Global context block: one context vector, pooled by attention, transformed, and given back to every position.

Paper    Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCV Workshops 2019,
         arXiv:1904.11492. Non-local blocks: Wang et al., "Non-local Neural Networks", CVPR 2018, arXiv:1711.07971.
Formula  context_c = sum_j a_j x_cj,  a = softmax_j(w_k . x_j)                                  (context modelling)
         t = W_2 relu(LayerNorm(W_1 context))                                                 (transform)
         y = x + t  (add),  x sigmoid(t)  (scale),  x sigmoid(t') + t  (both)                        (fusion)
         Non-local: y_i = x_i + W_z sum_j f(x_i, x_j) W_g x_j; f is the soft-max over j of theta_i . phi_j (embedded
         Gaussian) or of x_i . x_j (Gaussian), or theta_i . phi_j / L (dot), or relu(w . [theta_i, phi_j]) / L (concat).
         Simplified non-local: y = x + W_v context.
Symbols  N batch, C channels, L positions (H W, or T H W); r = 16, the squeeze of the bottleneck (4 is the strongest).
Differs  The layer that gives the attention's logits has no bias: a soft-max does not see one. It is a (C,) weight here
         and a 1x1 convolution in the release.
"""

from torchive.methods.blocks.gcnet.context import GlobalContext, SimplifiedNonLocal
from torchive.methods.blocks.gcnet.dependence import cosine_distance, js_distance, query_dependence
from torchive.methods.blocks.gcnet.non_local import NonLocal

__all__ = [
    "GlobalContext",
    "NonLocal",
    "SimplifiedNonLocal",
    "cosine_distance",
    "js_distance",
    "query_dependence",
]
