"""IoU-balanced losses: a loop reference, the authors' code, what weights do, and torchvision's detectors with them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.ops import box_iou, sigmoid_focal_loss

import torchive.testing
from torchive.methods.detection.faster_rcnn import FasterRCNN
from torchive.methods.detection.ssd import SSD
from torchive.methods.losses.iou_balanced_loss import (
    BalancedRegionLoss,
    IoUBalancedLocalisation,
    IoUBalancedLoss,
    balance_losses,
    balance_weights,
    iou_balanced_classification,
    iou_balanced_localisation,
    matching_weight,
)
from torchive.nn.retinanet import RetinaNet
from torchive.ops.boxes import code_iou, decode_boxes, encode_boxes

REPOSITORY, COMMIT = "ShengkaiWu/IoU-aware-single-stage-object-detector", "67b8955eb59137590dbadc6aac45529ae9459e4a"
K, BACKGROUND = 4, 4
TARGETS = [
    {"boxes": torch.tensor([[8.0, 9, 60, 50], [40, 30, 90, 88]]), "labels": torch.tensor([1, 2])},
    {"boxes": torch.tensor([[30.0, 12, 70, 80]]), "labels": torch.tensor([2])},
]


def slow_focal(x: Tensor, y: Tensor, ious: Tensor, eta: float) -> float:
    """The paper's classification loss, logit by logit."""
    entries, weighted = [], []
    negatives = 0.0
    for row, k, iou in zip(x.tolist(), y.tolist(), ious.tolist(), strict=True):
        for j, z in enumerate(row):
            p = 1 / (1 + math.exp(-z))
            if j == k:
                entries.append(-0.25 * (1 - p) ** 2 * math.log(p))
                weighted.append(iou**eta * entries[-1])
            else:
                negatives -= 0.75 * p**2 * math.log(1 - p)
    scale = sum(entries) / (sum(weighted) + 1e-6) if weighted else 0
    return negatives + scale * sum(weighted)


def slow_boxes(d: Tensor, t: Tensor, ious: Tensor, power: float, beta: float) -> float:
    total = 0.0
    for a, b, iou in zip(d.tolist(), t.tolist(), ious.tolist(), strict=True):
        for x in (abs(u - v) for u, v in zip(a, b, strict=True)):
            total += iou**power * (x * x / 2 / beta if x < beta else x - beta / 2)
    return total


def test_equals_the_loop_reference(double, record) -> None:
    x, y, ious = torch.randn(30, K) * 2, torch.randint(0, K + 1, (30,)), torch.rand(30)
    codes, targets = torch.randn(30, 4), torch.randn(30, 4)
    gaps = []
    for eta in (0.5, 1.0, 1.5, 3.0):
        gaps.append(iou_balanced_classification(x, y, ious, eta=eta).item() / slow_focal(x, y, ious, eta) - 1)
        for beta in (0.11, 1.0):
            found = iou_balanced_localisation(codes, targets, ious, power=eta, beta=beta, loss_weight=2.5, avg_factor=7)
            gaps.append(found.item() * 7 / 2.5 / slow_boxes(codes, targets, ious, eta, beta) - 1)
    largest = max(abs(gap) for gap in gaps)
    assert largest < 1e-12
    record("iou_balanced_loss", "referenced", largest_difference=largest, dtype="float64", what="relative, both losses")


def test_matches_the_authors_code(double, record, parity) -> None:
    """Focal, cross-entropy and box losses with their gradients and a step; the overlaps that they decode."""
    stored = parity("iou_balanced_loss")
    x, ious = stored["x"], stored["ious"]
    labels = stored["labels"].long()  # 0 is background
    classes = torch.where(labels > 0, labels - 1, K)
    count = (labels > 0).sum()
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    cases = {
        f"cls{eta}": ("cls", lambda z, e=eta: iou_balanced_classification(z, classes, ious, eta=e, avg_factor=count))
        for eta in (0.5, 1.0, 1.5)
    }
    cases |= {
        f"soft{eta}": (
            "soft",
            lambda z, e=eta: iou_balanced_classification(
                z, labels, ious, eta=e, variant="softmax", avg_factor=len(labels)
            ),
        )
        for eta in (0.5, 1.0, 1.5)
    }
    positive = labels > 0
    cases |= {
        f"box{power},{beta}": (
            "box",
            lambda d, p=power, b=beta: iou_balanced_localisation(
                d[positive], stored["codes"][positive], ious[positive], power=p, beta=b, avg_factor=count
            ),
        )
        for power, beta in ((0.0, 0.11), (1.5, 0.11), (1.5, 1.0))
    }
    for key, (layer_name, loss) in cases.items():
        layer = nn.Linear(*stored[f"{layer_name}.w"].shape[::-1])
        layer.weight.data, layer.bias.data = stored[f"{layer_name}.w"].clone(), stored[f"{layer_name}.b"].clone()
        value = loss(layer(x))
        value.backward()
        grads = [(layer.weight.grad, stored[f"{key}.gw"]), (layer.bias.grad, stored[f"{key}.gb"])]
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        found = {
            "output": (value - stored[f"{key}.loss"]).abs().item(),
            "gradient": max((a - b).abs().max().item() for a, b in grads),
            "optimiser_step": (loss(layer(x)) - stored[f"{key}.next"]).abs().item(),
        }
        worst = {name: max(worst[name], found[name]) for name in worst}
    overlaps = code_iou(stored["pred"], stored["codes"])
    worst["output"] = max(worst["output"], (overlaps - stored["decoded_ious"]).abs().max().item())
    assert max(worst.values()) < 1e-12
    record(
        "iou_balanced_loss",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        dtype="float64",
        **worst,
    )


def test_the_released_binary_form_takes_row_zero_for_a_positive(double, parity) -> None:
    """Its index of positives, rows and columns, is read as rows: the column number 0 makes row 0 positive.

    The sum cannot show it, since the sum over positives is kept; the gradient does.
    """
    stored = parity("iou_balanced_loss")
    x, ious, positive = stored["x"], stored["ious"], stored["labels"] > 0
    assert not positive[0]
    marked = positive.clone()
    marked[0] = True
    gaps = []
    for taken in (positive, marked):
        weight = stored["bin.w"].clone().requires_grad_()
        logits = (x @ weight.T + stored["bin.b"])[:, 0]
        each = F.binary_cross_entropy_with_logits(logits, positive.double(), reduction="none")
        value = (each * balance_weights(each, taken, ious)).sum() / 40
        value.backward()
        assert (value - stored["bin.loss"]).abs() < 1e-8
        gaps.append((weight.grad - stored["bin.gw"]).abs().max().item())
        if taken is positive:
            loss = IoUBalancedLoss(gamma=0, alpha=None, reduction="none")
            ours = loss(logits[:, None], positive[:, None].double(), ious).sum() / 40
            assert torch.allclose(ours, value)
    assert gaps[0] > 1e-5
    assert gaps[1] < 1e-8  # the release computes this form in float32


def test_powers_of_zero_are_focal_loss_and_smooth_l1() -> None:
    x, y, ious = torch.randn(30, K), torch.randint(0, K + 1, (30,)), torch.rand(30)
    truth = F.one_hot(y, K + 1)[:, :K].float()
    focal = sigmoid_focal_loss(x, truth, reduction="sum")
    for target in (y, truth):
        assert torch.equal(iou_balanced_classification(x, target, ious, eta=0), focal)
        assert torch.equal(iou_balanced_classification(x, target), focal)
    codes, targets = torch.randn(30, 4), torch.randn(30, 4)
    plain = F.smooth_l1_loss(codes, targets, beta=0.11, reduction="sum")
    assert torch.equal(iou_balanced_localisation(codes, targets, ious, power=0), plain)
    assert torch.equal(iou_balanced_classification(x, y.to(torch.uint8), ious, eta=0), focal)
    labels = torch.randint(0, K, (30,))
    ce = F.cross_entropy(x, labels, reduction="sum")
    torch.testing.assert_close(iou_balanced_classification(x, labels, ious, eta=0, variant="softmax"), ce)


@pytest.mark.parametrize("eta", [0.5, 1.5, 4.0])
def test_the_sum_stays_and_weights_are_ratios_of_overlaps(eta: float, double) -> None:
    each, positive, ious = torch.rand(50) + 0.1, torch.rand(50) < 0.4, torch.rand(50)
    w = balance_weights(each, positive, ious, eta=eta)
    assert (each * w)[positive].sum().item() == pytest.approx(each[positive].sum().item(), rel=1e-5)
    assert (w[~positive] == 1).all()
    a, b = torch.nonzero(positive)[:2, 0]
    assert (w[a] / w[b]).item() == pytest.approx((ious[a] / ious[b]).item() ** eta)
    alike = balance_weights(each, positive, torch.full((50,), 0.37), eta=eta)
    assert torch.allclose(alike, torch.ones(50), atol=1e-4)
    nothing = balance_weights(each, positive, torch.zeros(50), eta=eta)
    assert (nothing[positive] == 0).all()
    one = torch.zeros(50, dtype=torch.bool)
    one[3] = True
    assert balance_weights(each, one, ious, eta=eta)[3].item() == pytest.approx(1, abs=1e-2)


def test_weights_have_no_gradient(double) -> None:
    d, t = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
    iou_balanced_localisation(d, t, beta=0.5).backward()
    weight = code_iou(d.detach(), t) ** 1.5
    gap = d.detach() - t
    assert torch.allclose(d.grad, weight[:, None] * torch.where(gap.abs() < 0.5, gap / 0.5, gap.sign()))
    x, ious = torch.randn(9, K, requires_grad=True), torch.rand(9, requires_grad=True)
    y = torch.randint(0, K, (9,))
    iou_balanced_classification(x, y, ious).backward()
    assert ious.grad is None
    plain = sigmoid_focal_loss(x, F.one_hot(y, K).double())
    w = balance_weights(plain.gather(1, y[:, None])[:, 0], torch.ones(9, dtype=torch.bool), ious)
    x.grad, first = None, x.grad
    (plain * torch.ones(9, K).scatter(1, y[:, None], w[:, None])).sum().backward()
    assert torch.allclose(x.grad, first)


def test_overlaps_of_codes_are_those_of_boxes(double) -> None:
    corner = torch.rand(50, 2) * 100
    anchors = torch.cat([corner, corner + 5 + 90 * torch.rand(50, 2)], 1)
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)):
        boxes = anchors + torch.randn(50, 4)
        d = encode_boxes(boxes, anchors, weights) + torch.randn(50, 4) * 0.5
        wanted = box_iou(decode_boxes(d, anchors, weights), boxes).diagonal()
        assert torch.allclose(code_iou(d, encode_boxes(boxes, anchors, weights), weights), wanted, atol=1e-12)


def test_without_positives_the_negatives_alone_count() -> None:
    x, y, ious = torch.randn(20, K, requires_grad=True), torch.full((20,), BACKGROUND), torch.zeros(20)
    value = iou_balanced_classification(x, y, ious, avg_factor=0)
    assert torch.equal(value, sigmoid_focal_loss(x, torch.zeros(20, K), reduction="sum"))
    value.backward()
    assert x.grad.isfinite().all()
    d = torch.zeros(0, 4, requires_grad=True)
    for loss in (IoUBalancedLocalisation(), IoUBalancedLocalisation(reduction="sum")):
        loss(d, torch.zeros(0, 4)).backward()
        assert float(loss.loss_weight) == 0  # nothing was seen yet


def test_the_weight_of_the_boxes_is_found_on_the_first_batch() -> None:
    d, t = torch.randn(64, 4) * 0.3, torch.randn(64, 4) * 0.3
    plain = F.smooth_l1_loss(d, t, beta=0.11, reduction="sum")
    loss = IoUBalancedLocalisation(reduction="sum")
    assert torch.allclose(loss(d, t), plain)
    assert loss.loss_weight == matching_weight(d, t)
    found = loss.loss_weight.clone()
    loss(d * 3, t)
    assert loss.loss_weight == found > 1
    other = IoUBalancedLocalisation(reduction="sum")
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(t, d), loss(t, d))
    fixed = IoUBalancedLocalisation(loss_weight=2.878, reduction="sum")
    torch.testing.assert_close(fixed(d, t) / iou_balanced_localisation(d, t), torch.tensor(2.878))
    assert float(IoUBalancedLocalisation().eval()(d, t)) > 0
    far = IoUBalancedLocalisation()
    far(d + 100, t)
    assert float(far.loss_weight) == 0  # nothing overlaps: the next batch will tell
    far(d, t)
    assert far.loss_weight == found


def test_few_positives_do_not_settle_the_weight() -> None:
    """It follows the sums of the first batches until 64 positives were seen, also after a resumption."""
    d, t = torch.randn(100, 4) * 0.3, torch.randn(100, 4) * 0.3
    loss = IoUBalancedLocalisation(reduction="sum")
    for start, end in ((0, 3), (3, 40), (40, 70), (70, 100)):
        other = IoUBalancedLocalisation(reduction="sum")
        other.load_state_dict(loss.state_dict())
        loss = other
        found = loss(d[start:end], t[start:end])
        expected = matching_weight(d[: min(end, 70)], t[: min(end, 70)])
        torch.testing.assert_close(loss.loss_weight, expected)
        torch.testing.assert_close(found, iou_balanced_localisation(d[start:end], t[start:end], loss_weight=expected))
    assert "found on 70 boxes, at most 10" in repr(loss)
    evaluated = IoUBalancedLocalisation().eval()
    evaluated(d, t)
    assert float(evaluated.loss_weight) == float(evaluated.seen.sum()) == 0


def test_a_weight_is_no_more_than_ten() -> None:
    """One small object of almost no overlap asks for a weight of hundreds, which would last."""
    d, t = torch.tensor([[0.0, 0, 0, 0]]), torch.tensor([[0.97, 0, 0, 0]])
    assert float(matching_weight(d, t)) > 100
    loss = IoUBalancedLocalisation(reduction="sum")
    with pytest.warns(UserWarning, match=r"the first 1 boxes overlap .* so little .* 10 is taken, see loss_weight"):
        found = loss(d, t)
    assert float(loss.loss_weight) == 10
    torch.testing.assert_close(found, 10 * iou_balanced_localisation(d, t))
    loss(torch.randn(80, 4) * 0.1, torch.randn(80, 4) * 0.1)
    assert 1 < float(loss.loss_weight) < 4  # what came after counts as well


def test_the_second_stages_code_is_the_usual_one() -> None:
    """The overlaps of codes in units of 0.1 and 0.2 are not those of plain ones."""
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 0, 2])
    deltas, codes = torch.randn(6, 12), torch.randn(6, 4) * 2
    given = {"reduction": "none", "loss_weight": 1.0}
    own = BalancedRegionLoss(1.5, IoUBalancedLocalisation(**given))(logits, deltas, labels, codes)
    said = IoUBalancedLocalisation(**given, box_weights=(10.0, 10.0, 5.0, 5.0))
    assert own == BalancedRegionLoss(1.5, said)(logits, deltas, labels, codes)
    said = IoUBalancedLocalisation(**given, box_weights=(1.0, 1.0, 1.0, 1.0))
    assert own[1] != BalancedRegionLoss(1.5, said)(logits, deltas, labels, codes)[1]


def test_the_localisation_keeps_the_laws_of_a_loss() -> None:
    torchive.testing.check(
        lambda **options: IoUBalancedLocalisation(loss_weight=2.0, **options),
        kind="loss",
        inputs=[(8, 4)],
        target={"kind": "values", "shape": [8, 4]},
        exempt={
            "gradcheck": "its weight depends on the prediction and has no gradient",
            "learns": "a box that overlaps nothing costs nothing, and costs more once it does",
        },
    )


def small_model(name: str) -> nn.Module:
    options = {"weights": None, "weights_backbone": None, "num_classes": 3}
    if name == "ssd":
        return detection.ssdlite320_mobilenet_v3_large(**options)
    box = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
    sizes = {"min_size": 96, "max_size": 128}
    body = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, returned_layers=[1, 2, 3, 4]
    )
    if name == "retinanet":
        return detection.RetinaNet(body, 3, anchor_generator=box, **sizes)
    return detection.FasterRCNN(body, 3, rpn_anchor_generator=box, **sizes)


def one_pass(model: nn.Module, targets: list) -> dict[str, Tensor]:
    torch.manual_seed(3)
    images = [torch.rand(3, 96, 96)] * len(targets)
    return model.train()(images, [dict(t) for t in targets])


@pytest.mark.parametrize("name", ["retinanet", "ssd", "faster_rcnn"])
def test_in_torchvisions_detectors(name: str) -> None:
    """With powers of zero the losses are torchvision's; names of weights stay; one line, and the loop goes on."""
    theirs = small_model(name)
    if name == "retinanet":
        theirs.head.regression_head._loss_type = "smooth_l1"  # of beta 1
    plain = balance_losses(
        copy.deepcopy(theirs), eta=0, power=0, loss_weight=1, beta=1.0 if name == "retinanet" else None
    )
    targets = TARGETS[:1] * 2  # of equal positives: torchvision's RetinaNet averages image by image
    expected, found = one_pass(theirs, targets), one_pass(plain, targets)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)

    before, untouched = list(theirs.state_dict()), copy.deepcopy(theirs)
    model = balance_losses(theirs)
    assert model is theirs
    assert [k for k in model.state_dict() if not k.endswith(("loss_weight", "seen"))] == before
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.state_dict().keys() == model.state_dict().keys()
    losses = one_pass(model, TARGETS)
    box = next(k for k in losses if k in ("bbox_regression", "loss_box_reg"))
    classes = next(k for k in losses if k in ("classification", "loss_classifier"))
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # the first batch's weight makes the sum the plain one, and the classification's sum never changes
    reference = one_pass(balance_losses(untouched, eta=0, power=0, loss_weight=1), TARGETS)
    torch.testing.assert_close(losses[box], reference[box], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses[classes], reference[classes], rtol=1e-3, atol=1e-6)
    heads = {n: p for n, p in model.named_parameters() if any(part in n for part in ("regression", "bbox_"))}
    moved = torch.autograd.grad(one_pass(model, TARGETS)[classes], list(heads.values()), allow_unused=True)
    assert heads
    assert all(gradient is None for gradient in moved)  # no gradient from the classes into the boxes
    assert isinstance(model.eval()([torch.rand(3, 96, 96)])[0]["boxes"], Tensor)


@pytest.mark.parametrize("name", ["retinanet", "ssd", "faster_rcnn"])
def test_a_second_exchange_is_refused(name: str) -> None:
    model = balance_losses(small_model(name))
    with pytest.raises(ValueError, match=r"already has an? .*Balanced.*build the model anew"):
        balance_losses(model)


def test_another_model_is_refused() -> None:
    with pytest.raises(TypeError, match="expected torchvision's RetinaNet, SSD or FasterRCNN, got Linear"):
        balance_losses(nn.Linear(2, 2))


def test_a_users_own_head_keeps_what_it_overrides() -> None:
    class OwnHead(detection.retinanet.RetinaNetHead):
        pass

    class OwnSSD(detection.ssd.SSD):
        pass

    model = small_model("retinanet")
    model.head.__class__ = OwnHead
    with pytest.raises(TypeError, match="got OwnHead"):
        balance_losses(model)
    with pytest.raises(TypeError, match="got OwnSSD"):
        balance_losses(OwnSSD.__new__(OwnSSD))


def test_in_the_retinanet_of_this_package() -> None:
    """The sum over positives stays, and the box branch learns nothing from the class scores."""
    small = {"backbone": "timm/test_efficientnet", "channels": 8, "num_classes": 2}
    plain = RetinaNet(**small)
    balanced = RetinaNet(
        **small,
        classification_loss=IoUBalancedLoss(reduction="none"),
        localisation_loss=IoUBalancedLocalisation(reduction="none"),
    )
    balanced.load_state_dict(plain.state_dict(), strict=False)
    images = [torch.rand(3, 96, 96), torch.rand(3, 64, 96)]
    plain.eval(), balanced.backbone.eval()
    a, b = plain.losses(images, TARGETS), balanced.losses(images, TARGETS)
    torch.testing.assert_close(a["classification"], b["classification"], rtol=1e-4, atol=0)
    torch.testing.assert_close(a["localisation"], b["localisation"], rtol=1e-4, atol=0)
    assert float(balanced.localisation_loss.loss_weight) > 1
    b["classification"].backward(retain_graph=True)
    assert all(p.grad is None for p in balanced.head.regression_head.parameters())
    b["localisation"].backward()
    assert all(p.grad.isfinite().all() for p in balanced.head.parameters())


@pytest.mark.parametrize("name", ["ssd", "ssd_sigmoid", "faster_rcnn"])
def test_in_the_other_detectors_of_this_package(name: str) -> None:
    """SSD in both classifications, and Faster R-CNN's second stage: sums stay, powers of zero change nothing."""
    weights = (10.0, 10.0, 5.0, 5.0)

    def make(eta: float | None, power: float, w: float | None) -> nn.Module:
        torch.manual_seed(2)
        small = {"backbone": "timm/test_efficientnet", "num_classes": 2}
        if name == "faster_rcnn":
            box = IoUBalancedLocalisation(power=power, beta=1 / 9, loss_weight=w, box_weights=weights, reduction="none")
            own = None if eta is None else BalancedRegionLoss(eta, box)
            return FasterRCNN(**small, channels=8, hidden=16, region_loss=own)
        mode = "sigmoid" if name == "ssd_sigmoid" else "softmax"
        plain = {} if mode == "softmax" else {"gamma": 0, "alpha": None}
        own = (
            {}
            if eta is None
            else {
                "loss": IoUBalancedLoss(eta=eta, variant=mode, reduction="none", **plain),
                "localisation_loss": IoUBalancedLocalisation(power=power, beta=1.0, loss_weight=w, reduction="none"),
            }
        )
        return SSD(**small, image_size=96, classification=mode, **own)

    def losses(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return model.losses([torch.rand(3, 96, 96)] * 2, TARGETS)

    models = [make(*a) for a in ((None, 0, 1), (0.0, 0.0, 1.0), (1.5, 1.5, None))]
    published, zero, balanced = (losses(model) for model in models)
    for key, value in published.items():
        torch.testing.assert_close(zero[key], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(balanced[key], value, rtol=1e-3, atol=1e-6)
    gradients = []
    for model, found in zip(models, (published, zero, balanced), strict=True):
        sum(found.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-2, atol=1e-4)


def test_bad_arguments_are_named() -> None:
    for options, words in (
        ({"variant": "tanh"}, "tanh"),
        ({"reduction": "max"}, "max"),
        ({"eta": -1}, "got -1"),
        ({"alpha": 2}, "2.0 and 2"),
    ):
        with pytest.raises(ValueError, match=words):
            IoUBalancedLoss(**options)
    for options, words in (({"power": -1}, "got -1"), ({"loss_weight": 0}, "and 0"), ({"reduction": "max"}, "max")):
        with pytest.raises(ValueError, match=words):
            IoUBalancedLocalisation(**options)
    x, y = torch.randn(4, K), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected 4 overlaps, got shape \(3,\)"):
        iou_balanced_classification(x, y, torch.rand(3))
    with pytest.raises(ValueError, match=r"R truths, got \(4, 4\) and \(3,\)"):
        iou_balanced_classification(x, y[:3], torch.rand(4))
    with pytest.raises(ValueError, match=r"truths \(4, 4\), got \(4, 5\)"):
        iou_balanced_classification(x, torch.zeros(4, 5), torch.rand(4))
    with pytest.raises(TypeError, match=r"integer classes, got torch\.float32"):
        iou_balanced_classification(x, torch.zeros(4), torch.rand(4))
    with pytest.raises(TypeError, match=r"floating logits, got torch\.int64"):
        iou_balanced_classification(x.long(), y, torch.rand(4))
    with pytest.raises(ValueError, match=r"\(P, 4\), got \(4, 3\) and \(4, 4\)"):
        iou_balanced_localisation(x[:, :3], x)
    with pytest.raises(ValueError, match=r"expected 4 overlaps, got shape \(2,\)"):
        iou_balanced_localisation(x, x, torch.rand(2))
    with pytest.raises(TypeError, match=r"floating deltas, got torch\.int64"):
        iou_balanced_localisation(x.long(), x)
