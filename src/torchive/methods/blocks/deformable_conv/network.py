"""Whole networks: which convolutions become deformable, and the paper's ResNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchive.methods.blocks.deformable_conv.convolution import DeformConv2d, Mode
from torchive.nn.passes import as_inputs, trial_pass
from torchive.nn.rewriting import Rewriting


def deformize(
    network: nn.Module,
    last: int | None = 3,
    *,
    example: Any = None,
    matches: Callable[[str], bool] | None = None,
    offset_groups: int = 1,
    modulated: bool = False,
    rate: float = 0.1,
    mode: Mode = "auto",
) -> Rewriting:
    """Make convolutions of a network deformable, in place; it computes the same until it is trained.

    The last ``last`` with a window above 1 x 1 are taken, those with the coarsest maps first, and among these first the
    ones that feed a norm: in a ResNet the 3 x 3 of its last stage, as in the paper.

    Args:
        network: any network of 2-D convolutions.
        last: how many; None is all.
        example: an input, or a tuple of inputs; an image of 64 pixels if None.
        matches: which convolutions, by their dotted name; None is all.
        offset_groups, modulated, mode: as of ``DeformConv2d``.
        rate: multiple of the learning rate for the offsets; version 2's, since with Adam the first steps at the full
            rate throw the taps off the map.

    Returns:
        What was changed, with ``undo()``.

    Raises:
        ValueError: ``last`` below one, or no convolution that can be made deformable.
    """
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1 or None, got {last}")
    result = Rewriting(network)
    found = []
    for place in _places(network, example):
        if matches is not None and not matches(place.name):
            continue
        reason = _refusal(network.get_submodule(place.name))
        if reason:
            result.left_alone.append((place.name, reason))
        else:
            found.append(place)
    if not found:
        reasons = "".join(f"; {name}: {reason}" for name, reason in result.left_alone[:3])
        raise ValueError(f"{type(network).__name__} has no convolution with a window above 1 x 1 there{reasons}")
    found.sort(key=lambda place: (place.cells, not place.feeds_norm, -place.turn))
    for place in sorted(found[:last], key=lambda place: place.turn):
        old = network.get_submodule(place.name)
        options: dict[str, Any] = {"offset_groups": offset_groups, "modulated": modulated, "rate": rate, "mode": mode}
        result.put(place.name, DeformConv2d.from_module(old, **options))
    return result


@dataclass
class _Place:
    """A convolution with a window: its turn, the cells of its output, and whether a norm reads that."""

    name: str
    turn: int
    cells: int
    feeds_norm: bool = False


def _refusal(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Conv2d)
    if type(module).forward is not nn.Conv2d.forward:
        return f"{type(module).__name__} computes more than Conv2d"
    if module.padding_mode != "zeros":
        return f"its padding_mode is {module.padding_mode!r}"
    return None


def _places(network: nn.Module, example: Any) -> list[_Place]:
    """The convolutions with a window that one pass calls, in its order."""
    inputs = as_inputs(network, example)
    places: dict[str, _Place] = {}
    outputs: dict[int, tuple[Tensor, str]] = {}  # the tensors are kept, so that their ids stay their own

    def called(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            places.setdefault(name, _Place(name, len(places), output.shape[-2] * output.shape[-1]))
            outputs[id(output)] = (output, name)

        return hook

    def read(_module: nn.Module, args: Any) -> None:
        if args and id(args[0]) in outputs:
            places[outputs[id(args[0])][1]].feeds_norm = True

    handles = []
    own = {id(m.offset) for m in network.modules() if isinstance(m, DeformConv2d)}  # deformable ones' offsets stay
    for name, module in network.named_modules():
        if id(module) in own:
            continue
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1 and name:
            handles.append(module.register_forward_hook(called(name)))
        elif "Norm" in type(module).__name__:
            handles.append(module.register_forward_pre_hook(read))
    trial_pass(network, inputs, handles)
    return list(places.values())


def deformable_resnet(
    name: str = "resnet101",
    *,
    last: int = 3,
    offset_groups: int = 1,
    modulated: bool = False,
    rate: float = 1.0,
    dilation: int = 2,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> nn.Module:
    """timm's ResNet with an output stride of 16, its last stage dilated, and its last 3 x 3 convolutions deformable.

    Args:
        name: of a ResNet of timm.
        last: deformable convolutions; the paper takes 3 and compares 1, 2, 3 and 6.
        offset_groups: 1 in the release's DeepLab, 4 in its detectors.
        modulated: version 2.
        rate: multiple of the learning rate for the offsets; 1 in the paper, 0.1 in version 2.
        dilation: of all 3 x 3 convolutions of the last stage.
        num_classes, in_channels: as of the network; its logits are (N, num_classes).
    """
    import timm

    network: nn.Module = timm.create_model(name, output_stride=16, num_classes=num_classes, in_chans=in_channels)
    stage: nn.Module = network.get_submodule("layer4")
    for module in stage.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (dilation, dilation)
    example = network.get_parameter("conv1.weight").new_zeros(1, in_channels, 64, 64)
    deformize(network, last, example=example, offset_groups=offset_groups, modulated=modulated, rate=rate)
    return network
