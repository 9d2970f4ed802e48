"""Equalization loss: a loop reference, the authors' detector loss, who pushes whom, thresholds and image counts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection

from torchive.engine.detector_file import DetectorWithDecoding
from torchive.methods.detection.faster_rcnn import FasterRCNN
from torchive.methods.losses.eql import (
    PRESETS,
    EqualizationLoss,
    detection_scores,
    equalize,
    image_counts,
    tail_ratio,
    tail_threshold,
)
from torchive.methods.losses.focal_loss import FocalLoss
from torchive.methods.losses.iou_balanced_loss import balance_losses
from torchive.methods.training.decoupling import Decoupling, shot_accuracy
from torchive.nn.prior import init_classifier
from torchive.nn.sigmoid_classes import SigmoidRegionLoss
from torchive.structures import Batch

COUNTS = [500, 300, 150, 40, 8, 2]  # of 1,000: the last three hold 5 %
K, BACKGROUND = 6, 6
REPOSITORY, COMMIT = "tztztztztz/eql.detectron2", "29224acf4ea549c53264e6229da69868bd5470f3"


def sigmoid_by_loops(x: Tensor, y: Tensor, threshold: float) -> list[float]:
    values = []
    for row, k in zip(x.tolist(), y.tolist(), strict=True):
        total = 0.0
        for j, z in enumerate(row):
            p = 1 / (1 + math.exp(-z))
            own = j == k
            rare = COUNTS[j] / sum(COUNTS) < threshold
            w = 1 - (k != BACKGROUND) * rare * (not own)
            total -= w * math.log(p if own else 1 - p)
        values.append(total)
    return values


@pytest.mark.parametrize("threshold", [0.0, 0.005, 0.1, 1.0])
def test_sigmoid_form_equals_the_loop_reference(double, record, threshold):
    x, y = torch.randn(20, K) * 2, torch.randint(0, K + 1, (20,))
    y[:3] = BACKGROUND
    values = sigmoid_by_loops(x, y, threshold)
    loss = EqualizationLoss(class_counts=COUNTS, threshold=threshold, reduction="none").double()
    largest = (loss(x, y) - torch.tensor(values)).abs().max().item()
    assert largest < 1e-12
    truth = F.one_hot(y, K + 1)[:, :K]
    assert torch.equal(loss(x, truth.double()), loss(x, y))
    for reduction, expected in (("sum", sum(values)), ("mean", sum(values) / 20)):
        loss.reduction = reduction
        assert math.isclose(loss(x, y).item(), expected, rel_tol=1e-12)
    if threshold == 0.1:
        record("eql", "referenced", largest_difference=largest, dtype="float64")


def test_softmax_form_equals_the_loop_reference_on_the_same_draws(double):
    x, y = torch.randn(200, K) * 2, torch.randint(0, K, (200,))
    loss = EqualizationLoss(class_counts=COUNTS, variant="softmax", threshold=0.1, gamma=0.7, reduction="none")
    torch.manual_seed(4)
    each = loss(x, y)
    torch.manual_seed(4)
    drawn = (torch.rand(200, K) < 0.7).tolist()
    for n, (row, k) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        below = sum(math.exp(z) * (1 - drawn[n][j] * (COUNTS[j] / 1000 < 0.1) * (j != k)) for j, z in enumerate(row))
        assert math.isclose(each[n].item(), math.log(below) - row[k], rel_tol=1e-9, abs_tol=1e-12)


def test_without_a_tail_or_a_chance_it_is_the_plain_loss(double):
    x, y = torch.randn(9, K), torch.randint(0, K, (9,))
    plain = F.binary_cross_entropy_with_logits(x, F.one_hot(y, K).double(), reduction="sum") / 9
    assert torch.allclose(EqualizationLoss(class_counts=COUNTS, threshold=0)(x, y), plain, atol=1e-15)
    for options in ({"threshold": 0.0}, {"threshold": 1.0, "gamma": 0.0}):
        loss = EqualizationLoss(class_counts=COUNTS, variant="softmax", **options)
        assert torch.allclose(loss(x, y), F.cross_entropy(x, y), atol=1e-15)
    evaluated = EqualizationLoss(class_counts=COUNTS, variant="softmax", threshold=1.0).eval()
    assert torch.allclose(evaluated(x, y), F.cross_entropy(x, y), atol=1e-15)
    equal = EqualizationLoss(class_counts=[7] * K, variant="softmax")
    assert not equal.rare.any()


def test_only_background_and_nobody_else_pushes_a_rare_class_down(double):
    loss = EqualizationLoss(class_counts=COUNTS, threshold=0.01, reduction="sum")  # classes 4 and 5 are rare
    x = torch.randn(3, K, requires_grad=True)
    loss(x, torch.tensor([0, BACKGROUND, 4])).backward()
    p = x.detach().sigmoid()
    assert (x.grad[0, 4:] == 0).all()  # an object of another class
    assert torch.allclose(x.grad[0, :4], p[0, :4] - torch.tensor([1.0, 0, 0, 0]))  # frequent classes compete as ever
    assert torch.allclose(x.grad[1], p[1])  # background
    assert torch.allclose(x.grad[2, 4], p[2, 4] - 1)  # its own
    assert x.grad[2, 5] == 0


def test_softmax_gradients(double):
    """The weighted probabilities sum to one, the truth has p - 1, and what is ignored has nothing."""
    loss = EqualizationLoss(class_counts=COUNTS, variant="softmax", threshold=0.01, gamma=1.0, reduction="none")
    x, y = torch.randn(4, K, requires_grad=True), torch.tensor([0, 1, 4, 3])
    each = loss(x, y)
    each.sum().backward()
    p_y = torch.exp(-each.detach())
    assert torch.allclose(x.grad.gather(1, y[:, None])[:, 0], p_y - 1)
    assert (x.grad[[0, 1, 3], 4:] == 0).all()
    assert x.grad[2, 5] == 0
    assert torch.allclose(x.grad.sum(1), torch.zeros(4))  # the others' shares make up for 1 - p_y


def test_draws_are_of_the_given_chance_and_new_for_each_sample_and_class():
    loss = EqualizationLoss(class_counts=[10, 1, 1], variant="softmax", threshold=0.5, gamma=0.75, reduction="none")
    x, y = torch.zeros(20000, 3), torch.zeros(20000, dtype=torch.long)
    competing = torch.exp(loss(x, y)) - 1  # how many of the two rare classes take part
    shares = [float((competing.round() == n).float().mean()) for n in range(3)]
    assert shares == pytest.approx([0.75**2, 2 * 0.75 * 0.25, 0.25**2], abs=0.012)


def test_matches_the_authors_code(double, record, parity):
    """Loss, gradients of the classifier, the loss after one step, and the scores with their dummy background."""
    stored = parity("eql")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for threshold in (0.0, 0.01, 0.05):
        given = {k.removeprefix(f"{threshold}."): v for k, v in stored.items() if k.startswith(f"{threshold}.")}
        loss = EqualizationLoss(class_counts=stored["counts"].tolist(), threshold=threshold, total=3000)
        layer = nn.Linear(7, 12)
        layer.weight.data, layer.bias.data = given["w"], given["b"]
        first = loss(layer(stored["x"]), stored["y"])
        first.backward()
        scores = detection_scores(layer(stored["x"])).detach()
        gradients = [(layer.weight.grad - given["gw"]).abs().max(), (layer.bias.grad - given["gb"]).abs().max()]
        torch.optim.SGD(layer.parameters(), lr=0.01).step()
        following = loss(layer(stored["x"]), stored["y"])
        found = {
            "output": max((first - given["loss"]).abs().item(), (scores - given["probs"]).abs().max().item()),
            "gradient": max(gradients).item(),
            "optimiser_step": (following - given["next"]).abs().item(),
        }
        worst = {key: max(worst[key], found[key]) for key in worst}
    assert len({float(stored[f"{threshold}.loss"]) for threshold in (0.0, 0.01, 0.05)}) == 3
    assert max(worst.values()) < 1e-6
    record("eql", "matched", repository=REPOSITORY, commit=COMMIT, largest_difference=max(worst.values()), **worst)


def test_the_classifier_starts_as_the_release(parity):
    layer = nn.Linear(7, 12)
    init_classifier(layer, prior=0.001)
    assert torch.allclose(layer.bias.double(), parity("eql")["0.0.b"] - 6)  # recorded with 6 added
    assert 0.005 < layer.weight.std() < 0.015


def test_the_threshold_keeps_the_tail_ratio():
    assert tail_ratio(COUNTS, 0.1) == pytest.approx(0.05)
    assert tail_ratio(COUNTS, 0.0) == 0
    assert tail_ratio(COUNTS, 1.1) == 1
    assert tail_threshold(COUNTS) == pytest.approx(0.15)  # the next would make a fifth of all rare
    assert tail_threshold(COUNTS, 0.01) == pytest.approx(0.04)
    assert tail_threshold([7] * 5) == pytest.approx(1 / 5)
    loss = EqualizationLoss(class_counts=COUNTS)
    assert loss.rare.tolist() == [False, False, False, True, True, True]
    assert torch.allclose(loss.frequency, torch.tensor(COUNTS) / 1000)
    assert EqualizationLoss(class_counts=COUNTS, threshold=0.1, total=100_000).rare.all()


def test_the_threshold_of_lvis_is_a_share_of_the_images():
    """Of 57,000 images those classes are rare that at most 100 hold; the counts' sum is nine times as many."""
    counts = [50_000] * 10 + [2000, 300, 101, 100, 8]
    rare = [False] * 13 + [True] * 2
    for loss in (
        EqualizationLoss.preset("lvis", counts, total=57_000),
        EqualizationLoss.preset("lvis", (counts, 57_000)),
    ):
        assert loss.rare.tolist() == rare
        assert loss.threshold == PRESETS["lvis"]["threshold"]
        assert float(loss.frequency[12]) == pytest.approx(101 / 57_000)
    assert EqualizationLoss.preset("cifar100-lt", [500, 1]).rare.tolist() == [False, True]
    options = {"weights": None, "weights_backbone": None, "num_classes": 16}
    make = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = equalize(make(**options), (counts, 57_000), threshold=1.77e-3)
    assert model.roi_heads.region_loss.loss.rare.tolist() == rare
    with pytest.raises(ValueError, match=r"a threshold of 0.00177 is a share of the images: expected their number"):
        equalize(make(**options), counts, threshold=1.77e-3)


@pytest.mark.parametrize("variant", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_classes_of_any_integers(variant: str, kind: torch.dtype):
    loss = EqualizationLoss(class_counts=COUNTS, variant=variant, gamma=1.0)
    x, y = torch.randn(9, K), torch.arange(9) % K
    assert torch.equal(loss(x, y.to(kind)), loss(x, y))


def test_images_are_counted_not_instances(tmp_path):
    content = {
        "images": [{"id": i} for i in (1, 2, 3, 4)],
        "categories": [{"id": 7}, {"id": 3}, {"id": 9}],
        "annotations": [
            {"image_id": image, "category_id": category}
            for image, category in ((1, 7), (1, 7), (1, 7), (2, 7), (2, 3), (3, 3), (3, 3))
        ],
    }
    assert image_counts(content) == ([2, 2, 0], 4)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    assert image_counts(path) == ([2, 2, 0], 4)
    with pytest.raises(ValueError, match="there is no categories"):
        image_counts({"images": [], "annotations": []})


def test_in_torchvisions_detectors() -> None:
    """One line for Faster and Mask R-CNN; a rare class is pushed down by background alone, all else stays."""
    options = {"weights": None, "weights_backbone": None, "num_classes": 4, "min_size": 64, "max_size": 96}
    counts = [500, 300, 4]
    target = {
        "boxes": torch.tensor([[4.0, 5, 50, 40], [20, 10, 60, 60]]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 64, 64, dtype=torch.uint8),
    }
    for make in (detection.fasterrcnn_mobilenet_v3_large_320_fpn, detection.maskrcnn_resnet50_fpn):
        model = make(**options)
        kept = {k: v.clone() for k, v in model.state_dict().items() if "box_predictor" not in k}
        assert equalize(model, counts) is model
        now = model.state_dict()
        assert all(torch.equal(now[k], v) for k, v in kept.items())
        assert now["roi_heads.box_predictor.cls_score.weight"].shape[0] == 3
        names = set(model.train()([torch.rand(3, 64, 64)], [target]))
        assert names >= {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        assert ("loss_mask" in names) == ("mask" in make.__name__)
    # of regions of objects only the rare class's column has no gradient, of background it has
    model = equalize(detection.fasterrcnn_mobilenet_v3_large_320_fpn(**options), counts)
    layer = model.roi_heads.box_predictor.cls_score
    loss = model.roi_heads.region_loss
    for labels, learns in ((torch.tensor([1, 2, 1, 2]), False), (torch.tensor([0, 1, 0, 2]), True)):
        logits = F.pad(layer(torch.randn(4, 1024)), (1, 0))
        gradient = torch.autograd.grad(loss(logits, torch.zeros(4, 16), labels, torch.zeros(4, 4))[0], layer.bias)[0]
        assert bool(gradient[2] != 0) == learns
        assert bool((gradient[:2] != 0).all())
    found = model.eval()([torch.rand(3, 64, 64)])[0]
    assert len(found["scores"]) <= 300
    assert model.roi_heads.score_thresh == 1e-4
    with pytest.raises(ValueError, match="expected 3 class counts, without the background, got 4"):
        equalize(detection.fasterrcnn_mobilenet_v3_large_320_fpn(**options), [*counts, 1])
    with pytest.raises(TypeError, match="got RetinaNet"):
        equalize(detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None), counts)


def test_a_second_exchange_is_refused() -> None:
    """Either loss would silently undo the other: sigmoids under a softmax's loss, or no balanced loss."""
    options = {"weights": None, "weights_backbone": None, "num_classes": 3}
    make = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = equalize(make(**options), [5, 1])
    with pytest.raises(ValueError, match=r"already has a SigmoidRegionLoss.*build the model anew"):
        balance_losses(model)
    with pytest.raises(TypeError, match="FastRCNNPredictor in the second stage, got SigmoidPredictor"):
        equalize(model, [5, 1])
    assert isinstance(model.roi_heads.region_loss, SigmoidRegionLoss)
    model = balance_losses(make(**options))
    predictor = model.roi_heads.box_predictor
    with pytest.raises(ValueError, match=r"already has a BalancedRegionLoss.*build the model anew"):
        equalize(model, [5, 1])
    assert model.roi_heads.box_predictor is predictor


def test_in_the_faster_rcnn_of_this_package() -> None:
    """The loss of its second stage is the authors' formula on its sampled regions."""
    loss = SigmoidRegionLoss(EqualizationLoss(class_counts=[9, 9, 1], tail_share=0.1, reduction="none"))
    net = FasterRCNN(
        backbone="timm/test_efficientnet",
        channels=8,
        hidden=16,
        num_classes=3,
        classification="sigmoid",
        region_loss=loss,
    )
    seen: list[Tensor] = []
    loss.register_forward_pre_hook(lambda _module, given: seen.extend(given))
    target = {"boxes": torch.tensor([[4.0, 5, 50, 40], [20, 10, 60, 60]]), "labels": torch.tensor([1, 3])}
    found = net.losses([torch.rand(3, 64, 64)], [target])["loss_classifier"]
    logits, labels = seen[0].detach(), seen[2]
    total = 0.0
    for row, k in zip(logits.tolist(), labels.tolist(), strict=True):
        for j in (1, 2, 3):
            p = 1 / (1 + math.exp(-row[j]))
            if j == 3 and k in (1, 2):
                continue
            total -= math.log(p if j == k else 1 - p)
    assert set(labels.tolist()) >= {0, 1, 3}
    assert float(found) == pytest.approx(total / len(labels), rel=1e-5)


def test_scores_of_rare_classes_are_not_dropped() -> None:
    """Sigmoids start at 0.001, so the detector keeps 300 detections above 1e-4, as the release does."""
    options = {"backbone": "timm/test_efficientnet", "channels": 8, "hidden": 16, "num_classes": 7}
    nets = {kind: FasterRCNN(**options, classification=kind).eval() for kind in ("sigmoid", "softmax")}
    assert nets["sigmoid"].thresholds == {"score_threshold": 1e-4, "nms_threshold": 0.5, "max_detections": 300}
    assert nets["softmax"].thresholds == {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100}
    images = [torch.rand(3, 96, 96)]
    with torch.no_grad():
        (found,) = nets["sigmoid"].predict(images)
        (stated,) = nets["sigmoid"].predict(images, score_threshold=0.05, max_detections=5)
        written = DetectorWithDecoding(nets["sigmoid"])(images[0][None])
    assert 100 < len(found) <= 300
    assert float(found.scores.min()) < 0.01
    assert len(stated) == 0
    assert written["scores"].shape[1] == 300


@pytest.mark.parametrize("variant", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extremes_stay_finite(variant, dtype):
    x = (torch.randn(30, K) * 1e4).to(dtype).requires_grad_()
    value = EqualizationLoss(class_counts=COUNTS, variant=variant, threshold=1.0, gamma=1.0)(x, torch.arange(30) % K)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(x.grad).all()


def test_bad_arguments_are_named():
    for options, found in (
        ({"variant": "tanh"}, "tanh"),
        ({"reduction": "max"}, "max"),
        ({"gamma": 2}, "got 2"),
        ({"class_counts": []}, r"\[\]"),
        ({"class_counts": [1, -4]}, "-4"),
    ):
        with pytest.raises(ValueError, match=found):
            EqualizationLoss(**{"class_counts": COUNTS, **options})
    with pytest.raises(ValueError, match="voc"):
        EqualizationLoss.preset("voc", COUNTS)
    with pytest.raises(ValueError, match="threshold of lvis is a share of the images: expected their number, total"):
        EqualizationLoss.preset("lvis", COUNTS)
    loss = EqualizationLoss(class_counts=COUNTS)
    with pytest.raises(ValueError, match=r"\(N, 6\) and N truths, got \(4, 5\)"):
        loss(torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(4, 6\), got \(4, 5\)"):
        loss(torch.randn(4, 6), torch.zeros(4, 5))
    with pytest.raises(TypeError, match=r"torch\.float32"):
        EqualizationLoss(class_counts=COUNTS, variant="softmax")(torch.randn(4, 6), torch.zeros(4))


@pytest.mark.slow
def test_long_tailed_digits_the_rare_classes_gain():
    """Imbalance 100 on small digits, five seeds: many, medium and few, against cross-entropy and focal loss.

    Both losses also as the first stage of a classifier that is trained again on balanced draws.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    counts = [max(round(120 * 100 ** (-k / 9)), 1) for k in range(10)]
    losses = {
        "cross-entropy": nn.CrossEntropyLoss,
        "focal": lambda: FocalLoss(variant="softmax"),
        "softmax form": lambda: EqualizationLoss(class_counts=counts, variant="softmax"),
    }
    runs = [(name, head) for name in losses for head in ("joint", "crt") if (name, head) != ("focal", "crt")]
    mean: dict[tuple[str, str], dict[str, float]] = {run: {} for run in runs}
    for seed in range(5):
        torch.manual_seed(seed)
        rows = [torch.nonzero(y == k)[:, 0][torch.randperm(int((y == k).sum()))] for k in range(10)]
        train = torch.cat([r[:n] for r, n in zip(rows, counts, strict=True)])
        test = torch.cat([r[120:] for r in rows])
        for name, head in runs:
            torch.manual_seed(seed)
            body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
            method = Decoupling(body, num_classes=10, head=head, first_share=0.8, feature_dim=32, loss=losses[name]())
            optimiser = torch.optim.Adam(method.parameters(), lr=3e-3)
            for step in range(1000):
                method.train().before_step(step / 1000)
                if method.sampling(step / 1000) == 1:
                    chosen = train[torch.randint(0, len(train), (64,))]
                else:
                    draws = torch.randint(0, 10, (64,))
                    chosen = torch.stack([rows[k][torch.randint(0, counts[k], ())] for k in draws])
                optimiser.zero_grad(set_to_none=True)
                method.losses(Batch(x[chosen], y[chosen], ("",) * 64))["loss"].backward()
                optimiser.step()
            with torch.no_grad():
                found = shot_accuracy(method.eval()(x[test]).argmax(1), y[test], counts, many=40)
            for part, value in found.items():
                mean[name, head][part] = mean[name, head].get(part, 0) + value / 5
    for run, found in mean.items():
        print(*run, {part: round(value, 3) for part, value in found.items()})
    few = {run: found["few"] for run, found in mean.items()}
    assert few["softmax form", "joint"] > few["cross-entropy", "joint"]
    assert few["softmax form", "crt"] > few["cross-entropy", "joint"]
