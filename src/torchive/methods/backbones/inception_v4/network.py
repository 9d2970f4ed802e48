"""The three networks from one table, at any width, depth, scale and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchive.methods.backbones.inception_v4.parts import Branches, Padding, ResidualBranches
from torchive.protocols import Level


@dataclass(frozen=True)
class Unit:
    """Branches that are run ``count`` times; with a ``scale`` they are residual."""

    branches: tuple[str, ...]
    count: int = 1
    scale: float | None = None
    act: bool = True
    repeated: bool = False


def _blocks(count: int, scale: float | None, *branches: str) -> Unit:
    return Unit(branches, count, scale, repeated=True)


def _table(variant: str) -> tuple[tuple[Unit, ...], ...]:
    """The stages of strides 2, 4, 8, 16 and 32, each a row of units."""
    first = (Unit(("3x3:32/2",)), Unit(("3x3:32v",)), Unit(("3x3:64",)))
    plain = (Unit(("max/2",)), Unit(("1x1:80",)), Unit(("3x3:192v",)))
    if variant == "inception_v4":
        branched = (
            Unit(("max/2", "3x3:96/2")),
            Unit(("1x1:64 3x3:96v", "1x1:64 1x7:64 7x1:64 3x3:96v")),
        )
        a = _blocks(4, None, "1x1:96", "1x1:64 3x3:96", "1x1:64 3x3:96 3x3:96", "avg 1x1:96")
        b = _blocks(
            *(7, None, "1x1:384", "1x1:192 1x7:224 7x1:256", "1x1:192 7x1:192 1x7:224 7x1:224 1x7:256", "avg 1x1:128")
        )
        c = _blocks(
            *(3, None, "1x1:256", "1x1:384 1x3:256|3x1:256", "1x1:384 3x1:448 1x3:512 1x3:256|3x1:256", "avg 1x1:256")
        )
        to_b = Unit(("3x3:384/2", "1x1:192 3x3:224 3x3:256/2", "max/2"))
        to_c = Unit(("1x1:192 3x3:192/2", "1x1:256 1x7:256 7x1:320 3x3:320/2", "max/2"))
        return first, branched, (Unit(("3x3:192/2", "max/2")), a), (to_b, b), (to_c, c)
    if variant == "inception_resnet_v1":
        a = _blocks(5, 0.17, "1x1:32", "1x1:32 3x3:32", "1x1:32 3x3:32 3x3:32")
        b = _blocks(10, 0.10, "1x1:128", "1x1:128 1x7:128 7x1:128")
        c = _blocks(5, 0.20, "1x1:192", "1x1:192 1x3:192 3x1:192")
        to_b = Unit(("3x3:384/2", "1x1:192 3x3:192 3x3:256/2", "max/2"))
        to_c = Unit(("1x1:256 3x3:384/2", "1x1:256 3x3:256/2", "1x1:256 3x3:256 3x3:256/2", "max/2"))
        return first, plain, (Unit(("3x3:256/2",)), a), (to_b, b), (to_c, c)
    if variant == "inception_resnet_v2":
        a = _blocks(10, 0.17, "1x1:32", "1x1:32 3x3:32", "1x1:32 3x3:48 3x3:64")
        b = _blocks(20, 0.10, "1x1:192", "1x1:128 1x7:160 7x1:192")
        tail = ("1x1:192", "1x1:192 1x3:224 3x1:256")
        to_a = Unit(("1x1:96", "1x1:48 5x5:64", "1x1:64 3x3:96 3x3:96", "avg 1x1:64"))
        to_b = Unit(("3x3:384/2", "1x1:256 3x3:256 3x3:384/2", "max/2"))
        to_c = Unit(("1x1:256 3x3:384/2", "1x1:256 3x3:288/2", "1x1:256 3x3:288 3x3:320/2", "max/2"))
        last = (_blocks(9, 0.20, *tail), Unit(tail, scale=1.0, act=False), Unit(("1x1:1536",)))
        return first, plain, (Unit(("max/2",)), to_a, a), (to_b, b), (to_c, *last)
    raise ValueError(f"variant must be inception_v4, inception_resnet_v1 or inception_resnet_v2, got {variant!r}")


class Inception(nn.Module):
    """Inception-v4 and Inception-ResNet v1 and v2: (N, C, H, W) to five maps of strides 2, 4, 8, 16, 32.

    An image of 299 pixels gives maps of 147, 71, 35, 17 and 8; the smallest has 75. With "same" padding a map has
    ceil(H / stride) rows, for dense prediction; the weights are of the same shapes.

    Args:
        variant: "inception_v4", "inception_resnet_v1" or "inception_resnet_v2".
        in_channels: C.
        multiplier: factor on all channels.
        layers: number of blocks A, B and C instead of the variant's: 4, 7, 3; 5, 10, 5; or 10, 20, 9.
        residual_scale: of all residual blocks instead of the variant's 0.17, 0.10 and 0.20; one is no scaling.
        residual: whether residual blocks add their input; without, the same branches in a chain.
        padding: "valid" is the paper's, without padding in the stem and at strides; "same" pads everywhere.

    Raises:
        ValueError: an unknown variant, not three counts, ``multiplier`` not above zero; in ``forward``, an input that
            is not (N, C, H, W), or a side below 75 with "valid" padding.
    """

    levels: tuple[Level, ...]

    def __init__(
        self,
        variant: str = "inception_v4",
        *,
        in_channels: int = 3,
        multiplier: float = 1.0,
        layers: Sequence[int] | None = None,
        residual_scale: float | None = None,
        residual: bool = True,
        padding: Padding = "valid",
    ) -> None:
        super().__init__()
        if multiplier <= 0:
            raise ValueError(f"multiplier must be above 0, got {multiplier}")
        if layers is not None and (len(layers) != 3 or min(layers) < 0):
            raise ValueError(f"layers must be three counts, of blocks A, B and C, got {tuple(layers)}")
        self.in_channels, self.padding = in_channels, padding
        self.stages = nn.ModuleList()
        levels, channels, counts = [], in_channels, iter(layers or ())
        for number, row in enumerate(_table(variant)):
            units: list[nn.Module] = []
            for unit in row:
                count = next(counts) if layers is not None and unit.repeated else unit.count
                for _ in range(count):
                    if unit.scale is None:
                        units.append(Branches(channels, unit.branches, multiplier=multiplier, padding=padding))
                        channels = units[-1].out_channels  # type: ignore[assignment]
                    else:
                        own = unit.scale if residual_scale is None or not unit.repeated else residual_scale
                        units.append(
                            ResidualBranches(
                                channels,
                                unit.branches,
                                residual_scale=own,
                                multiplier=multiplier,
                                act=unit.act,
                                residual=residual,
                            )
                        )
            self.stages.append(nn.Sequential(*units))
            levels.append(Level(channels, 2 ** (number + 1)))
        self.levels = tuple(levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        if self.padding == "valid" and min(x.shape[2:]) < 75:
            raise ValueError(f"each side must be at least 75 without padding, got {tuple(x.shape[2:])}")
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def load_timm(network: Inception, weights: Mapping[str, Tensor]) -> Inception:
    """Give a network of full width the weights of timm's network of the same name; its classifier is left out.

    Raises:
        ValueError: a tensor of another shape, or of one network more than of the other.
    """
    own = network.state_dict()
    theirs = {k: v for k, v in weights.items() if not k.startswith(("last_linear", "classif"))}
    if len(own) != len(theirs):
        raise ValueError(f"expected {len(own)} tensors besides the classifier, got {len(theirs)}")
    for (name, mine), (other, tensor) in zip(own.items(), theirs.items(), strict=True):
        if mine.shape != tensor.shape:
            raise ValueError(f"{other} has shape {tuple(tensor.shape)}, {name} {tuple(mine.shape)}")
    network.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
    return network
