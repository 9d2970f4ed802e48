"""Detectors: against torchvision's on the same backbone, their own decoding, and how the cost grows with the boxes.

    python benchmarks/detectors.py [--parts against methods ...] [--rounds 15] [--only yolov3 ...]

``against``: training step and prediction at batch 1 and 8, ours over torchvision's, both on one feature network, 320
pixels (SSD: 300), 20 classes. ``methods``: the same times of every detector that is built, ResNet-18, 256
pixels, three classes, and the shares of decoding in a prediction with 1,000 candidates, without and with the masks of
the objects that are left. ``boxes``: a training step over the number of boxes in an image. ``claims``: what two papers
say of their speed, a prediction of one image: CondInst over torchvision's Mask R-CNN, both with 100 objects, and YOLOv3
over SSD. ``regions``: Light-Head's second stage over Faster R-CNN's, for 100 to 1000 regions. ``groups``: grouping
the pixels of perfect maps, directions as eight classes over directions as two numbers. Medians of rounds in which the
sides take turns; with one thread the processor's time.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection import MaskRCNN as TheirMaskRCNN
from torchvision.models.detection import RetinaNet as TheirRetinaNet
from torchvision.models.detection import ssd300_vgg16
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import torchive
from torchive.catalogue import card_names, get_card
from torchive.methods.segmentation.instance_depth_direction import Encoding, InstanceDecoder
from torchive.methods.segmentation.instance_depth_direction.encoding import encode
from torchive.nn.retinanet import RetinaNet

Targets = list[dict[str, Tensor]]
COUNTS = (0, 1, 10, 100, 1000, 5000)


class Named(nn.Module):
    """A feature network as torchvision wants it: maps by name, and their width."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.out_channels = inner.levels[0].channels  # type: ignore[index,union-attr]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict((str(k), m) for k, m in enumerate(self.inner(x)))


def scene(images: int, boxes: int, classes: int, side: int, *, masks: bool = False) -> tuple[list[Tensor], Targets]:
    """Noise with boxes of 8 pixels to a third of the side."""
    targets = []
    for _ in range(images):
        corner = torch.rand(boxes, 2) * side * 0.6
        size = 8 + torch.rand(boxes, 2) * (side / 3 - 8)
        box = torch.cat([corner, corner + size], 1)
        target = {"boxes": box, "labels": torch.randint(1, classes + 1, (boxes,))}
        if masks:
            x = torch.arange(side) + 0.5
            inside = [(x >= box[:, k, None]) & (x < box[:, k + 2, None]) for k in (0, 1)]  # (L, W), (L, H)
            target["masks"] = (inside[1][:, :, None] & inside[0][:, None, :]).to(torch.uint8)
        targets.append(target)
    return list(torch.rand(images, 3, side, side)), targets


def stepper(model: nn.Module, images: list[Tensor], targets: Targets) -> Callable[[], None]:
    """Losses with their gradients."""
    own = hasattr(model, "losses")

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model.train()
        copies = [dict(target) for target in targets]
        losses = model.losses(images, copies) if own else model(images, copies)  # type: ignore[operator]
        sum(losses.values()).backward()

    return step


def predictor(model: nn.Module, images: list[Tensor]) -> Callable[[], None]:
    """A prediction, ending in detections."""
    own = hasattr(model, "predict")

    def predict() -> None:
        model.eval()
        with torch.inference_mode():
            model.predict(images) if own else model(images)  # type: ignore[operator]

    return predict


def timed(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each, taking turns; the first two rounds fill caches."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 2):
        for run, found in zip(runs, times, strict=True):
            start = clock()
            run()
            found.append(1e3 * (clock() - start))
    return [found[2:] for found in times]


def pairs() -> dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], int]]:
    """Ours, torchvision's on the feature network of ours, and the side of the images."""
    plain: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": 320, "max_size": 320}

    def their_faster(ours: Any) -> nn.Module:
        anchors = AnchorGenerator(tuple((32 * 2**k,) for k in range(5)), ((0.5, 1.0, 2.0),) * 5)
        pool = MultiScaleRoIAlign([str(k) for k in range(4)], 7, 2)
        return TheirFasterRCNN(Named(ours.backbone), 21, rpn_anchor_generator=anchors, box_roi_pool=pool, **plain)

    def their_retina(ours: Any) -> nn.Module:
        sizes = tuple(tuple(x * 2 ** (k / 3) for k in range(3)) for x in (32, 64, 128, 256, 512))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
        return TheirRetinaNet(Named(ours.backbone), 20, anchor_generator=anchors, **plain)

    return {
        "faster_rcnn": (
            lambda: torchive.create_model("faster_rcnn", backbone="torchvision/resnet18", num_classes=20),
            their_faster,
            320,
        ),
        "RetinaNet (nn)": (
            lambda: RetinaNet(backbone="torchvision/resnet18", num_classes=20),
            their_retina,
            320,
        ),
        "ssd, VGG-16": (
            lambda: torchive.create_model("ssd", num_classes=20, default_box_set="torchvision"),
            lambda _: ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21),
            300,
        ),
    }


def against(rounds: int, only: Sequence[str]) -> None:
    """Ours and torchvision's in one run."""
    for name, (build, theirs_of, side) in pairs().items():
        if only and not any(word in name for word in only):
            continue
        torch.manual_seed(0)
        ours = build()
        theirs = theirs_of(ours)
        batch, targets = scene(2, 8, 20, side)
        many, _ = scene(8, 0, 20, side)
        rows = {
            "training step, 2 images": (stepper(ours, batch, targets), stepper(theirs, batch, targets)),
            "prediction, 1 image": (predictor(ours, many[:1]), predictor(theirs, many[:1])),
            "prediction, 8 images": (predictor(ours, many), predictor(theirs, many)),
        }
        for label, sides in rows.items():
            mine, other = timed(sides, rounds if "8" not in label else max(rounds // 3, 3))
            each = [a / b for a, b in zip(mine, other, strict=True)]
            ratio = median(mine) / median(other)
            print(
                f"{name:16} {label:24} ours {median(mine):8.1f} ms  theirs {median(other):8.1f} ms  "
                f"ratio {ratio:.3f} [{min(each):.3f}, {max(each):.3f}]",
                flush=True,
            )


def built() -> dict[str, dict[str, Any]]:
    """Every detector that takes a backbone, by name, with the options that suit it to 256 pixels."""
    options: dict[str, dict[str, Any]] = {
        "ssd": {"image_size": 256},
        "yolov3": {"image_size": 256},
        "deepfashion2_match_rcnn": {"landmarks": (), "matching": None},
    }
    found = {}
    for card in map(get_card, card_names()):
        finds_objects = {"detection", "instance-segmentation"} & set(card.tasks)
        if card.state == "built" and card.contract == "system" and finds_objects:
            found[card.name] = {"backbone": "timm/resnet18", "num_classes": 3, **options.get(card.name, {})}
    return found


def methods(rounds: int, only: Sequence[str]) -> None:
    """Every detector's training step, prediction, and the share of its decoding, without and with masks."""
    for name, options in built().items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        try:
            model: Any = torchive.create_model(name, **options)
        except TypeError as error:
            print(f"{name:20} {error}")
            continue
        batch, targets = scene(2, 8, 3, 256, masks=True)
        model.eval()
        with torch.inference_mode():
            raw = model(batch[:1])
            sizes = [(256, 256)]

            # what suppresses within forward, so that masks can be read there, has no threshold left
            open_to_all = {} if "scores" in raw else {"score_threshold": 0.0}

            def decode(model: Any = model, raw: Any = raw, sizes: Any = sizes, options: Any = open_to_all) -> None:
                with torch.inference_mode():
                    model.decode(raw, sizes, **options)

            # suppression comes before the best are taken, and of none there is no mask
            bare = partial(decode, options=open_to_all | {"max_detections": 0}) if open_to_all else decode
            runs = [stepper(model, batch, targets), predictor(model, batch[:1]), predictor(model, batch * 4)]
        step, one, eight, boxes, after = (median(t) for t in timed([*runs, bare, decode], max(rounds // 2, 3)))
        print(
            f"{name:20} step of 2: {step:8.1f} ms  batch 1: {one:7.1f} ms  batch 8: {eight:7.1f} ms  "
            f"decoding of one without a threshold: {boxes:6.1f} ms, {boxes / one:.1%} of a prediction; "
            f"with masks {after:6.1f} ms, {after / one:.1%}",
            flush=True,
        )


def boxes(rounds: int, only: Sequence[str]) -> None:
    """A training step of one image with 0 to 5,000 boxes."""
    for name, options in built().items():
        if only and name not in only:
            continue
        torch.manual_seed(0)
        try:
            model = torchive.create_model(name, **options)
        except TypeError:
            continue
        found = []
        for count in COUNTS:
            batch, targets = scene(1, count, 3, 256, masks=True)
            (times,) = timed([stepper(model, batch, targets)], max(rounds // 4, 3))
            found.append(median(times))
        cells = "  ".join(f"{count:,}: {value:.0f} ms" for count, value in zip(COUNTS, found, strict=True))
        print(f"{name:20} {cells}", flush=True)


def claims(rounds: int, only: Sequence[str]) -> None:
    """Predictions of one image: CondInst over Mask R-CNN (arXiv:2003.05664), YOLOv3 over SSD (arXiv:1804.02767)."""

    def mask_rcnn() -> nn.Module:
        inner = torchive.create_model("faster_rcnn", backbone="torchvision/resnet50", num_classes=80).backbone
        options: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "min_size": 320, "max_size": 480}
        anchors = AnchorGenerator(tuple((32 * 2**k,) for k in range(5)), ((0.5, 1.0, 2.0),) * 5)
        pools = {
            name: MultiScaleRoIAlign([str(k) for k in range(4)], size, 2)
            for name, size in (("box_roi_pool", 7), ("mask_roi_pool", 14))
        }
        return TheirMaskRCNN(
            Named(inner), 81, rpn_anchor_generator=anchors, box_score_thresh=0.0, **pools, **options
        ).eval()

    def condinst() -> Any:
        return torchive.create_model("condinst", backbone="torchvision/resnet50", num_classes=80).eval()

    def yolo() -> Any:
        return torchive.create_model("yolov3", image_size=320).eval()

    def ssd(backbone: str, side: int) -> Any:
        return torchive.create_model("ssd", backbone=backbone, image_size=side, num_classes=80).eval()

    rows: list[tuple[str, Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, int], dict[str, Any]]] = [
        ("condinst / Mask R-CNN", condinst, mask_rcnn, (320, 480), {"score_threshold": 0.0, "max_detections": 100}),
        ("yolov3 / SSD, ResNet-101", yolo, lambda: ssd("timm/resnet101", 320), (320, 320), {}),
        ("yolov3 / SSD, VGG-16", yolo, lambda: ssd("vgg16", 300), (320, 320), {}),
    ]
    for name, first, second, size, options in rows:
        if only and not any(word in name for word in only):
            continue
        torch.manual_seed(0)
        ours, theirs = first(), second()
        image = [torch.rand(3, *size)]

        def predict(model: Any = ours, image: Any = image, options: Any = options) -> int:
            with torch.inference_mode():
                return len(model.predict(image, **options)[0])

        def other(model: Any = theirs, image: Any = image) -> int:
            with torch.inference_mode():
                found = model.predict(image) if hasattr(model, "predict") else model(image)
                return len(found[0]["scores"] if isinstance(found[0], dict) else found[0])

        counts = predict(), other()
        mine, others = timed([predict, other], rounds)
        each = [a / b for a, b in zip(mine, others, strict=True)]
        print(
            f"{name:26} {median(mine):7.1f} ms over {median(others):7.1f} ms, "
            f"ratio {median(mine) / median(others):.2f} [{min(each):.2f}, {max(each):.2f}], "
            f"{counts[0]} and {counts[1]} objects",
            flush=True,
        )


def regions(rounds: int, only: Sequence[str]) -> None:
    """Second stages over the number of regions: Light-Head's over Faster R-CNN's two layers (arXiv:1711.07264), on the
    map of 2048 channels of an image of 800 x 1067 pixels."""
    if only and "light_head_rcnn" not in only:
        return
    torch.manual_seed(0)
    features = torch.randn(1, 2048, 50, 67).contiguous(memory_format=torch.channels_last)
    heads: dict[str, dict[str, Any]] = {
        "heavy": {"head": "heavy"},
        "thin, 256 inside": {},
        "thin, 64 inside": {"inter_channels": 64},
        "plain, 64 inside": {"head": "plain", "inter_channels": 64},
    }
    models: list[Any] = [
        torchive.create_model("light_head_rcnn", backbone="timm/resnet50", **options).eval()
        for options in heads.values()
    ]
    for count in (100, 300, 1000):
        corner = torch.rand(count, 2) * torch.tensor([867.0, 600.0])
        boxes = torch.cat([corner, corner + 20 + 180 * torch.rand(count, 2)], 1)
        image = torch.zeros(count, dtype=torch.int64)

        def second(model: Any, boxes: Tensor = boxes, image: Tensor = image) -> None:
            with torch.inference_mode():
                model.second(model.thin(features), 16, boxes, image)

        heavy, *others = timed([partial(second, model) for model in models], rounds)
        print(f"{count} regions: heavy {median(heavy):.0f} ms")
        for name, found in zip(list(heads)[1:], others, strict=True):
            each = [a / b for a, b in zip(found, heavy, strict=True)]
            print(
                f"  {name:18} {median(found):6.0f} ms, ratio {median(each):.2f} [{min(each):.2f}, {max(each):.2f}]",
                flush=True,
            )


def groups(rounds: int, only: Sequence[str]) -> None:
    """Discs of 12 pixels on a grid to objects, from maps without a fault (instance_depth_direction)."""
    if only and "instance_depth_direction" not in only:
        return
    for side in (128, 256, 512):
        x = torch.arange(side) + 0.5
        middles = torch.cartesian_prod(*[torch.arange(12.0, side - 8, 32)] * 2)[:, :, None]
        masks = ((x - middles[:, 0]) ** 2)[:, None] + ((x - middles[:, 1]) ** 2)[:, :, None] < 36
        target = {"masks": masks.to(torch.uint8), "labels": torch.ones(len(masks), dtype=torch.int64)}
        runs = []
        for directions in (8, 0):
            encoding = Encoding(directions=directions)
            truth = encode(target, (side, side), encoding)
            raw = {"semantic": one_hot(truth["semantic"], 2), "depth": one_hot(truth["depth"], encoding.depths + 1)}
            raw["direction"] = one_hot(truth["direction"], directions + 1) if directions else truth["vectors"]
            decoder = InstanceDecoder(encoding, num_classes=1)
            assert len(decoder.instances(raw).labels) == len(masks)
            runs.append(partial(decoder.instances, raw))
        classes, numbers = timed(runs, rounds)
        each = [a / b for a, b in zip(classes, numbers, strict=True)]
        print(
            f"{side} pixels, {len(masks)} discs: classes {median(classes):.1f} ms, numbers {median(numbers):.1f} ms, "
            f"ratio {median(each):.2f} [{min(each):.2f}, {max(each):.2f}]",
            flush=True,
        )


def one_hot(classes: Tensor, count: int) -> Tensor:
    """Logits (count, H, W) that are sure of the classes (H, W)."""
    return 20.0 * nn.functional.one_hot(classes, count).movedim(-1, 0).float()


RUNS = {
    "against": against,
    "methods": methods,
    "boxes": boxes,
    "claims": claims,
    "regions": regions,
    "groups": groups,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=[])
    a = parser.parse_args()
    torch.set_num_threads(1)
    for part in a.parts:
        print(f"== {part}")
        RUNS[part](a.rounds, a.only)


if __name__ == "__main__":
    main()
