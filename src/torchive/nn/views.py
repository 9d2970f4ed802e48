"""SimCLR's views of an image (arXiv:2002.05709): crop, flip, colour, blur, drawn independently."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2


class SimCLRViews(nn.Module):
    """One image (C, H, W), float in [0, 1], C one or three, to two views (2, C, S, S) in [0, 1].

    In this order: a random crop resized to S, a flip, colour jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s for brightness,
    contrast, saturation and hue), grey, a Gaussian blur with sigma in (0.1, 2) and a kernel of a tenth of the side. On
    grey images the jitter is of brightness and contrast alone. CIFAR: ``strength=0.5, blur=0``. A zero leaves a step
    out. All draws come from torch's global generator.

    Args:
        image_size: S.
        area: smallest and largest share of the image that is cut out; (1, 1) with ``aspect`` (1, 1) takes it whole.
        aspect: smallest and largest width over height of the crop.
        flip: probability of a horizontal flip.
        jitter: probability of the colour jitter.
        strength: s, of the colour jitter.
        grey: probability of a grey image.
        blur: probability of the blur.
        views: number of views.

    Raises:
        ValueError: a size or number of views below one, a probability outside [0, 1]; in ``forward``, another shape.
    """

    def __init__(
        self,
        image_size: int,
        *,
        area: tuple[float, float] = (0.08, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        jitter: float = 0.8,
        strength: float = 1.0,
        grey: float = 0.2,
        blur: float = 0.5,
        views: int = 2,
    ) -> None:
        super().__init__()
        if image_size < 1 or views < 1 or strength < 0:
            raise ValueError(
                f"image_size and views must be >= 1, strength >= 0; got {image_size}, {views} and {strength}"
            )
        if not all(0 <= p <= 1 for p in (flip, jitter, grey, blur)):
            raise ValueError(f"probabilities must lie in [0, 1], got {flip}, {jitter}, {grey} and {blur}")
        self.image_size, self.views = image_size, views
        self.jitter, self.grey = jitter, grey
        self.crop = v2.RandomResizedCrop(
            image_size, scale=area, ratio=aspect, interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        self.flip = v2.RandomHorizontalFlip(flip) if flip else None
        wide = 0.8 * strength
        self.colour = v2.ColorJitter(wide, wide, wide, 0.2 * strength) if jitter and strength else None
        self.light = v2.ColorJitter(wide, wide) if jitter and strength else None
        kernel = 2 * (image_size // 20) + 1  # the authors' radius: half of a tenth of the side
        self.blur = v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], blur) if blur and kernel > 1 else None

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 3 or image.shape[0] not in (1, 3) or not image.is_floating_point():
            raise ValueError(f"expected a float image (1 or 3, H, W), got {tuple(image.shape)} of {image.dtype}")
        return torch.stack([self._view(image) for _ in range(self.views)])

    def _view(self, image: Tensor) -> Tensor:
        x = self.crop(image).clamp(0, 1)  # bicubic weights overshoot
        if self.flip is not None:
            x = self.flip(x)
        jitter = self.colour if len(x) == 3 else self.light
        if jitter is not None and float(torch.rand(())) < self.jitter:
            x = jitter(x)
        if self.grey and len(x) == 3 and float(torch.rand(())) < self.grey:
            x = v2.functional.rgb_to_grayscale(x, num_output_channels=3)
        return x if self.blur is None else self.blur(x)
