"""Faster R-CNN: its losses against a slow float64 reference, the whole model against torchvision's, and its options."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from tests.nn.torchvisions import LEVELS, Named
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN as TheirFasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou

from torchive.engine.export import OnnxModel, write_onnx
from torchive.methods.detection.faster_rcnn import FasterRCNN
from torchive.nn.region_proposals import ConditionedRPNHead, propose, rpn_loss
from torchive.nn.regions import Regions, offset_errors
from torchive.ops.roi import pool_regions

SIZES = [[8.0], [16.0], [32.0], [64.0], [128.0]]
SMALL = {
    "num_classes": 3,
    "backbone": "timm/test_efficientnet",
    "channels": 16,
    "hidden": 32,
    "anchor_sizes": SIZES,
    "before_nms": (200, 100),
    "after_nms": (100, 50),
    "rois_per_image": 64,
}


def first_sampler(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Takes every labelled anchor."""
    return [(x == 1) for x in labels], [(x == 0) for x in labels]


@pytest.mark.parametrize("normalisation", ["paper", "sampled"])
def test_rpn_loss_equals_slow_reference(normalisation: str, record) -> None:
    labels = [torch.randint(-1, 2, (40,)).double() for _ in range(2)]
    objectness = torch.randn(2, 40, dtype=torch.double)
    deltas, codes = (
        torch.randn(2, 40, 4, dtype=torch.double),
        [torch.randn(40, 4, dtype=torch.double) * 2 for _ in range(2)],
    )
    got = rpn_loss(objectness, deltas, labels, codes, first_sampler, normalisation=normalisation, positions=20)
    beta = 1.0 if normalisation == "paper" else 1 / 9
    cls = box = 0.0
    count = 0
    for n in range(2):
        for i in range(40):
            label = float(labels[n][i])
            if label < 0:
                continue
            count += 1
            p = 1 / (1 + math.exp(-float(objectness[n, i])))
            cls -= math.log(p) if label else math.log(1 - p)
            if label:
                for x in (deltas[n, i] - codes[n][i]).tolist():
                    box += 0.5 * x * x / beta if abs(x) < beta else abs(x) - 0.5 * beta
    if normalisation == "paper":
        cls, box = cls / (2 * 256), 10 * box / (2 * 20)
    else:
        cls, box = cls / count, box / count
    gap = max(abs(float(got["loss_objectness"]) - cls), abs(float(got["loss_rpn_box_reg"]) - box))
    assert gap < 1e-10
    if normalisation == "paper":
        record("faster_rcnn", "referenced", largest_difference=gap, dtype="float64", what="equation 1")


def test_nothing_sampled_gives_a_zero_loss() -> None:
    objectness, deltas = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5, 4, requires_grad=True)
    for normalisation in ("paper", "sampled"):
        losses = rpn_loss(
            objectness,
            deltas,
            [torch.full((5,), -1.0)],
            [torch.zeros(5, 4)],
            first_sampler,
            normalisation=normalisation,
        )
        sum(losses.values()).backward()
        assert all(float(v.detach()) == 0 for v in losses.values())


@pytest.mark.parametrize(("stage", "beta"), [("paper", 1.0), ("sampled", 1 / 9), ("second", 1.0), ("second", 1 / 9)])
def test_smooth_l1_has_a_bounded_continuous_gradient(stage: str, beta: float) -> None:
    """Of both stages: x / beta up to beta, then 1."""
    x = torch.linspace(-3, 3, 601, dtype=torch.double)
    deltas, ones = x[:, None].repeat(1, 4).requires_grad_(), torch.ones(601, dtype=torch.int64)
    if stage == "second":
        box = torch.tensor([[3.0, 4, 9, 12]], dtype=torch.double).repeat(601, 1)  # regions that are their objects
        offset_errors(deltas, Regions(box, ones * 0, ones, ones * 0, box), beta=beta).sum().backward()
    else:
        options = {"normalisation": stage, "balance": 1.0}
        codes = [torch.zeros(601, 4, dtype=torch.double)]
        losses = rpn_loss(torch.zeros(1, 601), deltas[None], [ones.double()], codes, first_sampler, **options)
        (losses["loss_rpn_box_reg"] * (601 if stage == "sampled" else 1)).backward()
    for gradient in deltas.grad.unbind(1):
        torch.testing.assert_close(gradient, (x / beta).clamp(-1, 1))
        assert gradient.diff().abs().max() < 0.0101 / beta


@pytest.mark.parametrize("pyramid", [True, False])
def test_second_stage_has_the_paper_s_smooth_l1_with_one_map(pyramid: bool) -> None:
    net = FasterRCNN(**{**SMALL, "pyramid": pyramid, "anchor_sizes": SIZES if pyramid else [[16.0, 32.0]]})
    target = {"boxes": torch.tensor([[5.0, 5, 40, 45]]), "labels": torch.tensor([1])}
    image, found = torch.rand(1, 3, 64, 64), []
    for beta in (net.region_beta, 1.0, 1 / 9):
        net.region_beta = beta
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(float(net.losses(image, [target])["loss_box_reg"]))
    assert found[0] == found[2 if pyramid else 1] != found[1 if pyramid else 2]
    assert FasterRCNN(**SMALL, classification="sigmoid", region_beta=0.5).region_loss.beta == 0.5


def test_torchvisions_call_is_refused() -> None:
    """The second argument is no condition: losses are asked for by name."""
    target = {"boxes": torch.tensor([[5.0, 5, 40, 45]]), "labels": torch.tensor([1])}
    with pytest.raises(TypeError, match=r"forward\(\) takes 2 positional arguments"):
        FasterRCNN(**SMALL)([torch.rand(3, 64, 64)], [target])


def test_paper_defaults() -> None:
    net = FasterRCNN(hidden=8)
    assert net.strides == (16,)
    assert len(net.rpn.cell0) == 9
    area = (net.rpn.cell0[:, 2] - net.rpn.cell0[:, 0]) * (net.rpn.cell0[:, 3] - net.rpn.cell0[:, 1])
    torch.testing.assert_close(area.sqrt(), torch.tensor([128.0, 256, 512]).repeat(3), rtol=0.01, atol=0)
    assert net.rpn.head.conv[0][0].out_channels == 512
    assert net.rpn.head.bbox_pred.out_channels == 36
    with torch.device("meta"):
        assert FasterRCNN().roi_heads.box_head.fc6.out_features == 4096
    assert net.roi_heads.box_predictor.bbox_pred.out_features == 4 * 21
    assert (net.rpn.before_nms, net.rpn.after_nms, net.rpn.min_proposal) == ((12000, 6000), (2000, 300), 16.0)
    assert net.rpn.ignore_crossing
    assert net.rpn.normalisation == "paper"


@pytest.mark.parametrize("pyramid", [True, False])
def test_equals_torchvision_on_copied_weights(pyramid: bool, record) -> None:
    """Losses and gradients under one seed, proposals, and detections of the whole model."""
    sizes = SIZES if pyramid else [[16.0, 32.0, 64.0]]
    options = {**SMALL, "pyramid": pyramid, "anchor_sizes": sizes, "min_proposal": 0.0, "region_beta": 1 / 9}
    ours = FasterRCNN(**options, ignore_crossing=False, rpn_normalisation="sampled")
    nn.init.normal_(ours.roi_heads.box_predictor.cls_score.weight, std=0.3)
    nn.init.normal_(ours.rpn.head.cls_logits.weight, std=0.3)
    channels = ours.backbone.levels[0].channels
    theirs = TheirFasterRCNN(
        Named(ours.backbone, channels),
        min_size=128,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50,
        box_roi_pool=MultiScaleRoIAlign(LEVELS if pyramid else ["0"], 7, 2),
        box_head=ours.roi_heads.box_head,
        box_predictor=ours.roi_heads.box_predictor,
        box_batch_size_per_image=64,
    )
    theirs.rpn.head.load_state_dict(ours.rpn.head.state_dict())
    images = [torch.randn(3, 128, 192), torch.randn(3, 192, 128)]
    targets = [
        {"boxes": torch.tensor([[10.0, 12, 60, 70], [90, 20, 130, 50]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[30.0, 101, 72, 147]]), "labels": torch.tensor([2])},
    ]
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    torch.manual_seed(3)
    expected = theirs.train()(images, [dict(t) for t in targets])
    torch.manual_seed(3)
    for _ in images:  # their transform draws one size for each image
        torch.empty(1).uniform_()
    got = ours.train().losses(images, targets)
    assert set(got) == set(expected)
    gaps = [float((got[k] - expected[k]).detach().abs()) for k in got]
    wanted = torch.autograd.grad(sum(expected.values()), ours.roi_heads.box_head.fc6.weight)[0]
    found = torch.autograd.grad(sum(got.values()), ours.roi_heads.box_head.fc6.weight)[0]
    gaps.append(float((wanted - found).abs().max()))
    with torch.no_grad():
        for mine, other in zip(ours.eval().predict(images), theirs.eval()(images), strict=True):
            assert len(mine) == len(other["scores"]) > 0
            assert torch.equal(mine.labels, other["labels"])
            gaps += [
                float((mine.boxes - other["boxes"]).abs().max()),
                float((mine.scores - other["scores"]).abs().max()),
            ]
    assert max(gaps) < 1e-4, gaps
    if pyramid:
        record(
            "faster_rcnn",
            "matched",
            repository="pytorch/vision",
            commit=f"release {torchvision.__version__.split('+')[0]}",
            largest_difference=max(gaps),
            dtype="float32",
            what="losses, gradients, boxes in pixels and scores, with a pyramid and with one map",
        )


def test_crossing_anchors_are_ignored_and_each_object_keeps_one() -> None:
    net = FasterRCNN(**{**SMALL, "ignore_crossing": True})
    raw = net(torch.randn(1, 3, 128, 128))
    anchors = raw["anchors"]
    target = {"boxes": torch.tensor([[3.0, 4, 30, 36], [60, 60, 120, 110]]), "labels": torch.tensor([1, 2])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    labels, _ = net.rpn.assign(anchors, [target, empty], torch.tensor([[128.0, 128.0]] * 2))
    crossing = (anchors.amin(1) < 0) | (anchors.amax(1) > 128)
    assert crossing.any()
    assert (labels[0][crossing] == -1).all()
    assert (labels[1][crossing] == -1).all()
    assert set(labels[0].tolist()) == {-1.0, 0.0, 1.0}
    assert set(labels[1].tolist()) == {-1.0, 0.0}
    iou = box_iou(target["boxes"], anchors)
    for overlaps in iou:
        best = overlaps[~crossing].max()
        assert (labels[0][(overlaps == best) & ~crossing] == 1).all()


def test_proposals_obey_their_limits() -> None:
    boxes = torch.rand(2, 300, 4) * 100
    boxes[..., 2:] += boxes[..., :2] + 1
    scores = torch.randn(2, 300)
    sizes = torch.tensor([[90.0, 120.0], [128.0, 128.0]])
    kept, score = propose(scores, boxes, [200, 100], sizes, before_nms=80, after_nms=60, min_size=16.0)
    assert kept.shape == (2, 60, 4)
    assert (score.diff(dim=1) <= 0).all()
    for box, s, (height, width) in zip(kept, score, sizes.tolist(), strict=True):
        box = box[s >= 0]
        assert (box[:, 2:] - box[:, :2]).min() >= 16
        assert box[:, [0, 2]].max() <= width
        assert box[:, [1, 3]].max() <= height
    assert not kept.requires_grad


def test_no_gradient_flows_through_proposal_coordinates() -> None:
    net = FasterRCNN(**SMALL)
    x = torch.randn(1, 3, 64, 64)
    losses = net.losses(x, [{"boxes": torch.tensor([[5.0, 5, 40, 45]]), "labels": torch.tensor([2])}])
    (losses["loss_classifier"] + losses["loss_box_reg"]).backward()
    assert net.rpn.head.bbox_pred.weight.grad is None
    assert any(p.grad is not None for p in net.backbone.parameters())


def test_condition_modulates_the_rpn_only_when_trained() -> None:
    plain = ConditionedRPNHead(8, 3)
    head = ConditionedRPNHead(8, 3, condition_channels=5)
    head.load_state_dict(plain.state_dict(), strict=False)
    maps, vector = [torch.randn(2, 8, 6, 6)], torch.randn(2, 5)
    for a, b in zip(plain.flat(maps), head.flat(maps, vector), strict=True):
        assert torch.equal(a, b)
    nn.init.normal_(head.film.weight)
    conv = head.conv[0][0](maps[0])
    gamma, beta = head.film(vector)[..., None, None].chunk(2, 1)
    by_hand = head.cls_logits(((1 + gamma) * conv + beta).relu()).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(head.flat(maps, vector)[0], by_hand)
    assert torch.equal(head.flat(maps)[0], plain.flat(maps)[0])
    net = FasterRCNN(**SMALL, condition_channels=5)
    with pytest.raises(ValueError, match=r"\(1, 5\)"):
        net(torch.randn(1, 3, 64, 64), condition=torch.randn(1, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 96},
        {"pyramid": False, "anchor_sizes": [[32.0]], "aspect_ratios": (1.0,)},
        {"stages": 1, "num_classes": 1},
    ],
)
def test_contract(options: dict) -> None:
    net = FasterRCNN(**{**SMALL, **options})
    images = [torch.randn(3, 60, 90), torch.randn(3, 64, 64)]
    targets = [
        {"boxes": torch.tensor([[5.0, 5, 40, 45]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    sum(net.losses(images, targets).values()).backward()
    net.eval()
    assert {k: v.shape for k, v in net(images).items()} == {k: v.shape for k, v in net.train()(images).items()}
    for found, image in zip(net.eval().predict(images, score_threshold=0.0), images, strict=True):
        assert len(found) > 0
        assert (found.scores.diff() <= 0).all()
        assert found.boxes.min() >= 0
        assert found.boxes[:, 2].max() <= image.shape[2] + 1e-3
        assert found.boxes[:, 3].max() <= image.shape[1] + 1e-3


def test_bad_arguments_name_the_value() -> None:
    with pytest.raises(ValueError, match="5 lists"):
        FasterRCNN(backbone="timm/test_efficientnet", anchor_sizes=[[32.0]])
    for name in ("hidden", "rois_per_image"):
        with pytest.raises(ValueError, match=r"hidden and rois_per_image must be >= 1 or None, got .*\b0\b"):
            FasterRCNN(**{**SMALL, name: 0})
    with pytest.raises(ValueError, match=r"region_beta must be >= 0 or None, got -1"):
        FasterRCNN(**SMALL, region_beta=-1)
    with pytest.raises(ValueError, match="3 with stages=1"):
        FasterRCNN(**{**SMALL, "stages": 1})
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)|4, 64"):
        FasterRCNN(**SMALL)(torch.zeros(1, 4, 64, 64))


def test_pooling_is_the_same_in_its_exportable_form(monkeypatch) -> None:
    maps = [torch.randn(2, 4, 64 // 2**k, 64 // 2**k) for k in range(3)]
    corner = torch.rand(20, 2) * 120
    boxes = torch.cat([corner, corner + 5 + torch.rand(20, 2) * 130], 1)
    image = torch.arange(20) % 2
    eager = pool_regions(maps, (4, 8, 16), boxes, image)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(pool_regions(maps, (4, 8, 16), boxes, image), eager)


def grid_boxes(count: int, size: int) -> Tensor:
    """About ``count`` boxes of three sides laid evenly over a square image."""
    per_side = max(round(math.sqrt(count / 3)), 1)
    centre = (torch.arange(per_side) + 0.5) * size / per_side
    middle = torch.cartesian_prod(centre, centre)
    parts = [torch.cat([middle - size * s / 2, middle + size * s / 2], 1) for s in (0.18, 0.25, 0.32)]
    return torch.cat(parts).clamp(0, size)


@pytest.mark.slow
def test_learns_bright_rectangles_and_its_proposals_beat_a_grid(scenes, capsys) -> None:
    """Recall of detections rises; recall at IoU 0.5 and 0.7 against the number of proposals, RPN and even boxes."""
    options = {"num_classes": 1, "channels": 32, "hidden": 64, "before_nms": (300, 200), "after_nms": (100, 100)}
    net = FasterRCNN(**{**SMALL, **options})
    draw = torch.Generator().manual_seed(0)
    images, targets = scenes(48, 64, draw)
    unseen, truth = scenes(32, 64, draw)

    def recall(boxes: list[Tensor], iou: float) -> float:
        hits = [
            (box_iou(t["boxes"], b).amax(1) > iou) if len(b) else torch.zeros(len(t["boxes"]))
            for b, t in zip(boxes, truth, strict=True)
        ]
        return float(torch.cat([h.float() for h in hits]).mean())

    def detected() -> float:
        with torch.no_grad():
            return recall([d.boxes for d in net.eval().predict(torch.stack(unseen), score_threshold=0.5)], 0.5)

    before = detected()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3)
    net.train()
    for step in range(120):
        pick = [(8 * step + i) % 48 for i in range(8)]
        optimiser.zero_grad()
        sum(net.losses(torch.stack([images[i] for i in pick]), [targets[i] for i in pick]).values()).backward()
        optimiser.step()
    after = detected()
    with torch.no_grad():
        raw = net.eval()(torch.stack(unseen))
    table = {}
    for count in (3, 12, 48, 100):
        rpn = [b[:count] for b in raw["proposals"]]
        grid = [grid_boxes(count, 64)] * len(truth)
        table[count] = [round(recall(b, iou), 2) for b in (rpn, grid) for iou in (0.5, 0.7)]
    with capsys.disabled():
        print(f"\nrecall {before:.2f} -> {after:.2f}; proposals: RPN at 0.5 and 0.7, grid at 0.5 and 0.7: {table}")
    assert after > before + 0.4, (before, after)
    for row in table.values():
        assert row[0] > row[2]
        assert row[1] > row[3]


@pytest.mark.slow
def test_one_onnx_file_serves_every_batch_and_size(tmp_path) -> None:
    """The whole detector up to its raw outputs, padding, suppression and pooling included."""
    net = FasterRCNN(**SMALL).eval()
    nn.init.normal_(net.rpn.head.cls_logits.weight, std=0.3)
    write_onnx(net, torch.randn(2, 3, 64, 64), tmp_path / "detector.onnx")
    exported = OnnxModel(tmp_path / "detector.onnx")
    for size in [(2, 3, 64, 64), (3, 3, 70, 100), (5, 3, 128, 96)]:
        x = torch.randn(size)
        with torch.no_grad():
            raw = net(x)
        for (name, expected), got in zip(raw.items(), exported(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=f"{name} at {size}")
