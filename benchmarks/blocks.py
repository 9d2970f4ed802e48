"""Dynamic ReLU, GCNet and MABN in ResNet-18 against other people's modules in the same places, forward and backward.

    python benchmarks/blocks.py [--rounds 15] [--against NAME=FILE.py:CLASS[:KEY=VALUE,..]] ...

For gcnet the other side is timm's GlobalContext. The other two are not in timm: name a file, for example
``--against dynamic_relu=dyrelu.py:DyReLUB:reduction=8`` or ``--against mabn=MABN.py:MABN2d:B=2,real_B=32``; a class
CenConv2d in the same file then takes the place of the convolutions. Without one, the block is timed against the plain
network. Both sides run in turn in one process, as whole networks and as the converted parts alone, on inputs of the
shapes that they have in the network. Printed: the ratio of the medians (below 1: ours is faster) with the smallest and
the largest ratio of two neighbouring runs.
"""

from __future__ import annotations

import argparse
import time
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from timm.layers import GlobalContext as TimmGlobalContext
from torch import nn

from torchive.engine.convert import convert

BLOCKS = ("dynamic_relu", "gcnet", "mabn")


def load_classes(text: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """``FILE.py:CLASS:KEY=VALUE,..``: the file's names, the class's name, its options."""
    path, name, *rest = text.split(":")
    options = dict(pair.split("=") for pair in rest[0].split(",")) if rest else {}
    names: dict[str, Any] = {"__name__": Path(path).stem}
    source = (
        Path(path).read_text(encoding="utf-8").replace("ctx.saved_variables", "ctx.saved_tensors")
    )  # of old PyTorch
    exec(compile(source, path, "exec"), names)
    return names, name, {key: literal_eval(value) for key, value in options.items()}


def replacing(cls: type[nn.Module], options: dict[str, Any]) -> type[nn.Module]:
    """A class that takes a channel count, made fit for ``convert``."""

    class Theirs(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def from_module(cls, old: nn.Module, *, channels: int) -> nn.Module:
            new = cls(channels, **options)
            with torch.no_grad():
                for name in ("weight", "bias"):
                    if isinstance(getattr(old, name, None), nn.Parameter):
                        getattr(new, name).copy_(getattr(old, name))
            return new

        @classmethod
        def from_channels(cls, channels: int) -> nn.Module:
            return cls(channels, **options)

    return Theirs


def replacing_convolution(cls: type[nn.Module]) -> type[nn.Module]:
    """A convolution class whose kernel is given as one number, made fit for ``convert``."""

    class Theirs(cls):  # type: ignore[misc, valid-type]
        @classmethod
        def from_module(cls, old: nn.Conv2d, *, channels: int) -> nn.Module:
            first = (old.kernel_size[0], old.stride[0], old.padding[0], old.dilation[0])
            new = cls(old.in_channels, old.out_channels, *first, old.groups, bias=old.bias is not None)
            new.load_state_dict(old.state_dict())
            return new

    return Theirs


def networks(name: str, against: str | None) -> tuple[nn.Module, nn.Module, list[str], str]:
    """Ours, theirs, the converted places in both, and what theirs is; no places where theirs has no such parts."""
    ours, theirs = (timm.create_model("resnet18", num_classes=10) for _ in range(2))
    parts = [change.name for change in convert(ours, name).changes]
    if against:
        names, cls, options = load_classes(against)
        part, label = replacing(names[cls], options), cls
        if name == "gcnet":
            places = [change.name for change in convert(timm.create_model("resnet18"), name).changes]
            convert(theirs, part, places)
        else:
            convert(theirs, part, replaces=nn.ReLU if name == "dynamic_relu" else nn.BatchNorm2d)
            if name == "mabn" and "CenConv2d" in names:
                convert(theirs, replacing_convolution(names["CenConv2d"]), replaces=nn.Conv2d)
    elif name == "gcnet":
        options = {"fuse_add": True, "fuse_scale": False, "init_last_zero": True, "rd_ratio": 1 / 16}
        places = [change.name for change in convert(timm.create_model("resnet18"), name).changes]
        convert(theirs, replacing(TimmGlobalContext, options), places)
        label = "timm GlobalContext"
    else:
        label, parts = "plain network", []
    return ours.train(), theirs.train(), parts, label


def parts_alone(
    model: nn.Module, names: list[str], images: torch.Tensor, layout: torch.memory_format
) -> Callable[[], None]:
    """One forward and backward pass of the parts, each on its own input, remembered from a pass of the network."""
    pairs: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def remember(module: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        x = given[0].detach().clone(memory_format=layout).requires_grad_()
        pairs.append((module, x, torch.randn_like(result)))

    places = [model.get_submodule(name) for name in names]
    hooks = [(p[-1] if isinstance(p, nn.Sequential) else p).register_forward_hook(remember) for p in places]
    model(images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for module, x, grad in pairs:
            x.grad = None
            module(x).backward(grad)

    return run


def step(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    """One forward and backward pass."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(images).square().mean().backward()

    return run


def timed(run: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Time every block in both layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=BLOCKS, nargs="*", default=list(BLOCKS))
    parser.add_argument("--against", action="append", default=[], metavar="NAME=FILE.py:CLASS[:KEY=VALUE,..]")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    against = dict(entry.split("=", 1) for entry in options.against)
    for name in options.only:
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            ours, theirs, parts, label = networks(name, against.get(name))
            images = torch.randn(options.batch, 3, options.size, options.size).contiguous(memory_format=layout)
            models = [model.to(memory_format=layout) for model in (ours, theirs)]
            kind = "channels last" if layout is torch.channels_last else "contiguous"
            compare(f"{name:<13} {kind:<14} network", label, [step(model, images) for model in models], options.rounds)
            if parts:
                alone = [parts_alone(model, parts, images, layout) for model in models]
                compare(f"{name:<13} {kind:<14} parts  ", label, alone, options.rounds)


def compare(title: str, label: str, runs: list[Callable[[], None]], rounds: int) -> None:
    """Time both in turn and print."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 2):
        if turn % 2:
            second, first = timed(runs[1]), timed(runs[0])
        else:
            first, second = timed(runs[0]), timed(runs[1])
        if turn > 1:  # the first runs fill caches
            times.append((first, second))
    mid = [median(column) for column in zip(*times, strict=True)]
    ratios = [a / b for a, b in times]
    print(
        f"{title} ours {mid[0] * 1e3:7.1f} ms  {label} {mid[1] * 1e3:7.1f} ms  "
        f"ratio {mid[0] / mid[1]:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]",
        flush=True,
    )


if __name__ == "__main__":
    main()
