"""From a point's feature and its box to a mask: template, weights, instance-aware convolution, predictor."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Variant = Literal["dynamic", "static", "template", "direct"]
Cues = Literal["both", "feature", "box"]


class InstanceAwareHead(nn.Module):
    """Features (P, C) and boxes (P, 4) of P points to mask logits (P, 2k, 2k).

    Args:
        channels: C.
        size: k, side of the template.
        template_channels: c.
        aware_channels: c'.
        hidden: of the weight generator.
        width: of the predictor.
        kernel_size: of the instance-aware convolutions: 1 or 3.
        depth: their number.
        variant: "dynamic", the paper's; "static" weights, the same for all points; "template", no such convolution; or
            "direct", the baseline: one linear layer to all logits.
        cues: what the weights are made from: "both", "feature" or "box".

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(
        self,
        channels: int,
        *,
        size: int = 14,
        template_channels: int = 16,
        aware_channels: int = 16,
        hidden: int = 256,
        width: int = 64,
        kernel_size: int = 1,
        depth: int = 1,
        variant: Variant = "dynamic",
        cues: Cues = "both",
    ) -> None:
        super().__init__()
        if variant not in ("dynamic", "static", "template", "direct") or cues not in ("both", "feature", "box"):
            raise ValueError(
                "expected variant dynamic, static, template or direct and cues both, feature or box, "
                f"got {variant!r} and {cues!r}"
            )
        if kernel_size not in (1, 3) or min(size, template_channels, aware_channels, depth) < 1:
            raise ValueError(
                "expected kernel_size 1 or 3 and size, channels and depth >= 1, "
                f"got {kernel_size}, {size}, {template_channels}, {aware_channels} and {depth}"
            )
        self.size, self.variant, self.cues, self.kernel_size = size, variant, cues, kernel_size
        self.template_channels, self.aware_channels = template_channels, aware_channels
        inputs = [template_channels, *[aware_channels] * (depth - 1)]
        self.weight_sizes = [n * aware_channels * kernel_size**2 for n in inputs]
        if variant == "direct":
            self.regressor = nn.Linear(channels, (2 * size) ** 2)
            return
        self.template = nn.Linear(channels, template_channels * size**2)
        convolved = variant in ("dynamic", "static")
        length = sum(self.weight_sizes) + depth * aware_channels
        if variant == "dynamic":
            given = {"both": channels + 4, "feature": channels, "box": 4}[cues]
            last = nn.Linear(hidden, length)
            self.generator = nn.Sequential(nn.Linear(given, hidden), nn.ReLU(inplace=True), last)
            nn.init.normal_(last.weight, std=0.01)  # at first nearly the same weights for all
            _init_filters(last.bias, self.weight_sizes, inputs, kernel_size)
        elif variant == "static":
            self.filters = nn.Parameter(torch.empty(length))
            _init_filters(self.filters, self.weight_sizes, inputs, kernel_size)
        self.predictor = nn.Sequential(
            nn.Conv2d(aware_channels if convolved else template_channels, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(width, 1, 1),
        )

    def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
        if self.variant == "direct":
            return self.regressor(features).unflatten(1, (2 * self.size, 2 * self.size))
        x = self.template(features).unflatten(1, (self.template_channels, self.size, self.size))  # (P, c, k, k)
        if self.variant in ("dynamic", "static"):
            x = self.aware(x, self.weights(features, boxes))
        return self.predictor(x)[:, 0]

    def weights(self, features: Tensor, boxes: Tensor) -> Tensor:
        """The numbers (P, W) of each point's convolutions: the weights of all, then their biases."""
        if self.variant == "static":
            return self.filters.expand(features.shape[0], -1)
        boxes = boxes.to(features.dtype)
        given = {"both": [features, boxes], "feature": [features], "box": [boxes]}[self.cues]
        found: Tensor = self.generator(torch.cat(given, 1))
        return found

    def aware(self, x: Tensor, weights: Tensor) -> Tensor:
        """Templates (P, c, k, k) through their own convolutions, each with a ReLU: (P, c', k, k)."""
        depth, out = len(self.weight_sizes), self.aware_channels
        parts = weights.split([*self.weight_sizes, *[out] * depth], 1)
        for weight, bias in zip(parts[:depth], parts[depth:], strict=True):
            rows = x.flatten(2) if self.kernel_size == 1 else F.unfold(x, 3, padding=1)  # (P, c s^2, k^2)
            rows = torch.baddbmm(bias[..., None], weight.unflatten(1, (out, -1)), rows)
            x = rows.relu_().unflatten(2, (self.size, self.size))
        return x


def _init_filters(vector: Tensor, sizes: list[int], inputs: list[int], kernel_size: int) -> None:
    """Weights as a convolution before a ReLU starts, zero biases."""
    with torch.no_grad():
        vector.zero_()
        for part, count in zip(vector[: sum(sizes)].split(sizes), inputs, strict=True):
            part.normal_(std=(2 / (count * kernel_size**2)) ** 0.5)
