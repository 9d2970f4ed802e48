"""The two-stage route to fine segmentation: a coarse network finds the region, a second one segments its crop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.dice import SoftDiceLoss
from torchive.nn.unet import WIDTHS, UNet, resize, segmentations
from torchive.structures import Segmentation


class TwoStageUNet(nn.Module):
    """Coarse-to-fine cascade of two plain U-Nets as a segmentation system: (N, C, *S) to logits (N, K, *S).

    The coarse network sees the whole image at ``scale``; the bounding box of what it calls foreground, widened by
    ``margin``, is cropped at ``crop`` times the full size and segmented by the fine network, whose logits replace the
    coarse ones there. The fine network trains on the crop of the true foreground, so both stages train at once. It is
    the multi-stage answer that attention gates are to replace. Class 0 is the background.

    Args:
        num_classes: K, background included.
        in_channels: C.
        widths: channels of each level of both networks.
        ndim: 2 or 3.
        scale: size of the coarse network's input, relative to the image.
        crop: size of the fine network's input, relative to the image.
        margin: side of the crop relative to the box found.
        loss: of logits and classes, applied to both stages; soft Dice if None.

    Raises:
        ValueError: ``scale`` or ``crop`` outside (0, 1], ``margin`` below one.
    """

    task = "segmentation"

    def __init__(
        self,
        *,
        num_classes: int = 2,
        in_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        ndim: int = 2,
        scale: float = 0.5,
        crop: float = 0.5,
        margin: float = 1.5,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not (0 < scale <= 1 and 0 < crop <= 1 and margin >= 1):
            raise ValueError(f"expected scale and crop in (0, 1] and margin >= 1, got {scale}, {crop} and {margin}")
        self.scale, self.crop, self.margin = scale, crop, margin
        self.coarse = UNet(num_classes=num_classes, in_channels=in_channels, widths=widths, ndim=ndim)
        self.fine = UNet(num_classes=num_classes, in_channels=in_channels, widths=widths, ndim=ndim)
        self.loss = SoftDiceLoss() if loss is None else loss

    def forward(self, inputs: Tensor) -> Tensor:
        size = inputs.shape[2:]
        coarse = resize(self._coarse(inputs), size)  # (N, K, *S)
        centre, half = foreground_box(coarse.argmax(1) > 0, self.margin)
        fine = self.fine(self._sample(inputs, centre, half))  # (N, K, *crop)
        back = _grid(-centre / half, 1 / half, size)  # (N, *S, ndim): where each pixel lies in the crop
        inside = (back.abs() <= 1).all(-1)[:, None]
        return torch.where(inside, F.grid_sample(fine, back, align_corners=False, padding_mode="border"), coarse)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``coarse`` and ``fine``: the loss of each stage, of (N, C, *S) images and (N, *S) classes."""
        centre, half = foreground_box((targets > 0) & (targets < 255), self.margin)
        crop = self._sample(inputs, centre, half)
        truth = F.grid_sample(
            targets[:, None].to(inputs.dtype),
            _grid(centre, half, crop.shape[2:]),
            mode="nearest",
            padding_mode="border",
            align_corners=False,
        )
        coarse = resize(self._coarse(inputs), inputs.shape[2:])
        return {"coarse": self.loss(coarse, targets), "fine": self.loss(self.fine(crop), truth[:, 0].round().long())}

    def predict(self, inputs: Tensor) -> list[Segmentation]:
        """The class of each pixel with its scores, one ``Segmentation`` per image."""
        return segmentations(self(inputs))

    def _coarse(self, inputs: Tensor) -> Tensor:
        return self.coarse(resize(inputs, [max(round(s * self.scale), 1) for s in inputs.shape[2:]]))

    def _sample(self, inputs: Tensor, centre: Tensor, half: Tensor) -> Tensor:
        size = [max(round(s * self.crop), 1) for s in inputs.shape[2:]]
        return F.grid_sample(inputs, _grid(centre, half, size), align_corners=False, padding_mode="border")


def foreground_box(mask: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Centre and half side, (N, ndim) each, of a mask's bounding box widened by ``margin``, in [-1, 1] with x first.

    The box of an empty mask is the whole image; no box is wider than that or narrower than an eighth.
    """
    lows, highs = [], []
    for axis in range(mask.ndim - 1, 0, -1):  # x first, as grid_sample wants it
        length = mask.shape[axis]
        others = [a for a in range(1, mask.ndim) if a != axis]
        seen = mask.float().amax(others) > 0  # (N, length)
        place = torch.arange(length, device=mask.device).expand_as(seen)
        empty = ~seen.any(1)
        lows.append(torch.where(empty, 0, place.masked_fill(~seen, length).amin(1)) * 2 / length - 1)
        highs.append(torch.where(empty, length, place.masked_fill(~seen, -1).amax(1) + 1) * 2 / length - 1)
    low, high = torch.stack(lows, 1), torch.stack(highs, 1)
    return (low + high) / 2, ((high - low) / 2 * margin).clamp(0.125, 1)


def _grid(centre: Tensor, half: Tensor, size: Sequence[int]) -> Tensor:
    """Sampling positions (N, *size, ndim) of the box around ``centre``, in [-1, 1] of the source."""
    theta = torch.cat([torch.diag_embed(half), centre[..., None]], 2)  # (N, ndim, ndim + 1)
    return F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
