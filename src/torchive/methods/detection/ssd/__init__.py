r"""SSD: class scores and box offsets for fixed default boxes, read off feature maps of several sizes by one
convolution each.

Paper    Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, arXiv:1512.02325.
Formula  L = (1/N) (L_conf + alpha L_loc), zero where N = 0                                          (eq. 1)
         L_loc = sum_pos smooth_L1(l - g), g the R-CNN code with variances 0.1 and 0.2               (eq. 2)
         L_conf = - sum_pos log softmax_label - sum_mined negatives log softmax_background           (eq. 3)
         s_k = 0.2 + 0.7 (k - 1) / (m - 1), w = s sqrt(a), h = s / sqrt(a), centres (i + 0.5) / f    (eq. 4)
Symbols  N matched default boxes of the batch; A default boxes, 8732 for 300 pixels; K classes without background; C,
         H, W channels and size of the images.
Differs  network, head and L2 normalisation are torchvision's; default boxes, matching, mining and loss are written here
         after the paper, since torchvision's default boxes are those of the authors' COCO script. K sigmoids are an
         option.
"""

from torchive.methods.detection.ssd.model import SSD

__all__ = ["SSD"]
