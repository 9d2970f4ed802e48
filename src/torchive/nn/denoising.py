"""Learning by reconstruction: the denoising auto-encoder that contrastive training is measured against."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.encoder import build_encoder
from torchive.nn.views import SimCLRViews
from torchive.structures import Batch


class DenoisingAutoEncoder(nn.Module):
    """Train an encoder to give back clean images from corrupted ones; ``deployable`` is the encoder.

    Vincent et al., "Extracting and Composing Robust Features with Denoising Autoencoders", ICML 2008; with hidden
    patches in the manner of He et al., arXiv:2111.06377. The encoder is that of ``SimCLR`` of the same arguments. All
    views of a batch (N, V, C, H, W) are images of their own, so it sees as many as contrastive training does.

    Args:
        backbone, in_channels, stem, feature_dim: as ``torchive.nn.encoder.build_encoder``.
        image_size: side of the images that come out, in pixels.
        corruption: "noise" adds Gaussian noise, "patches" sets square patches to zero.
        noise: deviation of the noise.
        hidden: share of the patches that are set to zero; then only these are scored.
        patch: side of a patch, in pixels.
        widths: channels of the decoder, from 4 x 4 pixels upwards, halved from stage to stage from this.

    Raises:
        ValueError: an unknown corruption, a size below 4 or a share outside (0, 1); in ``losses``, inputs of another
            shape.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "timm/resnet18",
        *,
        in_channels: int = 3,
        image_size: int = 64,
        corruption: Literal["noise", "patches"] = "noise",
        noise: float = 0.5,
        hidden: float = 0.5,
        patch: int = 8,
        widths: int = 128,
        stem: Literal["backbone", "small"] = "backbone",
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        if corruption not in ("noise", "patches"):
            raise ValueError(f"corruption must be noise or patches, got {corruption!r}")
        if image_size < 4 or patch < 1 or not 0 < hidden < 1:
            raise ValueError(
                f"expected image_size >= 4, patch >= 1, hidden in (0, 1); got {image_size}, {patch}, {hidden}"
            )
        self.image_size, self.corruption, self.noise = image_size, corruption, noise
        self.hidden, self.patch = hidden, patch
        self.encoder = build_encoder(backbone, in_channels=in_channels, stem=stem, feature_dim=feature_dim)
        self.decoder = _decoder(self.encoder.feature_dim, in_channels, image_size, widths)

    @staticmethod
    def views(image_size: int, **options: Any) -> SimCLRViews:
        """The views of contrastive training, so that both learn from the same images."""
        return SimCLRViews(image_size, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        """Features (N, D) of images (N, C, H, W)."""
        return self.encoder(inputs)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss": mean squared error}`` of the images given back, (N, C, S, S) or (N, V, C, S, S) going in."""
        images = batch.inputs.flatten(0, 1) if batch.inputs.ndim == 5 else batch.inputs
        if images.ndim != 4 or tuple(images.shape[2:]) != (self.image_size,) * 2:
            raise ValueError(
                f"expected images of {self.image_size} x {self.image_size} pixels, got {tuple(batch.inputs.shape)}"
            )
        corrupted, scored = self._corrupt(images)
        error = (self.decoder(self.encoder(corrupted)) - images).square()
        return {"loss": error.mean() if scored is None else (error * scored).sum() / (scored.sum() * images.shape[1])}

    def deployable(self) -> nn.Module:
        """The encoder, images (N, C, H, W) to features (N, D)."""
        return self.encoder

    def _corrupt(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.corruption == "noise":
            return images + self.noise * torch.randn_like(images), None
        n, _, height, width = images.shape
        rows, columns = -(-height // self.patch), -(-width // self.patch)
        scores = torch.rand(n, rows * columns, device=images.device)
        count = min(max(round(self.hidden * rows * columns), 1), rows * columns)
        mask = torch.zeros_like(scores).scatter_(1, scores.topk(count, dim=1).indices, 1.0).view(n, 1, rows, columns)
        mask = F.interpolate(mask, scale_factor=float(self.patch))[..., :height, :width].to(images.dtype)
        return images * (1 - mask), mask


def _decoder(features: int, channels: int, size: int, width: int) -> nn.Sequential:
    """Features (N, D) to images (N, C, S, S): a 4 x 4 map, doubled until it reaches S."""
    parts: list[nn.Module] = [nn.Linear(features, width * 16), nn.Unflatten(1, (width, 4, 4))]
    for _ in range(math.ceil(math.log2(size / 4))):
        narrow = max(width // 2, 16)
        parts += [nn.Upsample(scale_factor=2), nn.Conv2d(width, narrow, 3, padding=1, bias=False)]
        parts += [nn.BatchNorm2d(narrow), nn.ReLU(inplace=True)]
        width = narrow
    parts += [nn.Upsample(size=(size, size), mode="bilinear"), nn.Conv2d(width, channels, 3, padding=1)]
    return nn.Sequential(*parts)
