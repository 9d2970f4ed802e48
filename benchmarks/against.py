"""Any part against any other in one process: forward, and forward with backward, in both layouts, taking turns.

    python benchmarks/against.py --ours MODULE:EXPRESSION --theirs MODULE:EXPRESSION --input 8,64,24,24 [--path FOLDER]

An expression is Python over the names of its module, for example
``--ours "torchive.methods.blocks.gcnet:GlobalContext(64)" --theirs "timm.layers:GlobalContext(64, fuse_add=True)"``.
``--path`` adds a folder to import from, ``--input`` may be given several times for several arguments; ``64:1000`` means
64 classes from 0 to 999. Printed: the ratio of the medians (below 1: ours is faster) with the smallest and largest
ratio of two neighbouring rounds. With one thread the processor's time counts, which other programs disturb less. Freed
memory is kept, so that new pages, which cost more than most parts do, do not hide the difference.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from importlib import import_module
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def build(text: str) -> Any:
    """What ``MODULE:EXPRESSION`` makes."""
    module, _, expression = text.partition(":")
    if not expression:
        raise SystemExit(f"expected MODULE:EXPRESSION, got {text!r}")
    return eval(expression, dict(vars(import_module(module))))


def argument(text: str, layout: torch.memory_format) -> Tensor:
    """Normal numbers of a shape in a layout, with a gradient; of ``SHAPE:CLASSES`` whole numbers."""
    shape, _, classes = text.partition(":")
    sides = [int(side) for side in shape.split(",")]
    if classes:
        return torch.randint(int(classes), sides)
    x = torch.randn(sides)
    return (x.contiguous(memory_format=layout) if x.ndim == 4 else x).requires_grad_()


def runner(module: Any, inputs: list[Tensor], backward: bool) -> Callable[[], None]:
    """A call of the module, with or without the gradients of input and parameters; results' lie as the results do."""
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    given: list[Tensor] = []

    def run() -> None:
        with torch.set_grad_enabled(backward):
            for tensor in (*inputs, *parameters):
                tensor.grad = None
            outputs = module(*inputs)
            if backward:
                leaves = [
                    leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad
                ]
                given.extend(torch.randn_like(leaf) for leaf in leaves[len(given) :])
                torch.autograd.backward(leaves, given)

    return run


def timed(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    start = clock()
    run()
    return clock() - start


def keep_memory() -> None:
    """Have glibc keep what is freed; nothing with another allocator."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large tensors
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Time both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True)
    parser.add_argument("--theirs", required=True)
    parser.add_argument("--input", action="append", required=True, help="shape, such as 8,64,24,24, or SHAPE:CLASSES")
    parser.add_argument("--path", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval", action="store_true", help="modules in evaluation mode")
    a = parser.parse_args()
    sys.path[:0] = a.path
    keep_memory()
    torch.set_num_threads(a.threads)
    clock = time.process_time if a.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    modules = [build(text) for text in (a.ours, a.theirs)]
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [argument(text, layout) for text in a.input]
        for module in modules:
            if isinstance(module, nn.Module):
                module.train(not a.eval)
                for parameter in module.parameters():
                    if parameter.ndim == 4:
                        parameter.data = parameter.data.contiguous(memory_format=layout)
        for backward in (False, True):
            runs = [runner(module, inputs, backward) for module in modules]
            times = []
            for turn in range(a.rounds + 3):
                first, second = (timed(run, clock) for run in (runs if turn % 2 else reversed(runs)))
                times.append((first, second) if turn % 2 else (second, first))
            times = times[3:]  # the first rounds fill caches
            mid = [median(column) for column in zip(*times, strict=True)]
            ratios = [one / other for one, other in times]
            title = f"{'channels last' if layout is torch.channels_last else 'contiguous':13}  "
            title += "forward and backward" if backward else "forward             "
            print(
                f"{title}  ours {mid[0] * 1e3:8.3f} ms  theirs {mid[1] * 1e3:8.3f} ms  "
                f"ratio {mid[0] / mid[1]:.3f} [{min(ratios):.3f}, {max(ratios):.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
