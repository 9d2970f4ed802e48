"""The equations: activations and gradients to maps, and what makes a map visible. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = ("grad_cam", "grad_cam++", "hires_cam", "layer_cam")
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def class_maps(activations: Tensor, gradients: Tensor, variant: str = "grad_cam") -> Tensor:
    """Maps (N, 1, *S) of activations and gradients (N, K, *S); S any number of position axes.

    ``grad_cam`` is eq. 1 and 2. The relatives, all rectified at the end: ``grad_cam++`` weighs by
    ``sum_ij relu(g) g^2 / (2 g^2 + g^3 sum A)``, ``hires_cam`` sums ``g A`` over channels, ``layer_cam`` ``relu(g) A``.

    Raises:
        ValueError: an unknown variant, or shapes that differ.
    """
    if activations.shape != gradients.shape or activations.ndim < 3:
        raise ValueError(
            f"expected activations and gradients of one shape (N, K, *S), got {tuple(activations.shape)} and "
            f"{tuple(gradients.shape)}"
        )
    positions = tuple(range(2, activations.ndim))
    if variant == "grad_cam":
        summed = _weighted(activations, gradients.mean(positions))
    elif variant == "grad_cam++":
        total = activations.sum(positions, keepdim=True)
        # for g > 0, g^2 / (2 g^2 + g^3 sum A) is 1 / (2 + g sum A); where g <= 0 the rectifier makes the weight zero
        denominator = 2 + gradients * total
        weight = gradients.clamp(min=0) / denominator.where(denominator != 0, 1)
        summed = _weighted(activations, weight.sum(positions))
    elif variant == "hires_cam":
        summed = torch.einsum("nk...,nk...->n...", gradients, activations)
    elif variant == "layer_cam":
        summed = torch.einsum("nk...,nk...->n...", gradients.clamp(min=0), activations)
    else:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return summed.clamp(min=0)[:, None]  # (N, 1, *S)


def cam_from_fc(activations: Tensor, weight: Tensor, target: int | Tensor) -> Tensor:
    """CAM in closed form, (N, 1, *S): what Grad-CAM gives on a network that ends in a global mean and a linear layer.

    There ``y = sum_k w_k (1/Z) sum_ij A^k_ij + b``, so that ``alpha_k = w_k / Z`` and ``L = ReLU(sum_k w_k A^k) / Z``.

    Args:
        activations: A, (N, K, *S), what the mean is taken of.
        weight: of the linear layer, (classes, K).
        target: a class, or one for each sample (N,).

    Raises:
        ValueError: the weight does not have K columns.
    """
    if weight.ndim != 2 or weight.shape[1] != activations.shape[1]:
        raise ValueError(f"expected weights (classes, {activations.shape[1]}), got shape {tuple(weight.shape)}")
    rows = weight[torch.as_tensor(target, device=weight.device)].expand(len(activations), -1)  # (N, K)
    return _weighted(activations, rows / activations[0, 0].numel()).clamp(min=0)[:, None]


def _weighted(activations: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("nk...,nk->n...", activations, weights)


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (N, 1, *S) at another size, (bi-, tri-)linear, pixel centres kept in place."""
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode=_MODES[maps.ndim - 2], align_corners=False)


def min_max(maps: Tensor) -> Tensor:
    """Each sample stretched to [0, 1] for display; a constant map becomes zero."""
    if not maps.numel():
        return maps
    axes = tuple(range(1, maps.ndim))
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    span = high - low
    return (maps - low) / span.where(span > 0, 1)


def overlay(images: Tensor, maps: Tensor, *, opacity: float = 0.5) -> Tensor:
    """Images with their maps laid over in colour, from blue (low) over green to red (high).

    Args:
        images: (N, 1 or 3, H, W) in [0, 1].
        maps: (N, 1, H, W), stretched to [0, 1] here.
        opacity: share of the colours, 0 to 1.

    Returns:
        (N, 3, H, W) in [0, 1].

    Raises:
        ValueError: shapes that do not fit, or an opacity outside [0, 1].
    """
    fits = images.ndim == 4 and images.shape[1] in (1, 3) and maps.shape == (len(images), 1, *images.shape[2:])
    if not fits:
        raise ValueError(
            f"expected images (N, 1 or 3, H, W) and maps (N, 1, H, W), got {tuple(images.shape)}, {tuple(maps.shape)}"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], got {opacity}")
    place = 4 * min_max(maps) - images.new_tensor([3.0, 2.0, 1.0]).view(1, 3, 1, 1)  # from each colour's middle
    colours = (1.5 - place.abs()).clamp(0, 1)  # (N, 3, H, W): red, green, blue
    return torch.lerp(images.expand_as(colours), colours, opacity)
