r"""YOLOv3: one pass predicts, for each cell of three maps and each of three anchor shapes, a box, an objectness and K
independent classes.

Paper    Redmon, Farhadi, "YOLOv3: An Incremental Improvement", 2018, arXiv:1804.02767.
Formula  b_x = i + sigmoid(t_x), b_w = p_w exp(t_w), so for y and h, in cells and pixels                 (sec. 2.1)
         L = sum_pos s [BCE(t_xy) + (t_wh - log b_wh / p_wh)^2 / 2] + sum BCE(objectness) + sum_pos BCE(classes),
         s = 2 - w h; no objectness loss where a box that owns no object overlaps one by more than 0.5   (sec. 2.1)
         d(a, c) = 1 - IoU(a, c), shapes with a common centre                          (anchors by k-means, sec. 2.3)
Symbols  t raw outputs, p anchor shapes in pixels, i cell; A boxes of all maps, 10,647 for 416 pixels; K classes; w, h
         in fractions of the image; C, H, W channels and size of the images.
Differs  the loss is read off the released C code, which writes gradients and no loss: summed over an image, the mean
         over the batch. If ``train_sizes`` is given, the training size changes each batch, where the release draws one
         for ten. The place of a centre outside its cell, as of a box that leaves the image, is cut to the cell.
"""

from torchive.methods.detection.yolov3.darknet import Darknet53, TinyDarknet
from torchive.methods.detection.yolov3.model import YOLOv3
from torchive.methods.detection.yolov3.weights import read_darknet, write_darknet

__all__ = ["Darknet53", "TinyDarknet", "YOLOv3", "read_darknet", "write_darknet"]
