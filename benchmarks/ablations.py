"""Parts of detection methods switched on one by one, on drawn scenes: what each gives, and what a prediction costs.

    python benchmarks/ablations.py [--methods tsd htc ...] [--arms NAME ...] [--seeds 3] [--steps 240] [--threads 1]

Scenes are two to five discs, squares and crosses that may hide each other, on stripes above and checks below a horizon,
in noise. Every arm of a seed starts from that seed and learns the same images in the same order, by AdamW at 1e-3 with
a cosine; 64 scenes that it never saw score it. Printed are means over seeds in percent, and against the first arm the
difference in points with its 95 % t-interval; the time is the processor's for a prediction of one image.

``tsd`` the ordinary head and two separate ones at about equal multiplications, TSD without and with the progressive
constraint. ``htc`` its switches one after the other, and the semantic branch into boxes or masks alone; also the norm
of the backbone's gradient over the last 50 steps. ``thundernet`` context and attention alone and together, attention
from a convolution of its own; and SSDLite on images so large that it multiplies as often. ``light_head_rcnn`` its
heads and R-FCN's at 100, 300 and 900 regions in test. ``ehsod`` boxes of a fifth of the images, without and with the
labels of the others, these also at a tenth of their weight, and boxes of all; the batches are the same, so that the
first two see as many boxes. ``panoptic_fpn`` one network against two smaller ones, with two kinds of stuff, and its
own choices. ``netnet`` fusion, erasing and transferring. ``yolov3`` tiny, with focal objectness and with one map
only; also what objectness background and objects have. ``condinst`` without coordinates, without filters of their
own, and Mask R-CNN; ``pointins`` without weights of their own, and CondInst.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import masks_to_boxes

import torchive
from torchive import FocalLoss
from torchive.engine.metrics import metrics_of, record_of
from torchive.report.statistics import intervals

Target = dict[str, Tensor]
Scenes = tuple[list[Tensor], list[Target]]
THINGS, STUFF = ("disc", "square", "cross"), ("stripes", "checks")
TWO_STAGE = {
    "backbone": "timm/test_resnet",
    "channels": 32,
    "hidden": 64,
    "anchor_sizes": [[8.0], [14.0], [22.0], [32.0], [48.0]],
    "before_nms": [200, 100],
    "after_nms": [100, 50],
    "rois_per_image": 64,
}
ONE_MAP = {
    "backbone": "timm/test_resnet",
    "hidden": 128,
    "anchor_sizes": [14.0, 22.0, 32.0, 48.0],
    "before_nms": [1000, 1000],
    "after_nms": [100, 100],
    "rois_per_image": 128,
}
DENSE = {
    "backbone": "timm/test_resnet",
    "channels": 32,
    "depth": 2,
    "finest": 4,
    "top": "none",
    "sizes_of_interest": [14.0, 24.0, 40.0],
}
MASK_RCNN = {**TWO_STAGE, "stages": 1, "interleaved": False, "mask_flow": False, "semantic": False}


@dataclass(frozen=True)
class Study:
    """The arms of a method: constructor arguments that all share, and those of each."""

    shared: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    metrics: tuple[str, ...] = ("map", "map_75")
    size: int = 64
    batch: int = 4
    rivals: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)  # other methods, with all arguments
    boxed: dict[str, float] = field(default_factory=dict)  # share of the images with boxes, by arm
    regions: tuple[int, ...] = ()  # numbers of regions at which each arm is scored


OBJECTNESS = {"background": "% objectness of background", "objects": "% of objects"}
REST = {"ms": "ms", "work": "million multiplications", "norm": "gradient's norm", "parameters": "million parameters"}
STUDIES = {
    "tsd": Study(
        {**TWO_STAGE, "inter_channels": 32, "samples": 2},
        {
            "ordinary head": {"head": "sibling", "hidden": 140},
            "separate heads": {"head": "separate", "hidden": 80},
            "without the constraint": {"margin": None},
            "TSD": {},
        },
        metrics=("map", "map_50", "map_75"),
    ),
    "htc": Study(
        {**TWO_STAGE, "semantic_classes": 1 + len(THINGS) + len(STUFF)},
        {
            "cascade": {"interleaved": False, "mask_flow": False, "semantic": False},
            "interleaved": {"mask_flow": False, "semantic": False},
            "and mask flow": {"semantic": False},
            "and semantic into boxes": {"semantic_into": ["box"]},
            "and semantic into masks": {"semantic_into": ["mask"]},
            "and semantic into both": {},
        },
        metrics=("map", "mask_map"),
    ),
    "thundernet": Study(
        {**ONE_MAP, "image_size": None, "mining": False},
        {
            "neither": {"global_branch": False, "attention": "none"},
            "context": {"attention": "none"},
            "attention": {"global_branch": False},
            "both": {},
            "both, attention's own convolution": {"attention": "own"},
        },
        metrics=("map", "map_50"),
        size=96,
        rivals={"SSDLite, 108 pixels": ("ssd", {"backbone": "timm/test_resnet", "image_size": 108, "lite": True})},
    ),
    "netnet": Study(
        {"backbone": "timm/test_resnet", "image_size": 96},
        {
            "neither, which is SSD": {"fusion": "none", "pairs": []},
            "fusion": {"pairs": []},
            "fusion and erasing": {"variant": "erase"},
            "fusion and transferring": {"variant": "transfer"},
            "all": {},
            "all, fused as in pyramids": {"fusion": "top_down"},
        },
        metrics=("map", "map_50"),
        size=96,
    ),
    "yolov3": Study(
        {
            "backbone": "tiny",
            "image_size": 96,
            "anchors": [[[10, 10], [14, 14], [18, 18]], [[24, 14], [14, 24], [28, 28]]],
            "prior": 0.01,
        },
        {
            "binary cross-entropy": {},
            "focal objectness": {"loss": FocalLoss(gamma=2.0, alpha=0.5, reduction="none")},
            "one map": {"widths": [256], "anchors": [[[12, 12], [18, 18], [24, 14], [14, 24], [24, 24], [30, 30]]]},
        },
        metrics=("map", "map_50"),
        size=96,
    ),
    "condinst": Study(
        {**DENSE, "mask_channels": 32},
        {
            "coordinates and filters": {},
            "without coordinates": {"coordinates": False},
            "one filter for all": {"conditional": False},
        },
        metrics=("mask_map", "map"),
        rivals={"Mask R-CNN": ("htc", MASK_RCNN)},
    ),
    "pointins": Study(
        DENSE,
        {"weights for each object": {}, "plain regression": {"variant": "direct"}},
        metrics=("mask_map", "map"),
        rivals={"CondInst": ("condinst", {**DENSE, "mask_channels": 32})},
    ),
    "light_head_rcnn": Study(
        {**ONE_MAP, "inter_channels": 64, "width": 128, "before_nms": [1000, 2000], "after_nms": [100, 900]},
        {
            "two layers": {"head": "heavy"},
            "thin, by place": {},
            "thin, without place": {"head": "plain"},
            "voted (R-FCN)": {"head": "voted", "hidden": 256},
        },
        metrics=("map", "map_50"),
        size=160,
        batch=2,
        regions=(100, 300, 900),
    ),
    "ehsod": Study(
        TWO_STAGE,
        {
            "boxes of 20 %": {"cam_weight": 0.0, "image_weight": 0.0, "rank_by": "none"},
            "hybrid, boxes of 20 %": {},
            "hybrid with a tenth of the weights, boxes of 20 %": {"cam_weight": 0.1, "image_weight": 0.1},
            "boxes of all": {"cam_weight": 0.0, "image_weight": 0.0, "rank_by": "none"},
        },
        metrics=("map", "map_50"),
        batch=8,
        boxed={
            "boxes of 20 %": 0.2,
            "hybrid, boxes of 20 %": 0.2,
            "hybrid with a tenth of the weights, boxes of 20 %": 0.2,
        },
    ),
    "panoptic_fpn": Study(
        {**TWO_STAGE, "stuff_classes": len(STUFF), "background": False, "width": 32, "stuff_area": 64},
        {
            "two networks": {"separate": "timm/test_resnet"},
            "one network": {"channels": 64},
            "one network of half the parameters": {},
            "its maps concatenated": {"combine": "concat"},
            "its semantic loss by 0.25": {"semantic_weight": 0.25},
            "its semantic loss by 1": {"semantic_weight": 1.0},
        },
        metrics=("pq", "pq_things", "pq_stuff", "mask_map"),
    ),
}


def draw(count: int, size: int, seed: int) -> Scenes:
    """Images (3, size, size) and targets with boxes, labels, masks and a semantic map."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    images, targets = [], []
    for _ in range(count):
        below = y > float(torch.rand((), generator=g) * 0.4 + 0.3) * size
        stripes, checks = y.long() // 3 % 2 == 0, (y.long() // 4 + x.long() // 4) % 2 == 0
        image = torch.where(below, checks, stripes).float() * 0.3 + torch.rand(3, size, size, generator=g) * 0.4
        semantic = torch.where(below, len(THINGS) + 2, len(THINGS) + 1)
        masks, labels = [], []
        for _ in range(int(torch.randint(2, 6, (1,), generator=g))):
            label = int(torch.randint(1, len(THINGS) + 1, (1,), generator=g))
            place, half = torch.rand(2, generator=g) * 0.8 + 0.1, torch.rand(2, generator=g) * 10 + 5
            u, v = (x - place[0] * size) / half[0], (y - place[1] * size) / half[1]
            square = (u.abs() < 1) & (v.abs() < 1)
            shape = (square & (u**2 + v**2 < 1), square, square & ((u.abs() < 0.35) | (v.abs() < 0.35)))[label - 1]
            masks = [mask & ~shape for mask in masks] + [shape]
            labels.append(label)
            image = torch.where(shape, torch.rand(3, 1, 1, generator=g) * 0.6 + 0.4, image)
            semantic = torch.where(shape, label, semantic)
        seen = [k for k, mask in enumerate(masks) if mask.sum() > 20]
        stack = torch.stack([masks[k] for k in seen])
        boxes = masks_to_boxes(stack) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        found = {"boxes": boxes, "labels": torch.tensor([labels[k] for k in seen]), "masks": stack.to(torch.uint8)}
        images.append(image)
        targets.append({**found, "semantic": semantic})
    return images, targets


def partly_boxed(targets: list[Target], share: float) -> list[Target]:
    """The first ``share`` of the targets keep their boxes, the others only which classes there are."""
    parts = []
    for place, target in enumerate(targets):
        kept = place < share * len(targets)
        shown = torch.zeros(len(THINGS)).index_fill(0, target["labels"] - 1, 1.0)
        rows = slice(None) if kept else slice(0)
        known = {key: target[key][rows] for key in ("boxes", "labels")}
        parts.append({**known, "has_boxes": torch.tensor(kept), "image_labels": shown})
    return parts


def learn(net: nn.Module, scenes: Scenes, *, steps: int, batch: int, seed: int) -> float:
    """Train, and the mean norm of the backbone's gradient over the last 50 steps."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.Generator().manual_seed(seed)
    norms = []
    net.train()
    for step in range(steps):
        rows = torch.randperm(len(scenes[0]), generator=order)[:batch].tolist()
        torch.manual_seed(1000 * seed + step)
        losses = net.losses([scenes[0][k] for k in rows], [scenes[1][k] for k in rows])  # type: ignore[operator]
        optimiser.zero_grad()
        sum(losses.values()).backward()
        gradients = [p.grad for p in net.backbone.parameters() if p.grad is not None]  # type: ignore[union-attr]
        norms.append(float(nn.utils.get_total_norm(gradients)))
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    return mean(norms[-50:])


def scored(net: nn.Module, unseen: Scenes) -> dict[str, float]:
    """All metrics on images that were not learnt, in percent, and the milliseconds of a prediction."""
    rows, spent = [], []
    with torch.no_grad():
        with FlopCounterMode(display=False) as count:
            net.eval().requires_grad_(False).predict(unseen[0][:1])  # type: ignore[operator]
        for image, truth in zip(*unseen, strict=True):
            start = time.process_time()
            (found,) = net.eval().predict([image])  # type: ignore[operator]
            spent.append(1e3 * (time.process_time() - start))
            rows.append(record_of("detection", found, truth, len(THINGS)))
    metrics = metrics_of("detection", rows, THINGS, STUFF)
    return {name: 100 * value for name, value in metrics.items()} | {
        "ms": median(spent),
        "work": count.get_total_flops() / 2e6,
    }


class Recorder(nn.Module):
    """A loss of objectness that keeps what it was given."""

    def forward(self, objectness: Tensor, there: Tensor) -> Tensor:
        self.score, self.there = objectness.sigmoid(), there > 0
        return objectness


def separation(net: nn.Module, unseen: Scenes) -> dict[str, float]:
    """Mean objectness, in percent, where no object is and where one is."""
    kept, net.loss = net.loss, Recorder()
    with torch.no_grad():
        net.losses(*unseen)  # type: ignore[operator]
    found = {
        name: 100 * float(net.loss.score[net.loss.there == flag].mean())
        for name, flag in zip(OBJECTNESS, (0, 1), strict=True)
    }
    net.loss = kept
    return found


def arms(
    name: str, study: Study, seed: int, steps: int, wanted: list[str] | None = None
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each arm's figures under one seed."""
    learnt, unseen = draw(400, study.size, seed), draw(64, study.size, 10_000 + seed)
    nets = {arm: (name, {**study.shared, **options}) for arm, options in study.arms.items()} | study.rivals
    for place, (arm, (method, options)) in enumerate(nets.items()):
        if wanted is not None and place and arm not in wanted:
            continue
        torch.manual_seed(seed)
        net = torchive.create_model(method, num_classes=len(THINGS), **options)
        targets = partly_boxed(learnt[1], study.boxed[arm]) if arm in study.boxed else learnt[1]
        norm = learn(net, (learnt[0], targets), steps=steps, batch=study.batch, seed=seed)
        rest = separation(net, unseen) if method == "yolov3" else {}
        rest |= {"norm": norm, "parameters": sum(p.numel() for p in net.parameters()) / 1e6}
        if not study.regions:
            yield arm, {**scored(net, unseen), **rest}
        for count in study.regions:
            net.rpn.after_nms = (net.rpn.after_nms[0], count)  # type: ignore[union-attr]
            yield f"{arm}, {count} regions", {**scored(net, unseen), **rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=sorted(STUDIES), default=list(STUDIES))
    parser.add_argument("--arms", nargs="+", help="all if not given; the first, to which they are compared, always")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.methods:
        study = STUDIES[name]
        found: dict[str, list[dict[str, float]]] = {}
        for seed in range(args.seeds):
            for arm, values in arms(name, study, seed, args.steps, args.arms):
                found.setdefault(arm, []).append(values)
                print(f"  {name} seed {seed} {arm}: {values[study.metrics[0]]:.1f}", flush=True)
        first = next(iter(found.values()))
        print(f"{name}, {args.seeds} seeds, {args.steps} steps")
        for arm, rows in found.items():
            parts = []
            for metric in study.metrics:
                text = f"{metric} {mean(row[metric] for row in rows):.1f}"
                gaps = [row[metric] - base[metric] for row, base in zip(rows, first, strict=True)]
                if rows is not first and len(gaps) > 1:
                    low, high = intervals([gaps])
                    text += f" ({mean(gaps):+.1f} [{low[0]:+.1f}, {high[0]:+.1f}])"
                parts.append(text)
            units = {key: unit for key, unit in (REST | OBJECTNESS).items() if key in rows[0]}
            rest = [f"{mean(row[key] for row in rows):.2f} {unit}" for key, unit in units.items()]
            print(f"  {arm:36s} {'; '.join([*parts, *rest])}", flush=True)


if __name__ == "__main__":
    main()
