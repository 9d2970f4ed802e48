r"""Depth layering: each pixel says its class, its object's depth and the direction to its centre; templates group them.

Paper    Uhrig, Cordts, Franke, Brox, "Pixel-level Encoding and Depth Layering for Instance-level Semantic Labeling",
         GCPR 2016, arXiv:1604.05096.
Formula  direction(p) = floor(((angle(c_o - p) + 22.5) mod 360) / 45), c_o the mean pixel of what is seen of object o
         depth(p) = the bin of o's depth, one for all its pixels; bins grow with the depth
         L = CE(semantics) + CE(depth) + CE(direction), the last two with a class for what is no object
         d(p) = sum_k softmax_k(p) (cos 45 k, sin 45 k), the direction that is read from the classes
         score(p) = sum_u d(p + u) . t(u) / sqrt(sum_u |d(p + u)|^2 sum_u |t(u)|^2), t(u) = -u / |u| in a box whose
         sides are (object size) / (depth at p) and the category's aspect: normalised cross-correlation
         centres: maxima of the score, none in the box of a better one; a pixel goes to the nearest centre that its
         direction agrees with; parts of objects, whose directions do not cancel, join the part that these point to
Symbols  K classes with objects, S without, D bins of depth; C, H, W channels and size of the images.
Differs  depth is the object's size where the data have none; the tolerances of grouping are this project's, since the
         paper gives no numbers for them; without padding by 100 pixels. All on the card.
"""

from torchive.methods.segmentation.instance_depth_direction.decoding import Instances
from torchive.methods.segmentation.instance_depth_direction.encoding import Encoding, mean_aspects
from torchive.methods.segmentation.instance_depth_direction.model import InstanceDecoder, InstanceDepthDirection
from torchive.methods.segmentation.instance_depth_direction.network import FCN8s, VGGTrunk

__all__ = ["Encoding", "FCN8s", "InstanceDecoder", "InstanceDepthDirection", "Instances", "VGGTrunk", "mean_aspects"]
