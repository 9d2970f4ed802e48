"""SimCLR's findings on a small scale: head, views, temperature, loss, local norms, contrast against reconstruction.

    python benchmarks/simclr_ablation.py [--quick] [--parts head views ...] [--seeds 3] [--source fashion-mnist]

A small encoder is trained without labels; then 20 neighbours and the linear evaluation are scored on its features of
new images. Every arm of a seed starts from the same encoder and sees the same images. To make it cheap, eight views of
each image are drawn once for each setting of the augmentation, and pairs are taken from these. Adam at 1e-3 with a
cosine, since LARS is made for batches of thousands. Printed are means over seeds with their 95 % t-interval.

Parts: ``head`` (none, linear, mlp) · ``views`` (crop alone, colour alone, both) · ``temperature`` · ``loss`` (NT-Xent,
logistic, triplet, with and without semi-hard negatives) · ``reconstruction`` (denoising, hidden patches, no training) ·
``norms`` (statistics of four images against the whole batch, and the leak) · ``grid`` (every pair of augmentations) ·
``few`` (1 % and 10 % of the labels: fine-tuned after pre-training, and from scratch).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from torchive.data import open_data
from torchive.methods.training.simclr import (
    MarginTripletLoss,
    NTLogisticLoss,
    SimCLR,
    SimCLRViews,
    norm_leak,
)
from torchive.nn.denoising import DenoisingAutoEncoder
from torchive.nn.probe import few_labels, knn_accuracy, linear_evaluation, with_linear_head
from torchive.structures import Batch

PARTS = ("head", "views", "temperature", "loss", "reconstruction", "norms", "grid", "few")
WHOLE: dict[str, Any] = {"area": (1.0, 1.0), "aspect": (1.0, 1.0)}
#: Augmentations that can be switched on alone; a grey image's colours are its light and contrast.
STEPS: dict[str, dict[str, Any]] = {
    "crop": {"area": (0.2, 1.0), "aspect": (3 / 4, 4 / 3)},
    "colour": {"jitter": 0.8, "strength": 1.0, "grey": 0.2},
    "flip": {"flip": 0.5},
    "blur": {"blur": 0.5},
}
OFF: dict[str, Any] = {**WHOLE, "jitter": 0.0, "grey": 0.0, "flip": 0.0, "blur": 0.0}


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    images: int
    scored: int
    steps: int
    batch: int
    drawn: int = 8


class Data:
    """Images as float tensors, and pools of views that are drawn once for each setting."""

    def __init__(self, source: str, scale: Scale, side: int) -> None:
        self.scale, self.side = scale, side
        self.images, self.labels = _read(source, "train", scale.images, side)
        self.scored, self.truth = _read(source, "val", scale.scored, side)
        self._pools: dict[str, Tensor] = {}

    def pool(self, options: dict[str, Any]) -> Tensor:
        """(N, 8, C, S, S) views of every image."""
        key = repr(sorted(options.items()))
        if key not in self._pools:
            torch.manual_seed(0)
            views = SimCLRViews(self.side, views=self.scale.drawn, **options)
            self._pools = {key: torch.stack([views(image) for image in self.images])}  # the last one is kept
        return self._pools[key]


def _read(source: str, split: str, count: int, side: int) -> tuple[Tensor, Tensor]:
    samples = open_data(source, split)
    rows = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[:count].tolist()
    chosen = [samples[row] for row in rows]
    images = torch.stack([sample.image for sample in chosen]).float() / 255
    if images.shape[-1] != side:
        images = nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images, torch.tensor([sample.target for sample in chosen])


def encoder(channels: int, seed: int) -> nn.Sequential:
    """Four convolutions to 128 channels; equal for equal seeds."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        parts += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


def train(method: nn.Module, data: Data, options: dict[str, Any], seed: int, group: int | None = None) -> None:
    """Adam on pairs from the pool; ``group`` passes the images through in groups, with statistics of their own."""
    pool, scale = data.pool(options), data.scale
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(method.parameters(), 1e-3, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, scale.steps)
    method.train()
    for _ in range(scale.steps):
        rows = torch.randint(len(pool), (scale.batch,), generator=g)
        chosen = torch.rand(scale.batch, scale.drawn, generator=g).argsort(1)[:, :2]  # two different views
        inputs = pool[rows[:, None], chosen]
        if group is None:
            loss = method.losses(Batch(inputs, None, ("",) * scale.batch))["loss"]
        else:
            pairs = [method.embed(part) for part in inputs.split(group)]
            loss = method.loss(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def score(model: nn.Module, data: Data) -> dict[str, float]:
    """Neighbours and linear evaluation of frozen features."""
    model.eval()
    with torch.no_grad():
        bank, features = (torch.cat([model(x) for x in images.split(500)]) for images in (data.images, data.scored))
    return {
        "neighbours": knn_accuracy(features, data.truth, bank, data.labels, k=20),
        "linear": linear_evaluation(features, data.truth, bank, data.labels, batch_size=256, standardise=True),
    }


Arm = Callable[[Data, int], dict[str, float]]


def contrast(options: dict[str, Any] | None = None, group: int | None = None, **arguments: Any) -> Arm:
    """An arm that trains by contrast; by default a batch-normed mlp head, all augmentations, temperature 0.2."""
    options = _options("crop", "colour", "flip") if options is None else options
    arguments = {"temperature": 0.2, "embedding_dim": 64, **arguments}

    def run(data: Data, seed: int) -> dict[str, float]:
        method = SimCLR(
            encoder(data.images.shape[1], seed), in_channels=data.images.shape[1], **copy.deepcopy(arguments)
        )
        train(method, data, options, seed, group)
        found = score(method.deployable(), data)
        pool = data.pool(options)[: data.scale.batch]
        pairs = Batch(pool[:, :2], None, ("",) * len(pool))
        found |= {"pairs found": method.train().diagnose(pairs)["contrastive_accuracy"]}
        if group is not None:
            found |= {"leak": norm_leak(nn.Sequential(method.encoder, method.head), pool[:, :2], group=group)["leak"]}
        return found

    return run


def reconstruct(corruption: str) -> Arm:
    """The same encoder, views and steps, but the images are to be given back."""

    def run(data: Data, seed: int) -> dict[str, float]:
        channels = data.images.shape[1]
        method = DenoisingAutoEncoder(
            encoder(channels, seed),
            in_channels=channels,
            image_size=data.side,
            corruption=corruption,
            patch=7,
            widths=64,
        )
        train(method, data, _options("crop", "colour", "flip"), seed)
        return score(method.deployable(), data)

    return run


def untrained(data: Data, seed: int) -> dict[str, float]:
    """The encoder as it is drawn."""
    method = SimCLR(encoder(data.images.shape[1], seed), in_channels=data.images.shape[1])
    return score(method.deployable(), data)


def tuned(fraction: float, pretrained: bool) -> Arm:
    """All weights trained on a share of the labels, after contrast or from scratch."""

    def run(data: Data, seed: int) -> dict[str, float]:
        channels = data.images.shape[1]
        method = SimCLR(encoder(channels, seed), in_channels=channels, temperature=0.2, embedding_dim=64)
        if pretrained:
            train(method, data, _options("crop", "colour", "flip"), seed)
        model = with_linear_head(method.deployable(), method.encoder.feature_dim, int(data.labels.max()) + 1)
        rows = few_labels(data.labels, fraction, seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
        g = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(100):
            part = rows[torch.randint(len(rows), (min(len(rows), 64),), generator=g)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.images[part]), data.labels[part]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            return {"accuracy": float((model(data.scored).argmax(1) == data.truth).float().mean())}

    return run


def _options(*names: str) -> dict[str, Any]:
    options = dict(OFF)
    for name in names:
        options |= STEPS[name]
    return options


def arms(part: str) -> dict[str, Arm]:
    """The arms of a part, by title."""
    if part == "head":
        return {f"head {head}": contrast(head=head) for head in ("none", "linear", "mlp")}
    if part == "views":
        named = {"crop alone": ("crop",), "colour alone": ("colour",), "crop and colour": ("crop", "colour")}
        return {title: contrast(_options(*names)) for title, names in named.items()}
    if part == "temperature":
        return {f"tau {tau}": contrast(temperature=tau) for tau in (0.05, 0.1, 0.2, 0.5, 1.0)}
    if part == "loss":
        return {
            "NT-Xent": contrast(),
            "logistic": contrast(loss=NTLogisticLoss(temperature=0.2)),
            "logistic, semi-hard": contrast(loss=NTLogisticLoss(temperature=0.2, semi_hard=True)),
            "triplet": contrast(loss=MarginTripletLoss()),
            "triplet, semi-hard": contrast(loss=MarginTripletLoss(semi_hard=True)),
        }
    if part == "reconstruction":
        return {
            "contrast": contrast(),
            "denoising": reconstruct("noise"),
            "hidden patches": reconstruct("patches"),
            "untrained": untrained,
        }
    if part == "norms":
        return {"norms of the batch": contrast(), "norms of 4 images": contrast(group=4)}
    if part == "grid":
        pairs = combinations_with_replacement(STEPS, 2)
        return {" + ".join(sorted(set(pair))): contrast(_options(*pair)) for pair in pairs}
    shares = (0.01, 0.1)
    return {
        f"{share:.0%} of labels, {'after contrast' if ready else 'from scratch'}": tuned(share, ready)
        for share in shares
        for ready in (True, False)
    }


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 % t-interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.3f} ±{half:.3f}"


def main() -> None:
    """Train every arm of the chosen parts, and print as they end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: to see that it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["head", "views", "temperature", "reconstruction"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--source", default="fashion-mnist")
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--out", type=Path, help="JSON file of all values")
    words = parser.parse_args()
    torch.set_num_threads(1)
    scale = Scale(400, 300, 30, 64) if words.quick else Scale(2000, 1000, words.steps, 128)
    seeds = 1 if words.quick else words.seeds
    data, start = Data(words.source, scale, words.side), time.perf_counter()
    records: dict[str, dict[str, list[float]]] = {}
    for part in words.parts:
        print(f"{part}: {seeds} seeds, {scale.steps} steps of {scale.batch} images of {words.source}")
        for title, run in arms(part).items():
            rows = [run(data, seed) for seed in range(seeds)]
            record = {key: [row[key] for row in rows] for key in rows[0]}
            records[f"{part}: {title}"] = record
            cells = "   ".join(f"{key} {interval(values)}" for key, values in record.items())
            print(f"  {title:32} {cells}   ({time.perf_counter() - start:.0f} s)", flush=True)
    if words.out:
        words.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
