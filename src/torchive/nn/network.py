"""Networks by name: ``timm/resnet18``, ``torchvision/resnet50``. Nothing is downloaded; weights are random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchive.nn.passes import trial_pass
from torchive.protocols import Backbone, Level

#: What makes timm's transformers take images of any size, by the module that defines them. Windows and patches that a
#: size does not fill are padded; Swin wants sides that its patch of 4 divides.
_SWIN, _VIT = {"strict_img_size": False}, {"dynamic_img_size": True, "dynamic_img_pad": True}
ANY_SIZE = {
    "swin_transformer": _SWIN,
    "swin_transformer_v2": _SWIN,
    "swin_transformer_v2_cr": _SWIN,
    "vision_transformer": _VIT,
    "deit": _VIT,
    "eva": _VIT,
}


def build_network(name: str, *, num_classes: int, in_channels: int = 3, **options: Any) -> nn.Module:
    """A classifier of another library, (N, in_channels, H, W) to (N, num_classes).

    Raises:
        ValueError: the name has no ``timm/`` or ``torchvision/`` in front, or the library does not know it.
    """
    library, model = _split(name)
    if library == "timm":
        import timm

        return timm.create_model(model, num_classes=num_classes, in_chans=in_channels, **options)
    import torchvision

    network: nn.Module = torchvision.models.get_model(model, weights=None, num_classes=num_classes, **options)
    if in_channels != 3:
        _widen_stem(network, in_channels)
    return network


def build_features(
    name: str | nn.Module, *, in_channels: int = 3, out_indices: tuple[int, ...] | None = None, **options: Any
) -> nn.Module:
    """A backbone by name, or the backbone given, with ``levels`` telling channels and stride of each map.

    ``options`` are further arguments of a named timm network, such as ``output_stride``. Vision and Swin transformers
    take images of any size; timm's others may keep to that of their name.

    Raises:
        ValueError: as ``build_network``, or a module without ``levels``.
    """
    if isinstance(name, nn.Module):
        if not isinstance(name, Backbone):
            raise ValueError(
                f"a backbone needs `levels` and a `forward` that returns a list; {type(name).__name__} lacks them"
            )
        return name
    library, model = _split(name)
    if library == "timm":
        import timm

        if out_indices is not None:
            options["out_indices"] = out_indices
        family = timm.models.model_entrypoint(model).__module__.rpartition(".")[2]
        freed = ANY_SIZE.get(family, {})
        network = timm.create_model(model, features_only=True, in_chans=in_channels, **{**freed, **options})
        return _TimmFeatures(network, one_size_in_files=freed is _SWIN)
    network = build_network(name, num_classes=1, in_channels=in_channels, **options)
    return _TorchvisionFeatures(network, out_indices)


class _TimmFeatures(nn.Module):
    """timm's ``features_only`` network under the backbone contract.

    ``one_size_in_files``: an exported file keeps the example's height and width. How many windows of Swin fill sides
    that are not known is an expression that no tracer has solved within minutes.
    """

    def __init__(self, network: nn.Module, *, one_size_in_files: bool = False) -> None:
        super().__init__()
        self.network, self.one_size_in_files = network, one_size_in_files
        info: Any = network.feature_info
        self.levels = tuple(Level(c, s) for c, s in zip(info.channels(), info.reduction(), strict=True))
        self.channels_last = getattr(network, "output_fmt", None) == "NHWC"  # Swin's maps

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network(x)
        return [y.movedim(-1, 1) for y in maps] if self.channels_last else list(maps)


class _TorchvisionFeatures(nn.Module):
    """The stages of a torchvision classifier: the last map of every stride."""

    def __init__(self, network: nn.Module, out_indices: tuple[int, ...] | None) -> None:
        super().__init__()
        from torchvision.models.feature_extraction import create_feature_extractor

        ends = _stride_ends(network)
        if out_indices is not None:
            ends = [ends[i] for i in out_indices]
        self.body = create_feature_extractor(network, {name: str(i) for i, (name, _) in enumerate(ends)})
        self.levels = tuple(level for _, level in ends)

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x).values())


def _stride_ends(network: nn.Module) -> list[tuple[str, Level]]:
    """Name and shape of the last top-level stage at each stride, found by one pass over a 64-pixel image."""
    seen: dict[int, tuple[str, Level]] = {}
    size = 64
    channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)
    features = getattr(network, "features", None)
    container = features if isinstance(features, nn.Sequential) else network
    prefix = "features." if container is not network else ""

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1:
                stride = size // output.shape[-1]
                seen[stride] = (prefix + name, Level(output.shape[1], stride))

        return hook

    handles = (child.register_forward_hook(note(name)) for name, child in container.named_children())
    trial_pass(network, (torch.zeros(1, channels, size, size),), handles)
    return [seen[stride] for stride in sorted(seen)]


def _split(name: str) -> tuple[str, str]:
    library, _, model = name.partition("/")
    if library not in ("timm", "torchvision") or not model:
        raise ValueError(f"a network is named timm/NAME or torchvision/NAME, got {name!r}")
    known = _known(library)
    base = model.split(".")[0]
    if base not in known:
        import difflib

        close = difflib.get_close_matches(base, known, n=3)
        hint = f"; did you mean {' or '.join(f'{library}/{c}' for c in close)}?" if close else ""
        raise ValueError(f"{library} has no network {model!r}{hint}")
    return library, model


def _known(library: str) -> list[str]:
    if library == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _widen_stem(network: nn.Module, in_channels: int) -> None:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            parent = network.get_submodule(name.rpartition(".")[0])
            stem = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            setattr(parent, name.rpartition(".")[2], stem)
            return
