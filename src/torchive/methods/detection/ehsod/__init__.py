r"""EHSOD: one two-stage detector, trained at once on images with boxes and on images of which the classes are known.

Paper    Fang et al., "EHSOD: CAM-Guided End-to-end Hybrid-Supervised Object Detection with Cascade Refinement",
         AAAI 2020, arXiv:2002.07421.
Formula  z = mean over the positions of M;  L_cam = CE(softmax(z), y / |y|) + [boxes] BCE(M, heat map of the boxes)
         rank = sigma(objectness) max_c sigma(M_c)
         phi_c = sum_r softmax_c(C f_r) softmax_r(D f_r);  L_img = BCE(phi, y)
         L = [boxes] L_rpn + l_cam L_cam + sum_k a_k ([boxes] (L_cls + L_box) + l_img L_img)
Symbols  M class activation maps beside the RPN, one for each level; y classes of the image; f_r features of proposal r;
         C, D linear layers; k stages of the cascade; a = 1, 0.5, 0.25; [boxes] images with boxes only.
Differs  The notes leave open what the sigmoids and weights are; this archive's choices: the product ranks, the heat map
         is compared by binary cross-entropy at every level, means over levels, l_cam = l_img = 1. Logits of the stages
         are averaged, as mmdetection does for Cascade R-CNN. No code of the authors exists.
"""

from torchive.methods.detection.ehsod.model import EHSOD

__all__ = ["EHSOD"]
