"""Start-up: ``import torchive`` and ``torchive list`` against ``python -c pass``. Aim: under 0.3 s more.

    python benchmarks/startup.py [--rounds 15]

Runs alternate; prints medians with minimum and maximum, and the differences of the medians.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import torchive": ["-c", "import torchive"],
    "torchive list": ["-m", "torchive.cli", "list"],
    "torchive find long tail": ["-m", "torchive.cli", "find", "long", "tail"],
    "torchive show gcnet": ["-m", "torchive.cli", "show", "gcnet"],
}


def main() -> None:
    """Time each command in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if round_:  # the first round fills the file cache
                times[name].append(time.perf_counter() - start)
    base = median(times["python -c pass"])
    for name, values in times.items():
        mid = median(values)
        spread = f"[{min(values) * 1e3:.1f}, {max(values) * 1e3:.1f}]"
        print(f"{name:<26} {mid * 1e3:7.1f} ms  {spread}  +{(mid - base) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
