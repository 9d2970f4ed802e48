"""The mask head whose weights come in with the objects."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DynamicMaskHead(nn.Module):
    """1x1 convolutions, each object with its own; it has no parameters itself.

    A vector of ``parameters_per_object`` numbers holds the weights of all layers, then their biases; a layer's weights
    run output by output. The first layer reads two relative coordinates and then the mask features.

    Args:
        in_channels: of the mask features.
        channels: of the layers inside.
        depth: number of layers.
        coordinates: whether the first layer reads the place relative to the object.
    """

    def __init__(self, *, in_channels: int = 8, channels: int = 8, depth: int = 3, coordinates: bool = True) -> None:
        super().__init__()
        if min(in_channels, channels) < 1 or depth < 2:
            raise ValueError(f"expected channels >= 1 and depth >= 2, got {in_channels}, {channels} and {depth}")
        self.in_channels, self.channels, self.depth, self.coordinates = in_channels, channels, depth, coordinates
        inputs = [in_channels + 2 * coordinates, *[channels] * (depth - 1)]
        outputs = [*[channels] * (depth - 1), 1]
        self.weight_sizes = [a * b for a, b in zip(inputs, outputs, strict=True)]
        self.bias_sizes = outputs
        self.parameters_per_object = sum(self.weight_sizes) + sum(outputs)

    def split(self, parameters: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights (n, out, in) and biases (n, out, 1) of each layer, from (n, ``parameters_per_object``).

        Raises:
            ValueError: vectors of another length.
        """
        if parameters.ndim != 2 or parameters.shape[1] != self.parameters_per_object:
            raise ValueError(f"expected (n, {self.parameters_per_object}) parameters, got {tuple(parameters.shape)}")
        parts = parameters.split([*self.weight_sizes, *self.bias_sizes], 1)
        weights = [w.unflatten(1, (out, -1)) for w, out in zip(parts[: self.depth], self.bias_sizes, strict=True)]
        return weights, [b.unsqueeze(-1) for b in parts[self.depth :]]

    def forward(self, features: Tensor, parameters: Tensor, points: Tensor, reach: Tensor, stride: int) -> Tensor:
        """Logits (*, n, 1, h, w) of n objects in each image.

        The objects share the features, and a linear map of the relative place is a part for the column plus one for the
        row; so the first layer is one matrix product for all objects and two sums, and no object needs a copy of the
        features. It equals the grouped convolution of the published code.

        Args:
            features: (*, C, h, w), of one image or of a batch.
            parameters: (*, n, ``parameters_per_object``).
            points: (*, n, 2), x and y of the objects' locations in pixels.
            reach: (*, n), pixels that are one unit of the relative coordinates.
            stride: pixels of a cell of the features.
        """
        shape, (height, width) = parameters.shape[:-1], features.shape[-2:]
        weights, biases = self.split(parameters.flatten(0, -2))
        points, reach = points.flatten(0, -2), reach.flatten()
        first = weights[0][:, :, 2:] if self.coordinates else weights[0]
        first = first.reshape(*shape[:-1], -1, self.in_channels)  # (*, n * c, C)
        x = (first @ features.flatten(-2)).reshape(-1, self.channels, height, width)  # all objects of all images
        bias = biases[0]
        if self.coordinates:
            across, down = (
                relative_places(size, stride, points[:, k], reach) for k, size in enumerate((width, height))
            )
            x += (weights[0][:, :, :1] * across.to(x.dtype)[:, None])[:, :, None]
            bias = bias + weights[0][:, :, 1:2] * down.to(x.dtype)[:, None]  # (n, c, h)
        x += bias[..., None]
        x = x.flatten(2)
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            x = torch.baddbmm(bias, weight, x.relu_())  # (n, c, h * w), at last (n, 1, h * w)
        return x.reshape(*shape, 1, height, width)


def relative_places(count: int, stride: int, place: Tensor, reach: Tensor) -> Tensor:
    """(place - centre of the cell) / reach along one axis, (n, count): cells have their centres as points have."""
    cells = torch.arange(count, device=place.device, dtype=place.dtype) * stride + stride // 2
    return (place[:, None] - cells) / reach[:, None]
