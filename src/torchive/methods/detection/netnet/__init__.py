r"""NETNet: the maps of SSD, changed so that each holds the objects of its own scale: what belongs to larger objects is
erased from a shallow map and added to a deeper one.

Paper    Li, Pang, Shen, Cao, Shao, "NETNet: Neighbor Erasing and Transferring Network for Better Single Shot Object
         Detection", CVPR 2020, arXiv:2001.06690.
Formula  g = sigmoid(Up(G(p_d))), e = p_s * g                                           (what larger objects gave p_s)
         p_s' = p_s - e                                                                              (erasing, NEM)
         p_d' = p_d + C(Down(e))                                                                (transferring, NTM)
         f_s = H(Down(p_(s-1))) + H(p_s) + H(Up(p_(s+1))), before these                               (fusion, NNFM)
Symbols  p_s, p_d a shallow and a deep map, by default the pairs (1, 3) and (2, 4) of SSD's six; G, C, H convolutions
         1 x 1 with weights of their own; Up bilinear, Down max pooling; * element by element. N images, A default
         boxes, K classes without background; C, H, W channels and size of the images.
Differs  no code was released and the paper was not at hand: the forms are the specification's. C has no bias, so that
         nothing erased is nothing transferred; the optional 3 x 3 convolution behind the fusion is left out. Default
         boxes, loss and decoding are those of SSD in this archive.
"""

from torchive.methods.detection.netnet.exchange import NearestFusion, NeighbourExchange, TopDownFusion
from torchive.methods.detection.netnet.model import NETNet

__all__ = ["NETNet", "NearestFusion", "NeighbourExchange", "TopDownFusion"]
