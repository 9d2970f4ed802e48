r"""BlazeFace: faces, with key points, found by a small network of depthwise blocks, square anchors on two maps, and
overlapping boxes averaged in the place of suppression.

Paper    Bazarevsky et al., "BlazeFace: Sub-millisecond Neural Face Detection on Mobile GPUs", CVPR Workshops 2019,
         arXiv:1907.05047.
Formula  y = ReLU(P(D(x)) + S(x)), double: y = ReLU(P2(D2(ReLU(P1(D1(x))))) + S(x))                      (fig. 1)
         operations of D: k^2 C H W; of P: C C' H W; their ratio k^2 / C'                             (sec. 3.1)
         box of a group: sum_i s_i b_i / sum_i s_i over the boxes that overlap its best one              (sec. 3.4)
Symbols  D depthwise k x k, P pointwise convolution, S the input, pooled where the stride is two, with channels of
         zeros; s scores, b boxes and key points; A anchors, 896 for 128 pixels; K classes; P key points, six for
         faces; N, C, H, W images, channels and size.
Differs  the paper names no loss: matching and hard negatives are SSD's, smooth L1 of boxes and points is relative to
         the distance of the eyes. Batch norm in training; the released weights have it folded in.
"""

from torchive.methods.faces.blazeface.jitter import jitter
from torchive.methods.faces.blazeface.model import BlazeFace
from torchive.methods.faces.blazeface.network import BlazeBlock, BlazeNet, DoubleBlazeBlock
from torchive.methods.faces.blazeface.weights import from_tflite, read_tflite
from torchive.methods.faces.blazeface.windows import detect_in_windows

__all__ = [
    "BlazeBlock",
    "BlazeFace",
    "BlazeNet",
    "DoubleBlazeBlock",
    "detect_in_windows",
    "from_tflite",
    "jitter",
    "read_tflite",
]
