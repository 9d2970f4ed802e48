"""The backbone: timm's networks under the contract, at any image size and any width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchive.protocols import Level

VARIANTS = (
    *("dla34", "dla46_c", "dla46x_c", "dla60", "dla60x", "dla60x_c", "dla102", "dla102x", "dla102x2", "dla169"),
    *("dla60_res2net", "dla60_res2next"),
)


class DLA(nn.Module):
    """Deep layer aggregation: (N, C, H, W) to five maps (N, C_i, ceil(H / s), ceil(W / s)), s = 2, 4, 8, 16, 32.

    ``body`` is timm's network without its classifier, so its published weights load by
    ``backbone.body.load_state_dict(weights, strict=False)``.

    Args:
        variant: dla34, dla46_c, dla60, dla102, dla169; dla46x_c, dla60x, dla60x_c, dla102x and dla102x2 with grouped
            convolutions; dla60_res2net and dla60_res2next. Names end in c where compact, in x where grouped.
        in_channels: C.
        widths: channels of the six stages, instead of the variant's; the first has stride 1 and is not returned.
        layers: depths of the six stages, instead of the variant's: convolutions of the first two, levels of the trees.

    Raises:
        ValueError: an unknown variant, or not six positive numbers; in ``forward``, an input that is not (N, C, H, W).
    """

    levels: tuple[Level, ...]

    def __init__(
        self,
        variant: str = "dla34",
        *,
        in_channels: int = 3,
        widths: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        import timm

        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        options: dict[str, Any] = {}
        for name, values in (("channels", widths), ("levels", layers)):
            if values is not None:
                if len(values) != 6 or min(values) < 1:
                    raise ValueError(f"expected six numbers of at least 1, got {tuple(values)}")
                options[name] = tuple(values)
        self.in_channels = in_channels
        self.body: nn.Module = timm.create_model(variant, num_classes=0, in_chans=in_channels, **options)
        for part in self.body.modules():
            if isinstance(part, nn.MaxPool2d):
                part.ceil_mode = True  # as its neighbours, the strided convolutions, round
        channels: Sequence[int] = self.body.channels
        self.levels = tuple(Level(c, 2**i) for i, c in enumerate(channels) if i)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        x = self.body.level0(self.body.base_layer(x))  # type: ignore[operator]
        maps = []
        for i in range(1, 6):
            x = self.body.get_submodule(f"level{i}")(x)  # (N, C_i, H / 2**i, W / 2**i)
            maps.append(x)
        return maps
