r"""Match R-CNN: clothes detected with masks and landmarks, and matched between the photographs of users and shops.

Paper    Ge et al., "DeepFashion2: A Versatile Benchmark for Detection, Pose Estimation, Segmentation and
         Re-Identification of Clothing Images", CVPR 2019, arXiv:1901.07973.
Formula  L = L_cls + L_box + L_pose + L_mask + L_pair, beside the proposals' own losses           (section 4.1)
         L_pose = -mean log softmax(h_p)[c_p],  over the landmarks p of the item's own class
         v = MN(features),  score(a, b) = softmax(W (v_a - v_b)^2 + w_0),  L_pair = -mean log score[same]
Symbols  h_p heatmap (S, S) of landmark p, c_p its cell, v (E,) the vector of an item, W (2, E); K classes, P landmarks
         of all classes, M the most that one has; N, C, H, W of the images, A anchors, D detections of an image, I items
         of a batch, Q and G items of query and gallery.
Differs  the model was not released: widths of the heads are Mask R-CNN's, of the matching network convolutions of 256
         and a mean over positions. It learns from the items' true boxes. All user-shop pairs of a batch that are the
         same item are learnt, and three different ones for each. A landmark is the top of a parabola over the 56 x 56
         cells, which an export can follow, in place of a heatmap enlarged to the box.
"""

from torchive.methods.detection.deepfashion2_match_rcnn.decoding import decode_landmarks
from torchive.methods.detection.deepfashion2_match_rcnn.heads import LandmarkHead
from torchive.methods.detection.deepfashion2_match_rcnn.losses import landmark_loss, sample_pairs
from torchive.methods.detection.deepfashion2_match_rcnn.matching import MatchingNetwork
from torchive.methods.detection.deepfashion2_match_rcnn.model import MatchRCNN

__all__ = ["LandmarkHead", "MatchRCNN", "MatchingNetwork", "decode_landmarks", "landmark_loss", "sample_pairs"]
