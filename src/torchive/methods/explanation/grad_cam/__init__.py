r"""Grad-CAM: feature maps summed with the mean gradient of a score as weights, (N, C, H, W) to maps (N, 1, H, W).

Paper    Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
         ICCV 2017, arXiv:1610.02391.
Formula  alpha_k = (1/Z) sum_ij dy/dA^k_ij                                                              (eq. 1)
         L = ReLU( sum_k alpha_k A^k )                                                                  (eq. 2)
         counterfactual: alpha_k = (1/Z) sum_ij -dy/dA^k_ij                                             (section 3.3)
         guided Grad-CAM: guided back-propagation times the upsampled L
Symbols  A (N, K, h, w) the maps of a layer, Z = h w, y a score before the softmax, one per sample.
Relatives  Grad-CAM++ (Chattopadhay et al., WACV 2018, arXiv:1710.11063), HiResCAM (Draelos and Carin, 2020,
         arXiv:2011.08891), LayerCAM (Jiang et al., TIP 2021), CAM (Zhou et al., CVPR 2016, arXiv:1512.04150).
Differs  the authors' Lua release leaves out 1/Z: its maps are Z times these. Grad-CAM++ takes its weight in the closed
         form relu(g) / (2 + g sum A), which needs no small constant in the denominator.
"""

from torchive.methods.explanation.grad_cam.explain import CamMaps, GradCAM, guided_backpropagation
from torchive.methods.explanation.grad_cam.faithfulness import faithfulness, randomisation_check
from torchive.methods.explanation.grad_cam.localisation import boxes_from_maps, localised, pointing_game
from torchive.methods.explanation.grad_cam.maps import cam_from_fc, min_max, overlay
from torchive.methods.explanation.grad_cam.tracing import TokenGrid, last_spatial_layer

__all__ = [
    "CamMaps",
    "GradCAM",
    "TokenGrid",
    "boxes_from_maps",
    "cam_from_fc",
    "faithfulness",
    "guided_backpropagation",
    "last_spatial_layer",
    "localised",
    "min_max",
    "overlay",
    "pointing_game",
    "randomisation_check",
]
