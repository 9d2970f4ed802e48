r"""Light-Head R-CNN: the second stage reads a thin position-sensitive map, so that a region costs one small layer.

Paper    Li, Peng, Yu, Zhang, Deng, Sun, "Light-Head R-CNN: In Defense of Two-Stage Object Detector", 2017,
         arXiv:1711.07264.
Formula  thin = relu(conv_1xk(conv_kx1(x)) + conv_kx1(conv_1xk(x))), k = 15, C_in -> C_mid -> 10 * 7 * 7    (sec. 3.1)
         bin (i, j) of channel c = mean of map c 49 + i 7 + j over the bin                   (sec. 3.1, as in R-FCN)
         region = relu(FC_2048(10 * 7 * 7)) -> K + 1 scores, 4 offsets for all classes                    (sec. 3.2)
Symbols  x the features of stride 16, C_in channels; C_mid 256, or 64 in the small form; K classes without background;
         A anchors, P proposals, N, C, H, W of the images.
Differs  objectness is one sigmoid for an anchor, not a softmax of two. Position-sensitive pooling averages two by two
         points of each bin, where the first release averages whole cells of rounded boxes and the later one takes the
         largest of two by two points. The small Xception of the paper's fast form is not here: any backbone serves.
"""

from torchive.methods.detection.light_head_rcnn.model import LightHeadRCNN
from torchive.methods.detection.light_head_rcnn.thin_map import LargeSeparableConv

__all__ = ["LargeSeparableConv", "LightHeadRCNN"]
