"""Depthwise 3 x 3, 5 x 5 and 7 x 7 against a pointwise convolution: operations and time, forward, one image.

    python benchmarks/depthwise.py [--channels 96] [--size 16] [--rounds 51]

BlazeFace's reason for large depthwise kernels is that the pointwise convolutions cost nearly all. Layers alternate;
prints operations and the median time with minimum and maximum, and both over those of the pointwise convolution.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from torch import nn


def main() -> None:
    """Time each layer in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=51)
    options = parser.parse_args()
    torch.set_num_threads(1)
    c, s = options.channels, options.size
    layers: dict[str, nn.Module] = {"pointwise": nn.Conv2d(c, c, 1)}
    layers |= {f"depthwise {k}x{k}": nn.Conv2d(c, c, k, padding=k // 2, groups=c) for k in (3, 5, 7)}
    operations = {name: layer.weight.numel() * s * s for name, layer in layers.items()}  # type: ignore[operator,union-attr]
    x = torch.rand(1, c, s, s).to(memory_format=torch.channels_last)
    for layer in layers.values():
        layer.to(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in layers}
    with torch.inference_mode():
        for round_ in range(options.rounds + 5):
            for name, layer in layers.items():
                start = time.perf_counter()
                for _ in range(20):
                    layer(x)
                if round_ >= 5:
                    times[name].append((time.perf_counter() - start) / 20)
    base = median(times["pointwise"])
    for name, values in times.items():
        mid, share = median(values), operations[name] / operations["pointwise"]
        spread = f"[{min(values) * 1e6:.0f}, {max(values) * 1e6:.0f}]"
        print(
            f"{name:<14} {operations[name] / 1e6:6.2f} M ({share:.2f})  {mid * 1e6:6.0f} us {spread}  x{mid / base:.2f}"
        )


if __name__ == "__main__":
    main()
