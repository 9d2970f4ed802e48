"""What a deformable network looks at: effective dilation, sampled locations, effective receptive field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchive.methods.blocks.deformable_conv.convolution import DeformConv2d


def effective_dilation(conv: DeformConv2d, x: Tensor) -> Tensor:
    """Mean distance of neighbouring taps, (N, G, H', W') in cells; of a plain convolution its dilation (section 3.4).

    Neighbours lie side by side or one above the other in the kernel.

    Raises:
        ValueError: a kernel of one tap.
    """
    height, width = conv.kernel_size
    if conv.taps == 1:
        raise ValueError("a kernel of one tap has no neighbours")
    at = conv.positions(x).unflatten(3, (height, width))  # (N, H', W', kh, kw, G, 2)
    steps = [at.diff(dim=3).norm(dim=-1).flatten(3, 4), at.diff(dim=4).norm(dim=-1).flatten(3, 4)]
    return torch.cat(steps, 3).mean(3).permute(0, 3, 1, 2)


def sampled_locations(positions: Sequence[Tensor], at: tuple[int, int], image: int = 0) -> Tensor:
    """The places that one output cell of a stack of layers reads: (K^L, 2), row and column in cells of the first input.

    Args:
        positions: ``DeformConv2d.positions`` of each layer, first to last; layers of other kinds in between must keep
            the cells. Of several offset groups the first counts.
        at: row and column of the output cell.
        image: of the batch.

    A tap between cells goes on from the nearest cell of the layer below and keeps its distance to it.
    """
    places = torch.tensor([at], dtype=positions[-1].dtype, device=positions[-1].device)  # (M, 2)
    for layer in reversed(positions):
        taps = layer[image, :, :, :, 0]  # (H', W', K, 2)
        limit = torch.tensor(taps.shape[:2], device=taps.device) - 1
        cell = torch.minimum(places.round().long().clamp(min=0), limit)
        places = (taps[cell[:, 0], cell[:, 1]] + (places - cell)[:, None]).flatten(0, 1)
    return places


def effective_receptive_field(network: nn.Module, x: Tensor) -> Tensor:
    """(H, W) mean size of the gradient of the middle cell of a map (N, C, H', W') with respect to the input.

    Luo et al., "Understanding the Effective Receptive Field", NIPS 2016, arXiv:1701.04128.
    """
    x = x.detach().requires_grad_()
    y = network(x)
    (gradient,) = torch.autograd.grad(y[:, :, y.shape[2] // 2, y.shape[3] // 2].sum(), x)
    return gradient.abs().mean((0, 1))


def field_radius(field: Tensor) -> float:
    """Root mean squared distance of an (H, W) field from its centre of mass, in cells."""
    share = field / field.sum()
    rows = torch.arange(field.shape[0], dtype=field.dtype, device=field.device)
    columns = torch.arange(field.shape[1], dtype=field.dtype, device=field.device)
    by_row, by_column = share.sum(1), share.sum(0)
    spread = [(w * (at - (w * at).sum()).square()).sum() for w, at in ((by_row, rows), (by_column, columns))]
    return float((spread[0] + spread[1]).sqrt())
