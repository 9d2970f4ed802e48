r"""Faster R-CNN: a small network slid over shared features proposes boxes, a second stage classifies and refines them.

Paper    Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", NeurIPS 2015,
         arXiv:1506.01497.
Formula  L = (1/N_cls) sum_i CE(p_i, p*_i) + lambda (1/N_reg) sum_i p*_i smooth_L1(t_i - t*_i)       (eq. 1)
         t_x = (x - x_a) / w_a,  t_y = (y - y_a) / h_a,  t_w = log(w / w_a),  t_h = log(h / h_a)     (eq. 2)
Symbols  i sampled anchors, 256 for each image; p objectness; a anchor; * truth; N_cls = 256, N_reg anchor positions,
         lambda = 10; A anchors, P proposals of an image; K classes without background; C, H, W channels and size of
         images.
Differs  RPN head, samplers, matcher and second stage are torchvision's. Objectness is one sigmoid, not a softmax of
         two. With a feature pyramid the loss, the kept cross-boundary anchors and the counts follow torchvision; with
         one map the paper. RoIAlign takes the place of RoI pooling. FiLM on the RPN's 3x3 convolution is an option of
         this archive.
"""

from torchive.methods.detection.faster_rcnn.model import FasterRCNN

__all__ = ["FasterRCNN"]
