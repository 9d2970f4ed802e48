"""The share of a training run that is spent waiting for data, with each recipe's own workers.

    python benchmarks/loading.py [--recipes solar fashion_mnist trees_ssd nuclei_attention_unet] [--steps 80]

Nothing is timed apart: the figure is the loader's own clock over that of the steps, the start of the workers and the
first reading of every file included. Prints both and their ratio for each recipe (aim: below 5 %).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from torchive.engine.recipe import load_recipe
from torchive.engine.train import train

RECIPES = ("solar", "fashion_mnist", "trees_ssd", "nuclei_attention_unet")


def main() -> None:
    """Train, read the clocks, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="NAME")
    parser.add_argument("--steps", type=int, default=80)
    a = parser.parse_args()
    for name in a.recipes:
        recipe = load_recipe(name, [f"train.steps={a.steps}", "train.evaluate_every=0", "train.checkpoint_every=0"])
        with tempfile.TemporaryDirectory() as folder:
            run = train(recipe, Path(folder) / "run", progress=False)
        share = run.waited / run.seconds
        print(
            f"{name:24} {run.seconds:7.1f} s in {a.steps} steps, {run.waited:6.2f} s waiting: {share:6.1%}", flush=True
        )


if __name__ == "__main__":
    main()
