"""Kill a training run with SIGKILL at twenty random moments, resume it, and compare the final weights.

    python benchmarks/kill_resume.py [--kills 20] [--steps 60] [--seed 0]

Every trial is a run of its own: started, killed at a random moment between its first line of Python and its end,
resumed until it is done. Prints how many ended with the weights and optimiser state of the uninterrupted run, bit for
bit. Exit status 1 where one did not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

PROGRAM = """
import sys
import torch

torch.set_num_threads(1)
from torchive.engine.recipe import load_recipe
from torchive.engine.train import train

words = ["train.steps=" + sys.argv[2], "train.checkpoint_every=5", "train.evaluate_every=20", "data.image_size=32"]
words += ["data.batch_size=8", "data.workers=0", "data.fraction=0.1", "model.network=timm/resnet10t", "train.cpu=true"]
train(load_recipe("solar", words), sys.argv[1], progress=False)
"""


def start(out: Path, steps: int) -> subprocess.Popen[bytes]:
    """A training process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(out), str(steps)], env=environment)


def equal(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    from safetensors.torch import load_file

    a, b = (load_file(folder / "last.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    draws, same, landed = random.Random(a.seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        begun = time.perf_counter()
        if start(whole, a.steps).wait():
            return 1
        wall = time.perf_counter() - begun
        for number in range(a.kills):
            out = Path(folder) / f"killed{number}"
            process = start(out, a.steps)
            time.sleep(draws.uniform(0.3, 1.0) * wall)
            process.send_signal(signal.SIGKILL)
            process.wait()
            landed.append(_step(out))
            if start(out, a.steps).wait():
                return 1
            same += equal(whole, out)
            print(f"kill {number + 1:2}: last checkpoint then at step {landed[-1]}, equal so far {same}", flush=True)
    print(f"{same} of {a.kills} killed runs end bit for bit where the uninterrupted run of {a.steps} steps does")
    return 0 if same == a.kills else 1


def _step(out: Path) -> int | None:
    from torchive.engine.checkpoint import load_checkpoint

    path = out / "last.safetensors"
    return load_checkpoint(path).values["step"] if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
