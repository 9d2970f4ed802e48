r"""Deep layer aggregation: stages joined by trees of learnt nodes, and all scales joined again for dense prediction.

Paper    Yu, Wang, Shelhamer and Darrell, "Deep Layer Aggregation", CVPR 2018, arXiv:1707.06484.
Formula  I(x_1, ..., x_n) = x_1 if n = 1, else I(N(x_1, x_2), x_3, ..., x_n)                      (iterative, eq. 1)
         T_n(x) = N(R_(n-1)(x), R_(n-2)(x), ..., R_1(x), L_1(x), L_2(x))                       (hierarchical, eq. 2)
         L_2 = B(L_1), L_1 = B(R_1);  R_m = T_m(x) if m = n - 1, else T_m(R_(m+1)(x))                        (eq. 3)
         N(x_1, ..., x_n) = relu( BN( W [x_1; ...; x_n] ) + b ), b = x_1 where residual, else nothing   (eq. 4 and 5)
Symbols  x_i (N, C_i, H, W); B a residual block; N a node: 1x1 in trees, 3x3 in decoders.
Differs  The network is timm's, with pools that round up, so that every size goes through; multiples of 32 are
         unchanged. Decoders give logits at the size of the image and leave the soft-max to the loss. Upsampled maps
         are cropped where rounding made them larger than their neighbours.
"""

from torchive.methods.backbones.dla.aggregation import AggregationNode, HierarchicalAggregation, IterativeAggregation
from torchive.methods.backbones.dla.network import DLA
from torchive.methods.backbones.dla.segmenter import DLASegmenter
from torchive.methods.backbones.dla.upsampling import BilinearUp, DLAUp, IDAUp, NestedUp, SumUp

__all__ = [
    "DLA",
    "AggregationNode",
    "BilinearUp",
    "DLASegmenter",
    "DLAUp",
    "HierarchicalAggregation",
    "IDAUp",
    "IterativeAggregation",
    "NestedUp",
    "SumUp",
]
