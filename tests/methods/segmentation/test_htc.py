"""HTC: the released heads' losses, gradients, step and detections; torchvision's Mask R-CNN; the laws of its parts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torchvision
from tests.nn.torchvisions import LEVELS, assert_same, detect, mask_predictor, of_parts
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign

from torchive.engine.export import OnnxModel, write_onnx
from torchive.methods.segmentation.htc import HTC, FusedSemanticBranch, MaskCascade, model
from torchive.nn.box_cascade import kept_proposals
from torchive.nn.mask_head import mask_targets, positive_regions
from torchive.protocols import Level

SIZES = [[8.0], [16.0], [32.0], [64.0], [128.0]]
SMALL = {
    "num_classes": 3,
    "backbone": "timm/test_efficientnet",
    "channels": 8,
    "hidden": 16,
    "anchor_sizes": SIZES,
    "before_nms": (200, 100),
    "after_nms": (100, 50),
    "rois_per_image": 64,
}
MASK_R_CNN = {"stages": 1, "interleaved": False, "mask_flow": False, "semantic": False}


class Fixed(nn.Module):
    """A pyramid whose maps are given."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps
        self.levels = tuple(Level(maps[0].shape[1], 4 * 2**k) for k in range(5))

    def forward(self, _x: Tensor) -> list[Tensor]:
        return self.maps


def released_name(name: str) -> str:
    """A parameter of the release by the name that it has here."""
    kind, _, rest = name.partition(".")
    if kind == "bbox_head":
        stage, _, rest = rest.partition(".")
        for old, new in (
            ("shared_fcs.0", "box_head.fc6"),
            ("shared_fcs.1", "box_head.fc7"),
            ("fc_cls", "box_predictor.cls_score"),
            ("fc_reg", "box_predictor.bbox_pred"),
        ):
            rest = rest.replace(old, new)
        return f"boxes.stages.{stage}.{rest}"
    if kind == "mask_head":
        stage, _, rest = rest.partition(".")
        if rest.startswith("conv_res"):
            return f"masks.flows.{int(stage) - 1}.{rest.rpartition('.')[2]}"
        parts = rest.split(".")
        if parts[0] == "convs":
            return f"masks.heads.{stage}.mask_head.{parts[1]}.0.{parts[3]}"
        layer = {"upsample": "conv5_mask", "conv_logits": "mask_fcn_logits"}[parts[0]]
        return f"masks.heads.{stage}.mask_predictor.{layer}.{parts[1]}"
    rest = rest.replace("lateral_convs", "lateral").replace("conv_embedding", "embedding")
    return "semantic." + rest.replace("conv_logits", "logits").replace(".conv.", ".0.")


def moved(name: str, value: Tensor) -> Tensor:
    """Classes in our order: the release has the background last."""
    return value.roll(1, 0) if "fc_cls" in name else value


def test_matches_the_released_heads(record, parity) -> None:
    """Losses of all stages with re-assignment, every gradient, one step, and detections with masks."""
    stored = parity("htc")
    maps = [stored[f"map{k}"] for k in range(4)]
    maps.append(maps[-1][:, :, ::2, ::2])
    net = HTC(
        num_classes=3,
        backbone="timm/test_efficientnet",
        channels=4,
        hidden=8,
        semantic_classes=5,
        resize_first=True,
        mask_from="last",
    )
    net.backbone = Fixed(maps)
    own = dict(net.named_parameters())
    names = [key.removeprefix("before.") for key in stored if key.startswith("before.")]
    heads = {released_name(name): name for name in names}
    assert set(heads) == {name for name in own if not name.startswith(("rpn", "backbone"))}
    for mine, name in heads.items():
        own[mine].data.copy_(moved(name, stored[f"before.{name}"]))
    proposals = [stored["props0"], stored["props1"]]
    net.rpn.training_proposals = lambda *_: proposals
    targets = [
        {
            "boxes": stored[f"boxes{k}"],
            "labels": stored[f"labels{k}"],
            "masks": stored[f"gt{k}"],
            "semantic": stored[f"sem{k}"].repeat_interleave(8, 0).repeat_interleave(8, 1),
        }
        for k in range(2)
    ]
    images = torch.zeros(2, 3, 64, 64)
    losses = net.losses(images, targets)
    worst = {"loss": abs(losses["loss_semantic"].item() - float(stored["loss.loss_semantic_seg"]))}
    for t in range(3):
        for mine, theirs in (
            ("loss_classifier", "loss_cls"),
            ("loss_box_reg", "loss_bbox"),
            ("loss_mask", "loss_mask"),
        ):
            gap = abs(losses[f"stage{t}.{mine}"].item() - float(stored[f"loss.s{t}.{theirs}"]))
            worst["loss"] = max(worst["loss"], gap)
    optimiser = torch.optim.SGD([own[name] for name in heads], lr=0.02, momentum=0.9, weight_decay=1e-4)
    sum(value for key, value in losses.items() if "rpn" not in key and "objectness" not in key).backward()
    worst["gradient"] = max(
        (own[mine].grad - moved(name, stored[f"grad.{name}"])).abs().max().item() for mine, name in heads.items()
    )
    optimiser.step()
    after = {mine: name for mine, name in heads.items() if f"after.{name}" in stored}
    assert len(after) > 20
    worst["optimiser_step"] = max(
        (own[mine] - moved(name, stored[f"after.{name}"])).abs().max().item() for mine, name in after.items()
    )

    for mine, name in heads.items():
        own[mine].data.copy_(moved(name, stored[f"before.{name}"]))
    count = max(len(p) for p in proposals)
    padded = torch.zeros(2, count, 4)
    sure = torch.full((2, count), -1.0)
    for k, p in enumerate(proposals):
        padded[k, : len(p)], sure[k, : len(p)] = p, 1
    net.rpn.propose = lambda *_: (padded, sure)
    net.eval()
    with torch.no_grad():
        raw = net._raw(images, score_threshold=0.05)
        found = net.decode(raw, [(64, 64)] * 2)
    worst["output"] = (raw["semantic_logits"] - stored["semantic"]).abs().max().item()
    first = raw["masks"][0][: len(stored["mask"])]
    worst["output"] = max(worst["output"], (first - stored["mask"]).abs().max().item())
    for k, mine in enumerate(found):
        theirs = {key: stored[f"det{k}.{key}"] for key in ("boxes", "scores", "labels", "masks")}
        assert len(mine) == len(theirs["scores"]) > 20
        assert torch.equal(mine.labels, theirs["labels"])
        worst["output"] = max(
            worst["output"],
            (mine.boxes - theirs["boxes"]).abs().max().item(),
            (mine.scores - theirs["scores"]).abs().max().item(),
        )
        bits = theirs["masks"][:, None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
        assert torch.equal(mine.masks[:12], bits.flatten().view(-1, 64, 64).bool())
    assert max(worst.values()) < 2e-5, worst
    record(
        "htc",
        "matched",
        repository="open-mmlab/mmdetection",
        commit="release 3.3.0",
        largest_difference=max(worst.values()),
        note="float32; boxes in pixels; RoIAlign is torchvision's, not aligned, as in the year of the paper",
        **worst,
    )


def test_one_stage_is_torchvisions_mask_rcnn() -> None:
    """With copied weights: boxes, scores, labels and mask probabilities."""
    net = HTC(**{**SMALL, **MASK_R_CNN}).eval()
    head = net.masks.heads[0]
    for module in (net.boxes.stages[0].box_predictor, net.rpn.head.cls_logits, head.mask_predictor):
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
    predictor = FastRCNNPredictor(16, 4)
    predictor.cls_score = net.boxes.stages[0].box_predictor.cls_score
    shared = net.boxes.stages[0].box_predictor.bbox_pred
    predictor.bbox_pred.weight.data.copy_(shared.weight.repeat(4, 1))
    predictor.bbox_pred.bias.data.copy_(shared.bias.repeat(4))
    theirs = of_parts(
        MaskRCNN,
        net,
        sizes=SIZES,
        box_head=net.boxes.stages[0].box_head,
        box_predictor=predictor,
        mask_roi_pool=MultiScaleRoIAlign(LEVELS, 14, 2),
        mask_head=head.mask_head,
        mask_predictor=mask_predictor(head.mask_predictor, 3),
    )
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        expected, _ = detect(theirs, images)
        raw = net._raw(images, score_threshold=0.05)
    assert_same(raw, expected)


def test_mask_features_flow_on_the_same_regions(double) -> None:
    """Without G the flow changes nothing; with it the third stage's loss reaches the first stage's convolutions."""
    with_flow, without = MaskCascade(4, 2), MaskCascade(4, 2, mask_flow=False)
    without.heads.load_state_dict(with_flow.heads.state_dict())
    pooled = torch.randn(5, 4, 14, 14)
    labels = torch.randint(1, 3, (5,))
    assert not torch.allclose(with_flow(pooled, 2), without(pooled, 2))
    with_flow(pooled, 2).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in with_flow.heads[0].mask_head.parameters())
    assert all(p.grad is None for p in with_flow.heads[0].mask_predictor.parameters())
    without(pooled, 2).sum().backward()
    assert all(p.grad is None for p in without.heads[0].parameters())
    for p in with_flow.flows.parameters():
        nn.init.zeros_(p)
    for stage in range(3):
        assert torch.equal(with_flow(pooled, stage), without(pooled, stage))
    one = with_flow.probabilities(pooled, labels, last=True)
    assert not torch.allclose(with_flow.probabilities(pooled, labels), one)
    for head in with_flow.heads:
        head.load_state_dict(with_flow.heads[2].state_dict())
    torch.testing.assert_close(with_flow.probabilities(pooled, labels), one)  # the mean of equal masks


def test_flow_equals_its_formula(double, record) -> None:
    """Equations 3 and 4, layer by layer with explicit sums, and the mean of the sigmoids."""
    cascade = MaskCascade(2, 2, stages=2)
    pooled, labels = torch.randn(1, 2, 4, 4), torch.tensor([2])

    def conv(x: list, weight: Tensor, bias: Tensor) -> list:
        reach = weight.shape[2] // 2
        out = []
        for o in range(len(weight)):
            plane = [[float(bias[o])] * 4 for _ in range(4)]
            for i in range(4):
                for j in range(4):
                    for c in range(len(x)):
                        for a in range(-reach, reach + 1):
                            for b in range(-reach, reach + 1):
                                if 0 <= i + a < 4 and 0 <= j + b < 4:
                                    plane[i][j] += float(weight[o, c, a + reach, b + reach]) * x[c][i + a][j + b]
            out.append([[max(v, 0.0) for v in row] for row in plane])
        return out

    def features(head: nn.Module, x: list) -> list:
        for block in head.mask_head:
            x = conv(x, block[0].weight, block[0].bias)
        return x

    def mask(head: nn.Module, x: list) -> list:
        up, last = head.mask_predictor.conv5_mask, head.mask_predictor.mask_fcn_logits
        out = [[0.0] * 8 for _ in range(8)]
        for i in range(8):
            for j in range(8):
                value = float(last.bias[1])
                for o in range(2):
                    hidden = float(up.bias[o])
                    for c in range(2):
                        hidden += x[c][i // 2][j // 2] * float(up.weight[c, o, i % 2, j % 2])
                    value += float(last.weight[1, o, 0, 0]) * max(hidden, 0.0)
                out[i][j] = 1 / (1 + math.exp(-value))
        return out

    x = pooled[0].tolist()
    first = features(cascade.heads[0], x)
    passed = conv(first, cascade.flows[0].weight, cascade.flows[0].bias)
    second = features(
        cascade.heads[1],
        [[[x[c][i][j] + passed[c][i][j] for j in range(4)] for i in range(4)] for c in range(2)],
    )
    expected = (torch.tensor(mask(cascade.heads[0], first)) + torch.tensor(mask(cascade.heads[1], second))) / 2
    gap = (cascade.probabilities(pooled, labels)[0] - expected).abs().max().item()
    assert gap < 1e-12
    record("htc", "referenced", largest_difference=gap, dtype="float64", what="mask stages with flow, mean mask")


def test_semantic_branch_orders() -> None:
    maps = [torch.randn(1, 4, 32 // 2**k, 48 // 2**k) for k in range(5)]
    ours, theirs = FusedSemanticBranch(4, 6), FusedSemanticBranch(4, 6, resize_first=True)
    theirs.load_state_dict(ours.state_dict())
    logits, embedding = ours(maps)
    assert logits.shape == (1, 6, 16, 24)
    assert embedding.shape == (1, 4, 16, 24)
    assert embedding.min() >= 0
    assert not torch.allclose(logits, theirs(maps)[0])  # ReLU stands between
    same = [torch.full((1, 4, 32 // 2**k, 48 // 2**k), float(k)) for k in range(5)]
    torch.testing.assert_close(ours(same)[0], theirs(same)[0])  # resizing keeps a constant


def objects(size: int, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Four noise images with two to four overlapping bright shapes: 1 filled ellipses, 2 rectangles."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    images, targets = [], []
    for _ in range(4):
        image = torch.rand(3, size, size, generator=g) * 0.2
        masks: list[Tensor] = []
        labels = []
        for _ in range(int(torch.randint(2, 5, (1,), generator=g))):
            label = int(torch.randint(1, 3, (1,), generator=g))
            cx, cy = (torch.rand(2, generator=g) * 0.6 + 0.2) * size
            a, b = (torch.rand(2, generator=g) * 0.12 + 0.1) * size
            u, v = (x - cx) / a, (y - cy) / b
            shape = (u**2 + v**2 < 1) if label == 1 else (u.abs() < 1) & (v.abs() < 1)
            masks = [m & ~shape for m in masks] + [shape]
            labels.append(label)
            image = torch.where(shape, torch.rand(3, 1, 1, generator=g) * 0.5 + 0.5, image)
        kept = [k for k, m in enumerate(masks) if m.sum() > 12]
        stack = torch.stack([masks[k] for k in kept])
        boxes = torchvision.ops.masks_to_boxes(stack) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        images.append(image)
        targets.append(
            {"boxes": boxes, "labels": torch.tensor([labels[k] for k in kept]), "masks": stack.to(torch.uint8)}
        )
    return images, targets


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interleaved": False},
        {"mask_flow": False},
        {"semantic": False},
        {"semantic_into": ("mask",)},
        {"semantic_into": ()},
        {"image_size": 96, "stages": 2, "mask_from": "last"},
        MASK_R_CNN,
    ],
)
def test_switches(options: dict) -> None:
    net = HTC(**{**SMALL, **options})
    images, targets = objects(64, 0)
    images[1], targets[1] = images[1][:, :50], {**targets[1], "masks": targets[1]["masks"][:, :50]}
    losses = net.losses(images, targets)
    assert len(losses) == 2 + 3 * len(net.boxes.stages) + (net.semantic is not None)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    for image, found in zip(images, net.eval().predict(images), strict=True):
        assert found.masks.shape == (len(found), *image.shape[1:])
        assert found.masks.dtype == torch.bool
        assert len(found) > 0
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_masks_learn_the_boxes_of_their_stage(interleaved: bool, monkeypatch) -> None:
    """Interleaved, from regions drawn anew of the boxes just refined (section 3.1); otherwise from the box stage's."""
    net = HTC(**SMALL, interleaved=interleaved)
    drawn: list = []
    sample, learn = net.boxes.sample, net.boxes.learn
    refined: list = []
    learnt: list = []
    monkeypatch.setattr(net.boxes, "sample", lambda *given: drawn.append((given, sample(*given))) or drawn[-1][1])
    monkeypatch.setattr(net.boxes, "learn", lambda *given: refined.append(learn(*given)[1]) or ({}, refined[-1]))
    monkeypatch.setattr(
        model, "mask_targets", lambda regions, *rest: learnt.append(regions) or mask_targets(regions, *rest)
    )
    net.losses(*objects(64, 0))
    assert len(drawn) == (6 if interleaved else 3)
    for t, regions in enumerate(learnt):
        of_boxes, of_masks = drawn[2 * t if interleaved else t], drawn[2 * t + 1 if interleaved else t]
        assert torch.equal(regions.boxes, positive_regions(of_masks[1]).boxes)
        if interleaved:
            kept = kept_proposals(of_boxes[1], refined[t], 4)
            assert of_masks[0][0] == t
            assert all(torch.equal(a, b) for a, b in zip(of_masks[0][1], kept, strict=True))


@pytest.mark.parametrize("into", [(), ("box",), ("mask",), ("box", "mask")])
def test_context_goes_where_it_is_named(into: tuple[str, ...]) -> None:
    """Regions' features change with the embedding where ``semantic_into`` names them; unnamed, it is not built."""
    net = HTC(**SMALL, semantic_into=into)
    with torch.no_grad():
        features, raw = net._features(torch.rand(1, 3, 64, 64))
    assert raw["semantic_logits"].shape[1] == 4
    assert (features.embedding is None) == (net.semantic.embedding is None) == (not into)
    plain = replace(features, into=())
    louder = features if not into else replace(features, embedding=features.embedding + 1)
    boxes, image = torch.tensor([[4.0, 6, 40, 50], [10, 2, 30, 60]]), torch.zeros(2, dtype=torch.int64)
    for name in ("box", "mask"):
        pooled, without, more = (
            getattr(f, "for_boxes" if name == "box" else "for_masks")(boxes, image) for f in (features, plain, louder)
        )
        assert torch.equal(pooled, without) == (name not in into)
        torch.testing.assert_close(more, pooled + (name in into))


@pytest.mark.parametrize("count", [0, 1000])
def test_empty_and_crowded_images(count: int) -> None:
    net = HTC(**SMALL)
    corner = torch.rand(count, 2) * 60
    size = torch.rand(count, 2) * 3 + 1  # down to a pixel
    boxes = torch.cat([corner, corner + size], 1)
    y, x = torch.arange(64).view(1, -1, 1) + 0.5, torch.arange(64).view(1, 1, -1) + 0.5
    x1, y1, x2, y2 = (b.view(-1, 1, 1) for b in boxes.unbind(1))
    masks = ((x > x1) & (x < x2) & (y > y1) & (y < y2)).to(torch.uint8)
    crowd = {"boxes": boxes, "labels": torch.randint(1, 4, (count,)), "masks": masks}
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 48),
        "semantic": torch.full((64, 48), 255),
    }
    losses = net.losses([torch.rand(3, 64, 64), torch.rand(3, 64, 48)], [crowd, none])
    assert all(v.isfinite() for v in losses.values())
    assert (losses["stage2.loss_mask"].item() == 0) == (count == 0)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_what_is_refused() -> None:
    for options, words in (
        ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ({"stages": 4}, "stages must lie in 1 to 3.*got 4"),
        ({"mask_from": "first"}, "mask_from must be mean or last, got 'first'"),
        ({"semantic_into": ("boxes",)}, r"semantic_into may name box and mask, got \['boxes'\]"),
        ({"semantic_classes": 3}, "semantic_classes must be above num_classes=3, got 3"),
    ):
        with pytest.raises(ValueError, match=words):
            HTC(**{**SMALL, **options})
    images, targets = objects(64, 0)
    targets[1]["semantic"] = torch.full((64, 64), 255)
    targets[1]["semantic"][8:40, 8:40] = 4
    with pytest.raises(ValueError, match="target 1: semantic maps must hold 0 to 3 and 255, got 4"):
        HTC(**SMALL).losses(images, targets)
    del targets[2]["masks"]
    with pytest.raises(ValueError, match="target 2: expected masks beside the boxes, got boxes, labels"):
        HTC(**SMALL).losses(images, targets)
    with pytest.raises(ValueError, match="level must lie in 0 to 4, got 5"):
        FusedSemanticBranch(4, 3, level=5)


@pytest.mark.slow
def test_one_onnx_file_serves_every_size(tmp_path) -> None:
    """Up to the masks of the chosen detections, suppression and pooling included."""
    net = HTC(**SMALL).eval()
    nn.init.normal_(
        net.rpn.head.cls_logits.weight, std=5.0
    )  # scores that lie apart, so that rounding keeps their order
    for name, p in net.boxes.stages.named_parameters():
        if "cls_score" in name:
            nn.init.normal_(p, std=0.5)
    write_onnx(net, torch.randn(2, 3, 64, 64), tmp_path / "whole.onnx")
    exported = OnnxModel(tmp_path / "whole.onnx")
    for size in [(2, 3, 64, 64), (3, 3, 70, 100)]:
        x = torch.randn(size)
        with torch.no_grad():
            raw = net(x)
        for (name, expected), got in zip(raw.items(), exported(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=f"{name} at {size}")
