"""A whole network in two frequencies: which convolution emits a pair, and where the pairs end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchive.methods.blocks.octconv.convolution import OctaveConv
from torchive.methods.blocks.octconv.pair import Octave, join_all
from torchive.nn.passes import as_inputs, eval_mode, hooked
from torchive.nn.rewriting import Rewriting

Downsampling = Literal["pool", "strided"]


def octavize(
    network: nn.Module,
    alpha: float = 0.5,
    *,
    example: Any = None,
    matches: Callable[[str], bool] | None = None,
    downsampling: Downsampling = "pool",
    exchange: bool = True,
) -> Rewriting:
    """Turn the convolutions of a network into octave convolutions, in place; their weights are taken over.

    The first convolution stays. Those behind it emit pairs up to the last stage (from the last downsampling on), whose
    convolutions emit plain maps, as in the paper's networks; in a network that enlarges its maps again all emit pairs
    but those that give the output. Pairs pass norms, activations, pooling, sums and squeeze-and-excitation by
    themselves (see ``Octave``); what leaves the network is joined.

    Args:
        network: any network of 2-D or 3-D convolutions.
        alpha: share of the channels at half resolution, in [0, 1).
        example: an input, or a tuple of inputs; an image of 64 pixels if None.
        matches: which convolutions, by their dotted name; None is all.
        downsampling, exchange: as of ``OctaveConv``.

    Returns:
        What was changed, with ``undo()``.

    Raises:
        ValueError: ``alpha`` outside [0, 1), an unknown ``downsampling``, or a network whose code cannot take a pair.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be in [0, 1), got {alpha}")
    if downsampling not in ("pool", "strided"):
        raise ValueError(f"downsampling must be pool or strided, got {downsampling!r}")
    inputs = as_inputs(network, example, dims=(2, 3))
    plan = _Plan(network, alpha, matches or (lambda _: True), {"downsampling": downsampling, "exchange": exchange})
    with torch.no_grad(), eval_mode(network):
        plan.look(inputs)
        while not plan.grow(inputs):
            pass
    reasons = plan.kept if plan.made else plan.reasons
    result = Rewriting(network, left_alone=[(name, reason) for name, reason in reasons.items() if reason])
    for name, new in plan.made.items():
        result.put(name, new)
    if plan.leaks:
        result.on_undo(network.register_forward_hook(_joined).remove)
    return result


def _joined(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return join_all(output)


@dataclass
class _Place:
    """A leaf module as the plain pass saw it: its turn, and the sides of what went in and came out."""

    name: str
    turn: int
    before: tuple[int, ...]
    after: tuple[int, ...]


class _AgainError(Exception):
    """The pass begins anew, with what was learnt."""


@dataclass
class _Plan:
    network: nn.Module
    alpha: float
    matches: Callable[[str], bool]
    options: dict[str, Any]
    convolutions: list[_Place] = field(default_factory=list)
    plain: set[str] = field(default_factory=set)  # emit plain maps
    kept: dict[str, str] = field(default_factory=dict)  # stay as they are, and why where pairs arrive
    reasons: dict[str, str] = field(default_factory=dict)  # why, wherever that is
    made: dict[str, nn.Module] = field(default_factory=dict)
    leaks: bool = False

    def look(self, inputs: tuple[Any, ...]) -> None:
        """One pass of the network as it is: where it becomes smaller, and which convolutions give its output."""
        places: list[_Place] = []
        boxes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        outputs: dict[int, tuple[Tensor, str]] = {}

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                    return
                before, after = tuple(args[0].shape[2:]), tuple(output.shape[2:])
                boxes.setdefault(name, (before, after))
                if not any(True for _ in module.children()) and len(after) > 1:
                    places.append(_Place(name, len(places), before, after))
                    if isinstance(module, nn.Conv2d | nn.Conv3d):
                        outputs[id(output)] = (output, name)

            return hook

        named = ((name, module) for name, module in self.network.named_modules() if name)
        with hooked(module.register_forward_hook(note(name)) for name, module in named):
            result = self.network(*inputs)
        kinds = {name for name, m in self.network.named_modules() if isinstance(m, nn.Conv2d | nn.Conv3d)}
        self.convolutions = [place for place in places if place.name in kinds]
        if self.convolutions:
            self.kept[self.convolutions[0].name] = ""
            self.reasons[self.convolutions[0].name] = "it is the first convolution"
        self.plain = {outputs[id(leaf)][1] for leaf in pytree.tree_leaves(result) if id(leaf) in outputs}
        self.plain |= set(_last_stage(places, self.convolutions, boxes))

    def grow(self, inputs: tuple[Any, ...]) -> bool:
        """One pass with pairs; False where it has to be made again."""
        self.made = {}
        turns: list[str] = []  # the octave convolutions that emitted pairs

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, _output: Any) -> Any:
                new = self._replacement(name, module, args[0], turns)
                if new is None:
                    return None
                if new.low_out:
                    turns.append(name)
                return new(args[0])

            return hook

        chosen = {p.name: self.network.get_submodule(p.name) for p in self.convolutions if p.name not in self.kept}
        try:
            with hooked(module.register_forward_hook(note(name)) for name, module in chosen.items()):
                result = self.network(*inputs)
        except _AgainError:
            return False
        except (TypeError, AttributeError, RuntimeError, ValueError) as error:
            what = " ".join(str(error).split())
            raise ValueError(
                f"the code of {type(self.network).__name__} cannot take a map in two parts: {what}"
            ) from error
        leaves = pytree.tree_leaves(result, is_leaf=lambda value: isinstance(value, Octave))
        self.leaks = any(isinstance(leaf, Octave) for leaf in leaves)
        return True

    def _replacement(self, name: str, module: Any, x: Any, turns: Sequence[str]) -> OctaveConv | None:
        """The octave convolution that takes a module's place for what arrives, or None."""
        low_in = x.low.shape[1] if isinstance(x, Octave) else 0
        known = self.made.get(name)
        if known is not None:
            assert isinstance(known, OctaveConv)
            if known.low_in != low_in:
                self._keep(name, "is called with a pair and with a plain map")
            return known
        reason = self._unfit(name, module, x)
        if reason is not None:
            self.kept[name], self.reasons[name] = reason if low_in else "", reason
            return None
        depthwise = module.groups > 1 and module.groups == module.in_channels
        low_out = 0 if name in self.plain else int(self.alpha * module.out_channels + 1e-6)
        if depthwise:
            if low_in and name in self.plain and turns and turns[-1] not in self.plain:
                self.plain.add(turns[-1])  # a depthwise convolution cannot end a pair: the one before it does
                raise _AgainError
            low_out = low_in * module.out_channels // module.in_channels
        elif any(c % module.groups for c in (low_in, low_out)):
            self._keep(name, f"{module.groups} groups do not divide {low_in} and {low_out} low channels")
        step = module.stride[-1]
        if not low_in and not low_out and (step == 1 or self.options["downsampling"] == "strided"):
            return None
        shares = {"alpha_in": low_in / module.in_channels, "alpha_out": low_out / module.out_channels}
        new = OctaveConv.from_module(module, **shares, **self.options).eval()
        self.made[name] = new
        return new

    def _keep(self, name: str, reason: str) -> None:
        self.kept[name] = reason
        raise _AgainError

    def _unfit(self, name: str, module: Any, x: Any) -> str | None:
        """Why a convolution stays as it is; "" where that is plain to see."""
        sides = tuple(x.shape[-2:])
        if not self.matches(name) or sides == (1, 1):
            return ""
        if type(module).forward not in (nn.Conv2d.forward, nn.Conv3d.forward):
            return f"{type(module).__name__} computes more than a convolution"
        same = [d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        padding = same if module.padding == "same" else module.padding
        odd = all(k % 2 for k in module.kernel_size[-2:])
        if not odd or list(padding)[-2:] != same[-2:] or module.padding_mode != "zeros":
            return f"its window of {module.kernel_size} and padding of {module.padding} change the size"
        if module.stride[-1] != module.stride[-2] or module.stride[-1] > 2:
            return f"its stride is {module.stride}"
        return None


def _last_stage(
    places: Sequence[_Place], convolutions: Sequence[_Place], boxes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
) -> Iterator[str]:
    """Names of the convolutions from the last downsampling on; none where maps are enlarged again after it."""
    smaller = [p for p in places if p.after[-1] < p.before[-1] and p.after[-2:] != (1, 1)]
    if not smaller or not convolutions:
        return
    last = smaller[-1]
    if any(p.turn > last.turn and p.after[-1] > last.after[-1] for p in convolutions):
        return
    owners = [last.name[:i] for i, letter in enumerate(last.name) if letter == "."]
    stage = next((name for name in owners if boxes.get(name) == (last.before, last.after)), last.name)
    inside = [p.turn for p in places if p.name == stage or p.name.startswith(f"{stage}.")]
    begin = min(*inside, last.turn, convolutions[-1].turn)
    yield from (p.name for p in convolutions if p.turn >= begin)


def oct_resnet(
    layers: Sequence[int] = (3, 4, 6, 3), *, alpha: float = 0.5, num_classes: int = 1000, **options: Any
) -> nn.Module:
    """Oct-ResNet of bottlenecks, (N, 3, H, W) to (N, K): torchvision's network, octavized.

    Args:
        layers: bottlenecks of each stage: (2, 2, 2, 2) is ResNet-26, (3, 4, 6, 3) 50, (3, 4, 23, 3) 101, (3, 8, 36, 3)
            152 and (3, 24, 36, 3) 200.
        alpha: share of the channels at half resolution.
        num_classes: K.
        options: further arguments of torchvision's ``ResNet``, such as ``groups`` and ``width_per_group``.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    network = ResNet(Bottleneck, list(layers), num_classes=num_classes, **options)
    octavize(network, alpha)
    return network


def oct_mobilenet(width: float = 1.0, *, alpha: float = 0.5, num_classes: int = 1000) -> nn.Module:
    """Oct-MobileNet (v1), (N, 3, H, W) to (N, K): timm's network, octavized.

    Args:
        width: multiple of the paper's channels.
        alpha: share of the channels at half resolution.
        num_classes: K.
    """
    from timm.models.efficientnet import _gen_mobilenet_v1

    network: nn.Module = _gen_mobilenet_v1("mobilenetv1_100", width, num_classes=num_classes)
    octavize(network, alpha)
    return network
