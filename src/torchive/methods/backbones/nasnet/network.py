"""The stack of cells, for small images and for large ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from torchive.methods.backbones.nasnet.cell import SearchedCell
from torchive.methods.backbones.nasnet.genotype import NASNET_A, Genotype
from torchive.methods.backbones.nasnet.operations import norm
from torchive.protocols import Level

#: name -> stem, N, F, channels of the first convolution, whether cells after a reduction skip its input.
VARIANTS: dict[str, tuple[str, int, int, int, bool]] = {
    "large": ("imagenet", 6, 168, 96, True),  # 6 @ 4032
    "mobile": ("imagenet", 4, 44, 32, False),  # 4 @ 1056
    "cifar": ("cifar", 6, 32, 96, False),  # 6 @ 768
}


class NASNet(nn.Module):
    """A stack of searched cells: (N, C, H, W) to maps of strides 2, 4, 8, 16, 32, or 1, 2, 4 for small images.

    The stem for large images is a strided convolution and two reduction cells; that for small ones a convolution. Three
    stages of N normal cells follow, with a reduction cell and twice the channels between them.

    Args:
        variant: "large" (6 @ 4032), "mobile" (4 @ 1056) or "cifar" (6 @ 768, for small images).
        in_channels: C.
        repeats: N, instead of the variant's.
        channels: F of the first stage, instead of the variant's; the last map has 24 F with the cells of NASNet-A.
        stem_channels: of the first convolution, instead of the variant's.
        genotype: the cells; a ``Genotype``, or what its ``to_dict`` gives; NASNet-A if None.
        drop: of ``ScheduledDropPath`` in all cells: 0.3 for large, 0.4 for small images in the release.
        scheduled: whether the dropping grows in the course of training.

    Raises:
        ValueError: an unknown variant, numbers below one, or cells that cannot be; in ``forward``, an input that is not
            (N, C, H, W), or a side below 3.
    """

    levels: tuple[Level, ...]

    def __init__(
        self,
        variant: Literal["large", "mobile", "cifar"] = "mobile",
        *,
        in_channels: int = 3,
        repeats: int | None = None,
        channels: int | None = None,
        stem_channels: int | None = None,
        genotype: Genotype | Mapping[str, Any] | None = None,
        drop: float = 0.0,
        scheduled: bool = True,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        kind, own_repeats, own_channels, own_stem, self.skip = VARIANTS[variant]
        repeats = own_repeats if repeats is None else repeats
        width = own_channels if channels is None else channels
        stem = own_stem if stem_channels is None else stem_channels
        large = kind == "imagenet"
        if min(repeats, width, stem) < 1 or (large and width % 4):
            raise ValueError(
                f"expected repeats, channels and stem_channels of at least 1, channels in fours for large images, "
                f"got {repeats}, {width} and {stem}"
            )
        if genotype is None:
            genotype = NASNET_A
        elif not isinstance(genotype, Genotype):
            genotype = Genotype.from_dict(genotype)
        self.in_channels, self.genotype = in_channels, genotype
        stride, border = (2, 0) if large else (1, 1)
        self.stem = nn.Sequential(nn.Conv2d(in_channels, stem, 3, stride, border, bias=False), norm(stem))
        plans = _stack(large, repeats, width)
        self.cells = nn.ModuleList()
        outputs, strides, self.back = [stem], [stride], [-1]  # the first cell reads the stem twice
        for number, (filters, reduction, after) in enumerate(plans):
            if number:
                self.back.append(-3 if after and self.skip else -2)
            back = self.back[-1]
            cell = SearchedCell(
                genotype.reduction if reduction else genotype.normal,
                filters,
                in_channels=(outputs[-1], outputs[back]),
                stride=2 if reduction else 1,
                shrink=strides[back] != strides[-1],
                drop=drop,
                place=(number + 1) / len(plans),
                scheduled=scheduled,
                first=number == 0,
            )
            self.cells.append(cell)
            outputs.append(cell.out_channels)
            strides.append(strides[-1] * (2 if reduction else 1))
        last = {step: i for i, step in enumerate(strides)}
        self.ends = tuple(last.values())
        self.levels = tuple(Level(outputs[i], step) for step, i in last.items())
        if not large:
            for part in self.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eps = 1e-5

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        if min(x.shape[2:]) < 3:
            raise ValueError(f"each side must be at least 3, got {tuple(x.shape[2:])}")
        recent = [self.stem(x)]
        maps = [recent[0].relu()] if 0 in self.ends else []
        for number, (cell, back) in enumerate(zip(self.cells, self.back, strict=True), 1):
            recent = [*recent[-2:], cell(recent[-1], recent[back])]
            if number in self.ends:
                maps.append(recent[-1].relu())
        return maps


def _stack(large: bool, repeats: int, width: int) -> list[tuple[int, bool, bool]]:
    """For each cell its F, whether it is a reduction, and whether it follows one between two stages."""
    cells = [(width // 4, True, False), (width // 2, True, False)] if large else []
    cells += [(width, False, False)] * repeats
    for filters in (2 * width, 4 * width):
        cells += [(filters, True, False), (filters, False, True), *[(filters, False, False)] * (repeats - 1)]
    return cells
