"""Grad-CAM against CAM and simpler maps on objects in clutter: where do they point, and does the network use it?

    python benchmarks/grad_cam_localisation.py [--quick] [--seeds 5] [--record]

One of four shapes lies on a ground of random patches. Two networks with one trunk learn the shape: one reads the
flattened maps through two linear layers, as VGG does, and is explained as it is; the other is what CAM asks for, a mean
and a linear layer. On new images each map gives a box (15 % of its maximum, largest component), a highest pixel, and an
order in which pixels are deleted and inserted. Printed are means over seeds with their 95 % t-interval; the difference
"Grad-CAM minus CAM" is paired. Then the notes' question: how well does a linear function of the maps predict the
gradient?
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from torchive.methods.explanation.grad_cam import GradCAM, boxes_from_maps, faithfulness, localised, pointing_game
from torchive.methods.explanation.grad_cam.localisation import paired_iou

SIDE = 48
CLASSES = 4
FIGURES = ("localised", "mean IoU", "pointing", "deletion", "insertion")


def pale(rng: np.random.Generator) -> np.ndarray:
    """A colour near grey, (3, 1, 1)."""
    return np.clip(rng.random() + 0.15 * rng.standard_normal((3, 1, 1)), 0, 1)


def draw(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, 48, 48) in [0, 1], classes (N,), boxes (N, 4)."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, 3, SIDE, SIDE), dtype=np.float32)
    labels, boxes = rng.integers(CLASSES, size=count), np.empty((count, 4), dtype=np.float32)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for n in range(count):
        image = np.broadcast_to(pale(rng), (3, SIDE, SIDE)).copy()
        for _ in range(30):  # clutter: rectangles of pale colours
            h, w = rng.integers(3, 12, size=2)
            y, x = rng.integers(-4, SIDE, size=2)
            image[:, max(y, 0) : y + h, max(x, 0) : x + w] = pale(rng)
        size = int(rng.integers(12, 25))
        y, x = rng.integers(0, SIDE - size + 1, size=2)
        v, u = (rows - y + 0.5) / size * 2 - 1, (columns - x + 0.5) / size * 2 - 1  # the box is [-1, 1]
        radius = np.hypot(v, u)
        inside = (np.abs(v) <= 1) & (np.abs(u) <= 1)
        shape = (
            radius <= 1,
            (radius <= 1) & (radius >= 0.6),
            inside & ((np.abs(v) <= 0.3) | (np.abs(u) <= 0.3)),
            inside & (np.abs(u) <= (v + 1) / 2),
        )[labels[n]]
        image[:, shape] = rng.permutation([1.0, 0.0, rng.random()])[:, None]  # a saturated colour
        images[n] = image + 0.05 * rng.standard_normal(image.shape)
        boxes[n] = x, y, x + size, y + size
    return torch.from_numpy(images).clamp(0, 1), torch.from_numpy(labels), torch.from_numpy(boxes)


def trunk() -> list[nn.Module]:
    """Three convolutions to (N, 48, 12, 12), the last ReLU is LAYER."""
    parts: list[nn.Module] = []
    for i, (before, after) in enumerate([(3, 16), (16, 32), (32, 48)]):
        parts += [nn.Conv2d(before, after, 3 if i == 2 else 5, padding=1 if i == 2 else 2, bias=False)]
        parts += [nn.BatchNorm2d(after), nn.ReLU()] + ([nn.MaxPool2d(2)] if i < 2 else [])
    return parts


LAYER = "10"


def flat_network() -> nn.Sequential:
    """The network as it is: two linear layers over all positions."""
    return nn.Sequential(
        *trunk(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * 36, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def mean_network() -> nn.Sequential:
    """CAM's network: a mean and a linear layer."""
    return nn.Sequential(*trunk(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES))


def train(network: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Adam at 2e-3 with a cosine, batches of 64."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (64,), generator=g)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()


def saliency(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Plain gradient: the largest absolute value over channels."""
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(leaf).gather(1, labels[:, None]).sum(), leaf)
    return gradient.abs().amax(1, keepdim=True)


def random_map(images: Tensor, seed: int) -> Tensor:
    """Noise at the layer's size, upsampled as the maps are."""
    g = torch.Generator().manual_seed(seed)
    return nn.functional.interpolate(
        torch.rand(len(images), 1, 12, 12, generator=g), size=(SIDE, SIDE), mode="bilinear"
    )


def centre_map(images: Tensor) -> Tensor:
    """One in the middle half of each side; its box is the centre box."""
    one = torch.zeros(len(images), 1, SIDE, SIDE)
    one[..., SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = 1
    return one


def one_seed(seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """All figures of one pair of networks."""
    images, labels, _ = draw(600 if quick else 4000, 1000 + seed)
    test, truth, boxes = draw(100 if quick else 500, 2000 + seed)
    steps, some = (60, 40) if quick else (350, 100)
    torch.manual_seed(seed)
    flat, mean = flat_network(), mean_network()
    mean[: int(LAYER) + 1].load_state_dict(flat[: int(LAYER) + 1].state_dict())
    for network in (flat, mean):
        train(network, images, labels, steps, seed)
    makers: dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]] = {
        "Grad-CAM": (flat, lambda net: GradCAM(LAYER).explain(net, test, truth).maps),
        "CAM, network changed": (mean, lambda net: GradCAM(LAYER).explain(net, test, truth).maps),
    }
    for variant in ("grad_cam++", "hires_cam", "layer_cam"):
        makers[variant] = (flat, lambda net, v=variant: GradCAM(LAYER, variant=v).explain(net, test, truth).maps)
    makers["gradient"] = (flat, lambda net: saliency(net, test, truth))
    makers["random"] = (flat, lambda net: random_map(test, seed))
    makers["centre box"] = (flat, lambda net: centre_map(test))
    found = {}
    for name, (network, make) in makers.items():
        maps = make(network)
        drawn = boxes_from_maps(maps)
        few = slice(some)
        found[name] = {
            "localised": float(localised(drawn, boxes).float().mean()),
            "mean IoU": float(paired_iou(drawn, boxes).mean()),
            "pointing": float(pointing_game(maps, boxes, tolerance=0).float().mean()),
            "deletion": float(faithfulness(network, test[few], maps[few], truth[few], steps=12).mean()),
            "insertion": float(
                faithfulness(network, test[few], maps[few], truth[few], mode="insertion", steps=12).mean()
            ),
        }
    with torch.no_grad():
        found["accuracy"] = {
            name: float((network(test).argmax(1) == truth).float().mean())
            for name, network in (("flat", flat), ("mean", mean))
        }
    found["unexplained gradient"] = {
        name: unpredictable(network, images, test) for name, network in (("flat", flat), ("mean", mean))
    }
    return found


def unpredictable(network: nn.Sequential, images: Tensor, test: Tensor) -> float:
    """Share of the gradient of class 0 that a ridge regression from the maps leaves unexplained on new images."""
    cut = int(LAYER) + 1

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            a = network[:cut](x)
        a.requires_grad_()
        (g,) = torch.autograd.grad(network[cut:](a)[:, 0].sum(), a)
        a, g = (nn.functional.avg_pool2d(t.detach(), 4).flatten(1).double() for t in (a, g))  # (N, 48 * 9)
        return torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1), g

    a, g = pair(images)
    b, h = pair(test)
    ridge = 1e-3 * a.square().mean() * len(a) * torch.eye(a.shape[1], dtype=a.dtype)
    ridge[-1, -1] = 0  # the constant is free
    weights = torch.linalg.solve(a.T @ a + ridge, a.T @ g)
    return float((b @ weights - h).square().sum() / h.square().sum())


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of the 95 % t-interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def measure(seeds: int = 5, quick: bool = False) -> dict[str, dict[str, list[float]]]:
    """Figure by map and name, one value for each seed."""
    rows = [one_seed(seed, quick) for seed in range(seeds)]
    return {name: {key: [row[name][key] for row in rows] for key in rows[0][name]} for name in rows[0]}


def main() -> None:
    """Measure, print, and record if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = measure(words.seeds, words.quick)
    print(f"{'':22}" + "".join(f"{figure:>19}" for figure in FIGURES))
    for name, figures in found.items():
        if "localised" in figures:
            cells = (interval(figures[figure]) for figure in FIGURES)
            print(f"{name:22}" + "".join(f"{mean:>11.3f} ±{half:6.3f}" for mean, half in cells))
    summary = {}
    for figure in FIGURES:
        gap = [a - b for a, b in zip(found["Grad-CAM"][figure], found["CAM, network changed"][figure], strict=True)]
        summary[figure] = interval(gap)
    print("Grad-CAM minus CAM    " + "".join(f"{mean:>+11.3f} ±{half:6.3f}" for mean, half in summary.values()))
    loss = [a - b for a, b in zip(found["accuracy"]["flat"], found["accuracy"]["mean"], strict=True)]
    for name, values in (*found["accuracy"].items(), ("flat minus mean", loss)):
        print("accuracy, {}: {:.3f} ± {:.3f}".format(name, *interval(values)))
    for name, values in found["unexplained gradient"].items():
        print("gradient left by a linear prediction, {}: {:.2e} ± {:.1e}".format(name, *interval(values)))
    print(f"{words.seeds} seeds, {time.perf_counter() - start:.0f} s, one thread")
    if words.record:
        record(found, words.seeds)


def record(found: dict[str, dict[str, list[float]]], seeds: int) -> None:
    """Write the step ``measured``: Grad-CAM on the network as it is against CAM on the changed one, and all values."""
    from torchive.catalogue import record_evidence
    from torchive.report.statistics import Rule, paired_estimate

    cam, grad_cam = found["CAM, network changed"], found["Grad-CAM"]
    gaps = {figure: paired_estimate(cam[figure], grad_cam[figure]) for figure in FIGURES}
    record_evidence(
        "grad_cam",
        "measured",
        "python benchmarks/grad_cam_localisation.py --record",
        metric="localised",
        unit="points",
        higher_is_better=True,
        baseline_title="CAM on the network changed for it",
        seeds=list(range(seeds)),
        baseline=cam["localised"],
        method=grad_cam["localised"],
        difference=gaps["localised"].as_dict(),
        outcome=Rule("localised", pairs=seeds).decide(gaps["localised"]),
        others={name: [gap.mean, gap.low, gap.high] for name, gap in gaps.items() if name != "localised"},
        scale={
            "data": "synthetic shapes in clutter",
            "train_samples": 4000,
            "test_samples": 500,
            "image_size": SIDE,
            "network": "three convolutions",
            "budget": "350 steps",
        },
        restricted="measured on synthetic images only",
        values={n: {k: [float(f"{v:.4g}") for v in vs] for k, vs in f.items()} for n, f in found.items()},
    )


if __name__ == "__main__":
    sys.exit(main())
