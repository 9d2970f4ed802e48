"""Attentional pooling: explicit second-order scores, the authors' head on copied weights, special cases, the pose."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.methods.blocks.attentional_pooling import (
    ActionPoseLoss,
    AttentionalNetwork,
    AttentionalPooling,
    BottomUpPool,
    PoseAttentionalPooling,
    gaussian_heatmaps,
    head_weights,
)

REPOSITORY, COMMIT = "rohitgirdhar/AttentionalPoolingAction", "9ab0acd9360fc9763b27073a7da057f996c01c58"


def shaken(module: nn.Module, std: float = 0.7) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def without_biases(head: AttentionalPooling) -> AttentionalPooling:
    head.bottom_up_bias.data.zero_()
    head.top_down_bias.data.zero_()
    return head


def reference(head: AttentionalPooling, x: Tensor) -> Tensor:
    """Tr(X^T X W_k^T) / L with W_k = sum_p a_kp b_kp^T, number by number; a bias is the weight of a constant one."""
    a = torch.cat([head.top_down, head.top_down_bias[..., None]], 2).tolist()  # P x K x (C + 1)
    b = torch.cat([head.bottom_up.unflatten(0, (head.rank, -1)), head.bottom_up_bias[..., None]], 2).tolist()
    scores = torch.zeros(len(x), head.num_classes)
    for n in range(len(x)):
        rows = [[*column, 1.0] for column in x[n].flatten(1).T.tolist()]  # X, L x (C + 1)
        size = len(rows[0])
        gram = [[sum(row[i] * row[j] for row in rows) for j in range(size)] for i in range(size)]
        for k in range(head.num_classes):
            total = 0.0
            for p in range(head.rank):
                own = b[p][k if head.maps_per_rank > 1 else 0]
                total += sum(gram[i][j] * a[p][k][i] * own[j] for i in range(size) for j in range(size))
            scores[n, k] = total / len(rows)
    return scores


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_equals_explicit_second_order_pooling(double, record, rank, per_class, layout):
    head = shaken(AttentionalPooling(5, 3, rank=rank, per_class=per_class)).eval()
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=layout)
    with torch.no_grad():
        difference = (head(x) - reference(head, x)).abs().max().item()
    assert difference < 1e-13
    if (rank, per_class, layout) == (4, False, torch.contiguous_format):
        record("attentional_pooling", "referenced", largest_difference=difference, dtype="float64")


@pytest.mark.parametrize("rank", [1, 3])
def test_equals_the_trace_without_biases(double, rank):
    """s_k = Tr(X^T X W_k^T) / L for matrices of rank P, by matrix products; and the maps' mean is the score."""
    head = without_biases(shaken(AttentionalPooling(6, 4, rank=rank)).eval())
    x = torch.randn(3, 6, 5, 4)
    rows = x.flatten(2).transpose(1, 2)  # (N, L, C)
    weight = torch.einsum("pki,pj->kij", head.top_down, head.bottom_up)
    trace = torch.einsum("nij,kij->nk", rows.transpose(1, 2) @ rows, weight) / 20
    assert (head(x) - trace).abs().max() < 1e-13
    maps = head.maps(x)
    assert maps.bottom_up.shape == (3, rank, 1, 5, 4)
    assert maps.top_down.shape == (3, rank, 4, 5, 4)
    assert (maps.combined.mean((2, 3)) - trace).abs().max() < 1e-13


def test_full_rank_is_full_second_order_pooling(double):
    """The low-rank form of given matrices: exact at rank C, and ever nearer as the rank grows."""
    weight, x = torch.randn(3, 6, 6), torch.randn(4, 6, 3, 5)
    rows = x.flatten(2).transpose(1, 2)
    full = torch.einsum("nij,kij->nk", rows.transpose(1, 2) @ rows, weight) / 15
    left = []
    for rank in range(1, 7):
        head = AttentionalPooling.from_second_order(weight, rank=rank).eval()
        left.append((head(x) - full).norm().item())
        kept = torch.einsum("pki,pj->kij", head.top_down, head.bottom_up)
        values = torch.linalg.svdvals(weight.flatten(0, 1))
        assert abs((kept - weight).norm() - values[rank:].norm()) < 1e-12
    assert left[-1] < 1e-13
    assert left[0] > 1e-2
    with pytest.raises(ValueError, match="at most 6"):
        AttentionalPooling.from_second_order(weight, rank=7)
    with pytest.raises(ValueError, match="K, C, C"):
        AttentionalPooling.from_second_order(weight[0], rank=1)


def formula(shape: list[int], seed: int, scale: float) -> Tensor:
    """The numbers that the authors' variables and inputs were filled with."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * (1.7 * i + 0.3 * seed + 0.011 * i * i).sin()).reshape(shape)


CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "rank3": {"rank": 3, "chained": True},
    "per_class": {"per_class": True},
    "per_class_rank2": {"per_class": True, "rank": 2, "chained": True},
    "relu": {"attention": "relu"},
    "softmax": {"attention": "softmax"},
    "clip": {},
}


def as_theirs(head: AttentionalPooling, first: int = 4) -> list[tuple[int, Tensor]]:
    """Fill the head as theirs; their variables' numbers with the part of ours that each is."""
    rank, own = head.rank, head.maps_per_rank
    maps = [head.bottom_up] if head.chain is None else [head.bottom_up, *head.chain]
    parts = [part for p in range(rank) for part in (maps[p], head.bottom_up_bias[p])]
    parts += [part for p in range(rank) for part in (head.top_down[p], head.top_down_bias[p])]
    assert own in (1, head.num_classes)
    for i, part in enumerate(parts, first):  # theirs are (1, 1, in, out)
        scale = 0.05 if 768 in part.shape else 0.5
        part.data.copy_(
            formula([*part.shape][::-1], i, scale).T if part.ndim == 2 else formula([*part.shape], i, scale)
        )
    return list(enumerate(parts, first))


def their_gradients(head: AttentionalPooling, first: int = 4) -> list[tuple[int, Tensor]]:
    rank = head.rank
    maps = [head.bottom_up.grad] if head.chain is None else [head.bottom_up.grad, *head.chain.grad]
    parts = [part for p in range(rank) for part in (maps[p], head.bottom_up_bias.grad[p])]
    parts += [part for p in range(rank) for part in (head.top_down.grad[p], head.top_down_bias.grad[p])]
    return list(enumerate(parts, first))


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous()


def test_matches_the_authors_head(double, record, parity):
    """Their head in TensorFlow: scores, maps, the loss's gradients, and the scores after one step, in eight forms."""
    stored = parity("attentional_pooling")
    target = torch.tensor([3, 1])
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0, "loss_in_float32": 0.0}

    def note(key: str, found: Tensor, name: str) -> None:
        worst[key] = max(worst[key], (found.reshape(stored[name].shape) - stored[name]).abs().max().item())

    for case, options in CASES.items():
        head = AttentionalPooling(8, 5, drop=0.0, **options)
        as_theirs(head)
        x = channels_first(formula([2, 3, 4, 5, 8] if case == "clip" else [2, 4, 5, 8], 50, 1.0)).requires_grad_()
        y = head(x)  # a clip's scores are the mean over frames, which is the mean over all positions
        loss = nn.functional.cross_entropy(y, target)
        loss.backward()
        note("output", y, f"{case}:y")
        note("loss_in_float32", loss, f"{case}:loss")  # TensorFlow rounds it, not its gradient
        if case in ("plain", "per_class", "relu", "softmax"):
            maps = head.maps(x)
            note("output", maps.bottom_up[:, 0].movedim(1, -1), f"{case}:h")
            note("output", maps.top_down[:, 0].movedim(1, -1), f"{case}:t")
        note("gradient", x.grad.movedim(1, -1), f"{case}:dx")
        for i, gradient in their_gradients(head):
            note("gradient", gradient.T if gradient.ndim == 2 else gradient, f"{case}:g{i}")
        torch.optim.SGD(head.parameters(), lr=0.5).step()
        note("optimiser_step", head(x), f"{case}:next")

    head = PoseAttentionalPooling(8, 5, drop=0.0)
    for i, layer in enumerate((head.features, head.heatmaps)):
        layer.weight.data = formula([*layer.weight.shape[:2]][::-1], 2 * i, 0.05).T[..., None, None].contiguous()
        layer.bias.data = formula([*layer.bias.shape], 2 * i + 1, 0.05 if i == 0 else 0.5)
    as_theirs(head.pooling)
    x = channels_first(formula([2, 4, 5, 8], 50, 1.0)).requires_grad_()
    known = (torch.arange(32) % 3 != 0).view(2, 16)
    pose = channels_first(formula([2, 4, 5, 16], 90, 1.0)).abs()
    scores, heatmaps = head.both(x)
    # theirs divides the pose loss by the batch once more
    loss = ActionPoseLoss(weight=0.5)(scores, heatmaps, target, pose, known)
    loss.backward()
    note("output", scores, "pose:y")
    note("output", heatmaps.movedim(1, -1), "pose:heatmaps")
    note("loss_in_float32", loss, "pose:loss")
    note("gradient", x.grad.movedim(1, -1), "pose:dx")
    note("gradient", head.heatmaps.bias.grad, "pose:g3")
    for i, gradient in their_gradients(head.pooling)[1:]:
        note("gradient", gradient.T if gradient.ndim == 2 else gradient, f"pose:g{i}")
    torch.optim.SGD(head.parameters(), lr=0.05).step()
    note("optimiser_step", head(x), "pose:next")

    assert worst["loss_in_float32"] < 1e-6
    largest = max(value for key, value in worst.items() if key != "loss_in_float32")
    assert largest < 1e-12
    record(
        "attentional_pooling",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=largest,
        cases=len(CASES) + 1,
        **worst,
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_average_start_is_mean_pooling_and_a_linear_layer(double, rank):
    head = AttentionalPooling(6, 4, rank=rank, start="average").eval()
    nn.init.normal_(head.top_down_bias)
    x = torch.randn(3, 6, 5, 4)
    linear = nn.Linear(6, 4)
    linear.weight.data, linear.bias.data = head.top_down.sum(0), head.top_down_bias.sum(0)
    assert (head(x) - linear(x.mean((2, 3)))).abs().max() < 1e-14


@pytest.mark.parametrize("attention", ["linear", "relu", "softmax"])
@pytest.mark.parametrize("per_class", [False, True])
def test_orderless_and_the_maps_mean(double, attention, per_class):
    head = shaken(AttentionalPooling(6, 4, rank=2, attention=attention, per_class=per_class)).eval()
    x = torch.randn(2, 6, 4, 5)
    scores = head(x)
    moved = x.flatten(2)[:, :, torch.randperm(20)].view(2, 6, 5, 4)
    assert (head(moved) - scores).abs().max() < 1e-13
    maps = head.maps(x)
    assert (maps.combined.mean((2, 3)) - scores).abs().max() < 1e-13
    sums = maps.bottom_up.sum((-2, -1))
    if attention == "softmax":
        assert (sums - 1).abs().max() < 1e-13
    if attention == "relu":
        assert maps.bottom_up.min() == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("attention", ["linear", "relu", "softmax"])
@pytest.mark.parametrize("per_class", [False, True])
def test_the_gradients_own_form_is_autograds(double, attention, per_class, layout):
    """The features given a second time, as the source, take the path without it."""
    head = shaken(AttentionalPooling(6, 4, rank=2, attention=attention, per_class=per_class)).eval()
    x = torch.randn(3, 6, 4, 5).contiguous(memory_format=layout).requires_grad_()
    values = head(x), head(x, x)
    g = torch.randn(3, 4)
    own, plain = (torch.autograd.grad(y, (x, *head.parameters()), g) for y in values)
    assert max((a - b).abs().max() for a, b in zip((values[0], *own), (values[1], *plain), strict=True)) < 1e-13


def test_dropout_is_on_the_top_down_branch_alone():
    head = AttentionalPooling(8, 3, drop=0.5, start="average")
    nn.init.normal_(head.bottom_up)
    x = torch.randn(2, 8, 4, 4)
    assert not torch.equal(head(x), head(x))
    head.eval()
    assert torch.equal(head(x), head(x))
    head.train()
    head.top_down.data.zero_()
    nn.init.normal_(head.top_down_bias)
    expected = head.maps(x).bottom_up.mean((1, 2, 3, 4))[:, None] * head.top_down_bias[0]
    assert torch.allclose(head(x), expected, atol=1e-6)  # the bottom-up map saw all features


@pytest.mark.parametrize("rank", [1, 3])
def test_number_of_weights(rank):
    head = AttentionalPooling(2048, 393, rank=rank)
    found = head_weights(2048, 393, rank=rank)
    assert head.top_down.numel() + head.bottom_up.numel() == found["attentional"] == rank * 2048 * 394
    assert found["average"] == nn.Linear(2048, 393, bias=False).weight.numel()
    assert found["bilinear"] == 2048 * 2048 * 393


def test_clips_are_the_mean_over_frames():
    network = AttentionalNetwork("timm/resnet10t", num_classes=4, options={"rank": 2, "start": "average"}).eval()
    shaken(network.head, 0.1)
    clip = torch.randn(2, 3, 3, 32, 32)
    frames = torch.stack([network(clip[:, :, t]) for t in range(3)], 1)
    assert torch.allclose(network(clip), frames.mean(1), atol=1e-5)
    with pytest.raises(ValueError, match="N, C, H, W"):
        network(torch.randn(3, 32, 32))


def test_pose_network_learns_key_points():
    network = AttentionalNetwork("timm/resnet10t", num_classes=2, keypoints=3, options={"drop": 0.0})
    images, target = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [float("nan"), 0.0]]).expand(2, 3, 2)
    pose = gaussian_heatmaps(points, (1, 1))
    assert pose[:, :2].min() == 1
    assert pose[:, 2].max() == 0
    scores, heatmaps = network.head.both(network.features(images))
    loss = ActionPoseLoss(weight=0.1)(scores, heatmaps, target, pose)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_pose_loss():
    scores, maps, pose = torch.randn(3, 4), torch.randn(3, 2, 5, 6), torch.randn(3, 2, 5, 6)
    known = torch.tensor([[True, False], [True, True], [False, False]])
    each = ActionPoseLoss(weight=2.0, reduction="none")(scores, maps, torch.tensor([0, 1, 2]), pose, known)
    error = (maps - pose).square().mean((2, 3)) / 2
    action = nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2]), reduction="none")
    expected = action + 2 * torch.stack([error[0, 0], error[1].sum(), torch.zeros(())])
    assert torch.allclose(each, expected, atol=1e-6)
    labels = torch.tensor([[1.0, 0, 1, 0]]).expand(3, 4)
    several = ActionPoseLoss(weight=0.0)(scores, maps, labels, pose)
    assert torch.allclose(several, nn.functional.binary_cross_entropy_with_logits(scores, labels))
    empty = ActionPoseLoss()(scores[:0], maps[:0], torch.zeros(0, dtype=torch.int64), pose[:0])
    assert empty == 0
    with pytest.raises(ValueError, match="heat maps"):
        ActionPoseLoss()(scores, maps, torch.tensor([0, 1, 2]), pose[..., :-1])


def test_heat_maps_of_points():
    maps = gaussian_heatmaps(torch.tensor([[[2.0, 1.0], [0.5, 0.0]]]), (3, 4), sigma=0.5)
    assert maps.shape == (1, 2, 3, 4)
    assert maps[0, 0, 1, 2] == 1
    assert maps[0, 0].argmax() == 6
    assert torch.allclose(maps[0, 1, 0, 0], maps[0, 1, 0, 1])
    assert torch.allclose(maps[0, 0, 0, 2], torch.tensor(-2.0).exp())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "efficientnet_lite0", "convnext_atto"])
def test_conversion_starts_as_the_network_was(name):
    network = timm.create_model(name, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = network(x)
        report = convert(network, "attentional_pooling")
        assert [change.new for change in report.changes] == ["BottomUpPool"]
        assert torch.allclose(network(x), before, atol=1e-5)
    report.undo()
    assert not any(isinstance(part, BottomUpPool) for part in network.modules())


def test_pool_and_linear_layer_are_the_head(double):
    """Rank-1 attentional pooling is the weighted pool and a linear layer, but for the bias's weight."""
    head = shaken(AttentionalPooling(6, 4)).eval()
    head.top_down_bias.data.zero_()
    pool, linear = BottomUpPool(6, flatten=True), nn.Linear(6, 4, bias=False)
    pool.weight.data, pool.bias.data = head.bottom_up[0], head.bottom_up_bias[0]
    linear.weight.data = head.top_down[0]
    x = torch.randn(2, 6, 4, 3)
    assert (linear(pool(x)) - head(x)).abs().max() < 1e-14
    assert torch.equal(pool.maps(x), head.maps(x).bottom_up[:, 0])
    soft = BottomUpPool(6, attention="softmax")
    assert soft(x).shape == (2, 6, 1, 1)
    assert (soft(x) - x.mean((2, 3), keepdim=True)).abs().max() < 1e-14  # equal weights are the mean


def test_what_conversion_refuses():
    import torchvision

    with pytest.raises(ConversionError, match="output size of"):
        convert(torchvision.models.vgg11(weights=None, num_classes=2), "attentional_pooling")
    detector = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ConversionError, match="AdaptiveAvgPool2d"):
        convert(detector.backbone, "attentional_pooling", example=torch.zeros(1, 3, 64, 64))
    gated = torchvision.models.mobilenet_v3_small(weights=None, num_classes=2)
    assert [change.name for change in convert(gated, "attentional_pooling").changes] == ["avgpool"]


def test_bad_arguments_are_named():
    for options in ({"rank": 0}, {"attention": "hard"}, {"start": "big"}, {"drop": 1.0}, {"source_channels": 0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            AttentionalPooling(4, 3, **options)
    with pytest.raises(ValueError, match="4,"):
        AttentionalPooling(4, 3)(torch.randn(1, 5, 3, 3))
    with pytest.raises(ValueError, match="hidden"):
        PoseAttentionalPooling(4, 3, hidden=0)
    with pytest.raises(ValueError, match="reduction"):
        ActionPoseLoss(reduction="max")
    with pytest.raises(ValueError, match="hard"):
        BottomUpPool(4, attention="hard")
