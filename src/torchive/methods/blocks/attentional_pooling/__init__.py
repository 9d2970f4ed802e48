r"""Attentional pooling: class scores of a feature map by low-rank second-order pooling, which acts as attention.

Paper    Girdhar and Ramanan, "Attentional Pooling for Action Recognition", NeurIPS 2017, arXiv:1711.01467, section 3.
Formula  s_k = Tr(X^T X W_k^T) / L                                       (second-order pooling; the paper has no 1 / L)
         W_k = a_k b^T  =>  s_k = (X a_k)^T (X b) / L = mean_l t_kl h_l                                       (rank 1)
         W_k = sum_p a_kp b_p^T  =>  s_k = sum_p mean_l t_kpl h_pl                                            (rank P)
         t_kp = X a_kp is top-down and of the class, h_p = X b_p is bottom-up and of all classes.
         With pose: h = b . relu(V x), heat maps = U relu(V x); loss = cross-entropy + lambda L2 of the heat maps.
Symbols  N batch, X (L, C) features, L = H W positions (T H W of a clip), K classes, P rank, J key points.
Differs  The mean over positions is the release's; the paper's sum differs by the factor L. Neither X^T X nor a map of a
         class is formed: mean_l h_l (a . x_l) = a . mean_l (h_l x_l). The maps of a higher rank are independent; the
         release computes each from the one before, which is ``chained``. The layer that ``convert`` puts in keeps the
         network's own linear layer as a_k, whose bias is then not weighted by h.
"""

from torchive.methods.blocks.attentional_pooling.head import AttentionalPooling, AttentionMaps, head_weights
from torchive.methods.blocks.attentional_pooling.network import AttentionalNetwork
from torchive.methods.blocks.attentional_pooling.pose import ActionPoseLoss, PoseAttentionalPooling, gaussian_heatmaps
from torchive.methods.blocks.attentional_pooling.saliency import BottomUpPool

__all__ = [
    "ActionPoseLoss",
    "AttentionMaps",
    "AttentionalNetwork",
    "AttentionalPooling",
    "BottomUpPool",
    "PoseAttentionalPooling",
    "gaussian_heatmaps",
    "head_weights",
]
