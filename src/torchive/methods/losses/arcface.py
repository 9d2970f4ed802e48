r"""ArcFace: classes are directions, and the right one must be nearer by an angle than it would need to be.

Paper    Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
         arXiv:1801.07698.
Formula  cos t_j = W_j . x / (|W_j| |x|),  L = -log softmax( s c )_y                                          (eq. 3)
         c_j = cos t_j for j != y,  c_y = cos(m1 t_y + m2) - m3                                               (eq. 4)
         ArcFace (1, m, 0), SphereFace (m, 0, 0), CosFace (1, 0, m)
         cos(t + m) = cos t cos m - sin t sin m, which falls with t up to t = pi - m; beyond, by the guard
         "linear": cos t - m sin m, "easy": the margin only where cos t > 0, "none": as it is
         sub-centres: cos t_j is the largest over the centres of class j
Symbols  x embedding (N, D), W class vectors (K, D) or (K, S, D), y class, t angles, s scale, m1 m2 m3 margins.
Differs  the gradient is that of the formula. The release shifts the angle in place without a gradient, so that its
         gradient passes as if there were no margin: ``margin_gradient=False``. With m1 other than 1 the linear guard is
         SphereFace's continuation (-1)^k cos(phi) - 2k of phi = m1 t + m2, k = floor(phi / pi).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Guard = Literal["linear", "easy", "none"]

_TINY = 1e-14  # under the root: 1 - cos^2 of equal directions may round to zero or below


def margin_cosine(
    cosine: Tensor, margins: Sequence[float] = (1.0, 0.5, 0.0), guard: Guard = "linear", *, gradient: bool = True
) -> Tensor:
    """The cosines of the right classes, any shape, with the margins (m1, m2, m3); see the module.

    Args:
        gradient: whether it is that of the margin too; otherwise it passes as through an identity.
    """
    m1, m2, m3 = margins
    if not gradient:
        with torch.no_grad():
            change = margin_cosine(cosine, margins, guard) - cosine
        return cosine + change
    if m1 == 1:
        shifted = cosine
        if m2 != 0:
            sine = (1 - cosine.square()).clamp(min=_TINY).sqrt()
            shifted = cosine * math.cos(m2) - sine * math.sin(m2)
            if guard == "linear":
                shifted = torch.where(cosine > math.cos(math.pi - m2), shifted, cosine - m2 * math.sin(m2))
    else:
        bound = 1 - 1e-7  # the angle has no gradient at its ends
        angle = m1 * cosine.clamp(-bound, bound).acos() + m2
        shifted = angle.cos()
        if guard == "linear":
            turns = (angle.detach() / math.pi).floor()
            shifted = (1 - 2 * turns.remainder(2)) * shifted - 2 * turns
    if guard == "easy":
        return torch.where(cosine > 0, shifted - m3, cosine)
    return shifted - m3


def flip_sum(network: nn.Module, images: Tensor) -> Tensor:
    """Unit embeddings (N, D) of images (N, C, H, W): that of an image and of its mirror image, added up."""
    both = F.normalize(network(images).float(), dim=1) + F.normalize(network(images.flip(-1)).float(), dim=1)
    return F.normalize(both, dim=1)


class EmbeddingHead(nn.Sequential):
    """The paper's head: maps (N, C, h, w) to embeddings (N, D) by batch norm, dropout, linear layer, batch norm.

    Args:
        in_channels: C.
        image_size: h and w of the maps: 7 for faces of 112 pixels.
        embedding_dim: D.
        drop: share of activations that are dropped in training.

    Raises:
        ValueError: a size below one.
    """

    def __init__(self, in_channels: int, *, image_size: int = 7, embedding_dim: int = 512, drop: float = 0.4) -> None:
        if min(in_channels, image_size, embedding_dim) < 1:
            raise ValueError(f"sizes must be >= 1, got {in_channels}, {image_size} and {embedding_dim}")
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.Dropout(drop),
            nn.Flatten(),
            nn.Linear(in_channels * image_size**2, embedding_dim),
            nn.BatchNorm1d(embedding_dim),
        )


class ArcFaceLoss(nn.Module):
    """Embeddings (N, D) and classes (N,) to a scalar, or to one value each with "none".

    The class vectors ``weight`` belong to the loss; they are thrown away after training, and embeddings are compared by
    their cosine. Samples of class -1 do not count. All is computed in float32 or better, also under autocast.

    Args:
        num_classes: K.
        embedding_dim: D.
        margins: m1, m2 in radians, m3.
        gamma: the scale s.
        guard: what happens where the margin would turn the angle past pi: "linear", "easy" or "none".
        centres: S vectors for each class, of which the nearest counts; the sub-centre extension has 3.
        margin_gradient: whether the gradient is that of the formula; the release's is not.
        reduction: "mean" over the samples that count, "sum" or "none".

    Raises:
        ValueError: an unknown ``guard`` or ``reduction``, a number out of range; in ``forward``, shapes that do not
            fit.
        TypeError: embeddings that are not floating, or classes that are.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        embedding_dim: int = 512,
        margins: Sequence[float] = (1.0, 0.5, 0.0),
        gamma: float = 64.0,
        guard: Guard = "linear",
        centres: int = 1,
        margin_gradient: bool = True,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if guard not in ("linear", "easy", "none"):
            raise ValueError(f"guard must be linear, easy or none, got {guard!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        if min(num_classes, embedding_dim, centres) < 1:
            raise ValueError(f"sizes must be >= 1, got {num_classes}, {embedding_dim} and {centres}")
        three = isinstance(margins, Sequence) and len(margins) == 3
        if not three or margins[0] <= 0 or not 0 <= margins[1] < math.pi or not gamma > 0:
            raise ValueError(
                f"expected margins (m1 > 0, 0 <= m2 < pi, m3) and gamma above zero, got {margins} and {gamma}"
            )
        self.margins, self.gamma, self.guard = (float(margins[0]), float(margins[1]), float(margins[2])), gamma, guard
        self.margin_gradient, self.reduction = margin_gradient, reduction
        shape = (num_classes, embedding_dim) if centres == 1 else (num_classes, centres, embedding_dim)
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.weight, std=0.01)

    def cosine(self, embeddings: Tensor) -> Tensor:
        """Cosines (N, K) of embeddings (N, D) with their classes, the nearest centre of each."""
        kind = torch.promote_types(torch.promote_types(embeddings.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            x, w = F.normalize(embeddings.to(kind), dim=1), F.normalize(self.weight.to(kind), dim=-1)
            if w.ndim == 2:
                return F.linear(x, w)
            return F.linear(x, w.flatten(0, 1)).unflatten(1, w.shape[:2]).amax(2)

    def logits(self, embeddings: Tensor, target: Tensor) -> Tensor:
        """Scaled cosines (N, K), with the margin at the right class of each sample that counts."""
        cosine = self.cosine(embeddings)
        label = target.clamp(min=0)[:, None]
        own = cosine.gather(1, label)  # (N, 1)
        moved = margin_cosine(own, self.margins, self.guard, gradient=self.margin_gradient)
        return self.gamma * cosine.scatter(1, label, torch.where(target[:, None] >= 0, moved, own))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        size = self.weight.shape[-1]
        if prediction.ndim != 2 or prediction.shape[1] != size or target.shape != prediction.shape[:1]:
            raise ValueError(f"expected (N, {size}) and (N,), got {tuple(prediction.shape)} and {tuple(target.shape)}")
        if not prediction.is_floating_point() or target.is_floating_point():
            kinds = f"{prediction.dtype} and {target.dtype}"
            raise TypeError(f"expected floating embeddings and integer classes, got {kinds}")
        each = F.cross_entropy(self.logits(prediction, target), target, ignore_index=-1, reduction="none")
        if self.reduction == "none":
            return each
        total = each.sum()
        return total if self.reduction == "sum" else total / (target >= 0).sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, margins={self.margins}, gamma={self.gamma}, guard={self.guard}"
