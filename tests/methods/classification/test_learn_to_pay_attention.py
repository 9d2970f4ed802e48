"""Learn to pay attention: a loop reference, the port on copied weights, the score that sees no g."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from torchive.methods.classification.learn_to_pay_attention import (
    AttentionClassifier,
    CompatibilityAttention,
    GridAttention,
    ResNetMaps,
    VGGMaps,
    fgsm,
    foreground,
    pointing_hits,
)
from torchive.methods.explanation.grad_cam import GradCAM

REPOSITORY, COMMIT = "SaoYan/LearnToPayAttention", "61cf5b2baedc4d31a0c69ef9e6453172f48d1785"
TINY = {"widths": [4, 4, 6, 8, 8, 8], "layers": [1, 1, 1, 1, 1, 2]}


def shaken(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def network(**options: object) -> AttentionClassifier:
    return AttentionClassifier(**{"num_classes": 4, "feature_dim": 8, "options": TINY, **options})


def reference(block: CompatibilityAttention | GridAttention, local: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (N, L) and the sum (N, C), number by number."""
    all_weights, sums = [], []
    for image, g in zip(local.flatten(2).mT.tolist(), whole.tolist(), strict=True):
        scores = []
        for column in image:
            if isinstance(block, GridAttention):
                theta, phi, psi = (m.weight.tolist() for m in (block.theta, block.phi, block.psi))
                hidden = [
                    max(
                        sum(a * b for a, b in zip(p, column, strict=True))
                        + sum(a * b for a, b in zip(q, g, strict=True)),
                        0,
                    )
                    for p, q in zip(theta, phi, strict=True)
                ]
                scores.append(sum(a * b for a, b in zip(psi[0], hidden, strict=True)) + block.psi.bias.item())
            elif block.direction is None:
                scores.append(sum(a * b for a, b in zip(column, g, strict=True)))
            else:
                u = block.direction.tolist()
                scores.append(sum(w * (a + b) for w, a, b in zip(u, column, g, strict=True)))
        if block.normalisation == "softmax":
            powers = [math.exp(s) for s in scores]
            weights = [p / sum(powers) for p in powers]
        else:
            weights = [1 / (1 + math.exp(-s)) / len(scores) for s in scores]
        all_weights.append(weights)
        sums.append(
            [sum(w * column[c] for w, column in zip(weights, image, strict=True)) for c in range(len(image[0]))]
        )
    return torch.tensor(all_weights), torch.tensor(sums)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normalisation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("score", ["dp", "pc", "grid"])
def test_equals_the_loop_reference(double, record, score, normalisation, layout):
    block: CompatibilityAttention | GridAttention
    if score == "grid":
        block = GridAttention(6, 5, normalisation=normalisation)
    else:
        block = CompatibilityAttention(6, score=score, normalisation=normalisation)
    shaken(block)
    local = torch.randn(2, 6, 3, 4).contiguous(memory_format=layout)
    whole = torch.randn(2, block.gate_channels)
    weights, sums = reference(block, local, whole)
    difference = (block(local, whole) - sums).abs().max().item()
    assert difference < 1e-13
    assert (block.attention(local, whole).flatten(1) - weights).abs().max() < 1e-13
    assert torch.autograd.gradcheck(block, (local.requires_grad_(), whole.requires_grad_()))
    if (score, normalisation, layout) == ("dp", "softmax", torch.contiguous_format):
        record("learn_to_pay_attention", "referenced", largest_difference=difference, dtype="float64")


def copied_network(draw: torch.Generator) -> AttentionClassifier:
    """VGG-att3 with the weights that the port had: drawn in the order of its parameters."""
    model = AttentionClassifier().eval()
    maps = model.backbone

    def fill(parameter: Tensor, values: Tensor) -> None:
        parameter.data = values.view_as(parameter)

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=draw)
        return values * (2 / values[0].numel()) ** 0.5

    def small(count: int) -> Tensor:
        return 0.1 * torch.randn(count, generator=draw)

    for block in maps.blocks:
        for conv, norm, _ in block:
            fill(conv.weight, drawn(*conv.weight.shape))
            norm.running_mean.copy_(-small(norm.num_features))  # the port's bias, which the norm takes off again
            fill(norm.weight, 1 + small(norm.num_features))
            fill(norm.bias, small(norm.num_features))
    fill(model.whole.weight, drawn(512, 512, 1, 1))
    fill(model.whole.bias, small(512))
    fill(model.projections[0].weight, drawn(512, 256, 1, 1))
    for attention in model.attentions:
        fill(attention.direction, drawn(1, 512, 1, 1))
    fill(model.heads[0].weight, drawn(10, 1536))
    fill(model.heads[0].bias, small(10))
    return model


def test_matches_the_port(double, record, parity):
    """Its linear and grid attention with both normalisations, after a step, too; its whole network: scores and maps."""
    stored = parity("learn_to_pay_attention")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    for case in ("pc.softmax", "pc.sigmoid", "grid.softmax", "grid.sigmoid"):
        given = {k.removeprefix(f"{case}:"): v for k, v in stored.items() if k.startswith(f"{case}:")}
        weight = {k.removeprefix(f"{case}."): v for k, v in stored.items() if k.startswith(f"{case}.")}
        block: nn.Module
        if case.startswith("pc"):
            block = CompatibilityAttention(8, normalisation=case.partition(".")[2])
            block.load_state_dict({"direction": weight["op.weight"].flatten()})
        else:
            block = GridAttention(8, 6, normalisation=case.partition(".")[2])
            names = {"W_l.weight": "theta.weight", "W_g.weight": "phi.weight", "phi.weight": "psi.weight"}
            state = {mine: weight[theirs].flatten(1) for theirs, mine in names.items()}
            block.load_state_dict({**state, "psi.bias": weight["phi.bias"]})
        local, whole = given["l"].clone().requires_grad_(), given["g"].clone().requires_grad_()
        y = block(local, whole)
        y.backward(given["w"])
        found = {"output": [(y, "y"), (block.compatibility(local, whole), "c")]}
        found["gradient"] = [(local.grad, "dl"), (whole.grad, "dg")]
        torch.optim.SGD(block.parameters(), lr=0.1).step()
        found["optimiser_step"] = [(block(local, whole), "next")]
        for key, pairs in found.items():
            worst[key] = max(worst[key], *((a - given[name]).abs().max().item() for a, name in pairs))
    model = copied_network(torch.Generator().manual_seed(7))
    with torch.no_grad():
        scores, maps = model.with_maps(stored["vgg:x"])
    for mine, name in ((scores, "y"), *zip(maps, ("c1", "c2", "c3"), strict=True)):
        worst["output"] = max(worst["output"], (mine - stored[f"vgg:{name}"]).abs().max().item())
    assert max(worst.values()) < 1e-11
    record(
        "learn_to_pay_attention",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=5,
        **worst,
    )


def test_pc_with_a_softmax_does_not_see_the_whole_image(double):
    """<u, l + g> = <u, l> + <u, g>, and the second is one number for all positions: the softmax takes it away."""
    block = shaken(CompatibilityAttention(6, score="pc"))
    local, whole = torch.randn(2, 6, 4, 5), torch.randn(2, 6, requires_grad=True)
    expected = block.attention(local, torch.zeros(2, 6))
    for scale in (1.0, -3.0, 50.0):
        assert (block.attention(local, scale * whole) - expected).abs().max() < 1e-12
    block(local, whole).square().sum().backward()
    assert whole.grad.abs().max() < 1e-14
    for other in (
        CompatibilityAttention(6, score="pc", normalisation="sigmoid"),
        CompatibilityAttention(6, score="dp"),
        GridAttention(6, 6, normalisation="softmax"),
    ):
        change = shaken(other).attention(local, 2 * whole) - other.attention(local, torch.zeros(2, 6))
        assert change.abs().max() > 1e-3


@pytest.mark.parametrize(("score", "learns"), [("pc", False), ("dp", True), ("grid", True)])
def test_what_computes_the_whole_learns_only_from_scores_that_see_it(double, score, learns):
    """In the paper's best network, pc, the last block and the layer that gives g stand idle."""
    model = network(score=score)
    model.losses(torch.randn(4, 3, 32, 32), torch.arange(4))["loss"].backward()
    idle = [*model.whole.parameters(), *model.backbone.blocks[-1].parameters()]
    assert (max(p.grad.abs().max().item() for p in idle) > 1e-6) == learns
    assert model.backbone.blocks[2][0][0].weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("normalisation", ["softmax", "sigmoid"])
def test_equal_scores_give_the_global_mean(double, normalisation):
    block = CompatibilityAttention(6, score="dp", normalisation=normalisation)
    local = torch.randn(2, 6, 4, 5)
    share = 1.0 if normalisation == "softmax" else 0.5
    assert (block(local, torch.zeros(2, 6)) - share * local.mean((2, 3))).abs().max() < 1e-14
    assert (
        CompatibilityAttention(6, score="dp").attention(local, torch.randn(2, 6)).sum((2, 3)) - 1
    ).abs().max() < 1e-14


def test_longer_global_features_make_the_product_sharper(double):
    block = CompatibilityAttention(6, score="dp")
    local, whole = torch.randn(3, 6, 4, 5), torch.randn(3, 6)
    peaks = [block.attention(local, scale * whole).flatten(1).amax(1) for scale in (0.0, 0.5, 1.0, 2.0, 8.0)]
    assert all((b > a).all() for a, b in pairwise(peaks))
    assert (peaks[0] - 1 / 20).abs().max() < 1e-15


@pytest.mark.parametrize("decision", ["concat", "indep", "sum"])
@pytest.mark.parametrize("project", ["local", "global"])
def test_decisions(double, decision, project):
    model = shaken(network(decision=decision, project=project, score="dp")).eval()
    x = torch.randn(3, 3, 20, 24)
    scores, maps = model.with_maps(x)
    assert [tuple(m.shape) for m in maps] == [(3, 1, 20, 24), (3, 1, 10, 12), (3, 1, 5, 6)]
    assert torch.equal(scores, model(x))
    *local, last = model.backbone(x)
    g = last.mean((2, 3)) @ model.whole.weight.T + model.whole.bias
    sums = []
    for features, projection, scored in zip(local, model.projections, maps, strict=True):
        target = g
        if isinstance(projection, nn.Conv2d):
            features = torch.einsum("oc,nchw->nohw", projection.weight[:, :, 0, 0], features)
        elif isinstance(projection, nn.Linear):
            target = g @ projection.weight.T + projection.bias
        c = torch.einsum("nchw,nc->nhw", features, target)
        assert (c - scored[:, 0]).abs().max() < 1e-10
        a = c.flatten(1).softmax(1)
        sums.append(torch.einsum("ncl,nl->nc", features.flatten(2), a))
    assert (model.features(x) - torch.cat(sums, 1)).abs().max() < 1e-10
    layers = [(h.weight, h.bias) for h in model.heads]
    if decision == "concat":
        expected = torch.cat(sums, 1) @ layers[0][0].T + layers[0][1]
        assert (scores - expected).abs().max() < 1e-10
        return
    each = [s @ w.T + b for s, (w, b) in zip(sums, layers, strict=True)]
    if decision == "sum":
        assert (scores - sum(each)).abs().max() < 1e-10
    else:
        mean = sum(e.softmax(1) for e in each) / 3
        assert (scores.exp() - mean).abs().max() < 1e-12
        assert (torch.stack([p.scores for p in model.predict(x)]) - mean).abs().max() < 1e-5


def test_the_papers_network():
    with torch.device("meta"):
        model, plain = AttentionClassifier(), AttentionClassifier(levels=0)
    count = sum(p.numel() for p in model.parameters())
    norms = sum(conv.out_channels for conv in model.backbone.modules() if isinstance(conv, nn.Conv2d))
    assert count + norms == 19_855_434  # the port's count has a bias in front of every norm
    assert [level.stride for level in model.backbone.levels] == [1, 2, 4, 32]
    assert [tuple(p.weight.shape) for p in model.projections if isinstance(p, nn.Conv2d)] == [(512, 256, 1, 1)]
    assert plain.heads[0].in_features == 512
    assert [tuple(m.shape) for m in VGGMaps(**TINY).eval()(torch.zeros(1, 3, 32, 32))][-1] == (1, 8, 1, 1)
    assert [m.shape[-1] for m in VGGMaps(**TINY).eval()(torch.zeros(1, 3, 5, 7))] == [7, 4, 2, 1]


def test_the_papers_residual_network():
    """163 convolutions and the classifier are its 164 layers, 1.7 M parameters; the release's block stands behind."""
    with torch.device("meta"):
        maps = ResNetMaps()
        model = AttentionClassifier("resnet", levels=2, feature_dim=256, project="global", head_norm=True, drop=0.3)
    own = {name: m for name, m in maps.named_modules() if isinstance(m, nn.Conv2d) and not name.startswith("last")}
    assert sum("shortcut" not in name for name in own) == 163
    trunk = sum(p.numel() for name, p in maps.named_parameters() if not name.startswith("last"))
    assert round((trunk + 256 * 10 + 10) / 1e6, 1) == 1.7
    assert [tuple(p.weight.shape) for p in model.projections if isinstance(p, nn.Linear)] == [(128, 256)]
    assert model.heads[0].in_features == 128 + 256
    small = ResNetMaps(11, widths=(8, 8, 16), stem_channels=4).eval()
    for side, sizes in ((32, [32, 16, 8, 1]), (5, [5, 3, 2, 1]), (70, [70, 35, 18, 3])):
        found = small(torch.randn(2, 3, side, side))
        assert [m.shape[2] for m in found] == sizes
        assert [m.shape[1] for m in found] == [level.channels for level in small.levels]
    other = AttentionClassifier("resnet", levels=2, feature_dim=16, options={"depth": 11, "widths": (8, 8, 16)})
    other.losses(torch.randn(4, 3, 32, 32), torch.arange(4))["loss"].backward()
    for text, options in (("12", {"depth": 12}), ("10", {"widths": (8, 10, 16)})):
        with pytest.raises(ValueError, match=text):
            ResNetMaps(**options)


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_levels_head_norm_and_other_backbones(levels):
    model = network(levels=levels, head_norm=True, drop=0.5, score="grid")
    model.losses(torch.randn(4, 3, 32, 32), torch.arange(4))["loss"].backward()
    assert len(model.with_maps(torch.randn(2, 3, 16, 16))[1]) == levels
    other = AttentionClassifier("timm/test_efficientnet", num_classes=3, levels=levels, score="dp", feature_dim=16)
    assert other(torch.randn(2, 3, 64, 96)).shape == (2, 3)


def test_attacks_move_by_eps_against_the_model():
    model = network(score="dp").eval()
    x, targets = torch.rand(4, 3, 16, 16), torch.arange(4)
    moved = fgsm(model, x, targets, 0.03)
    step = (moved - x).abs()
    assert step.max() <= 0.03 + 1e-6
    assert (step > 0.029).float().mean() > 0.9
    loss = nn.functional.cross_entropy
    assert loss(model(moved), targets) > loss(model(x), targets)
    assert all(p.grad is None for p in model.parameters())
    bounded = fgsm(model, x, targets, 0.5, low=0.0, high=1.0)
    assert bounded.min() >= 0
    assert bounded.max() <= 1
    assert torch.equal(fgsm(model, x, targets, 0.0), x)
    with pytest.raises(ValueError, match="-1"):
        fgsm(model, x, targets, -1.0)


def scenes(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, 24, 24) of one of four signs among six scraps of signs, their classes, and the signs' masks."""
    i = torch.arange(7)
    signs = torch.zeros(4, 7, 7)
    signs[0, 3] = signs[0, :, 3] = 1
    signs[1, 0] = signs[1, 6] = signs[1, :, 0] = signs[1, :, 6] = 1
    signs[2, i, i] = signs[2, i, 6 - i] = 1
    signs[3, ::3] = 1
    images, masks = 0.3 * torch.rand(count, 24, 24, generator=draw), torch.zeros(count, 24, 24, dtype=torch.bool)
    classes = torch.randint(4, (count,), generator=draw)
    for image, mask, k in zip(images, masks, classes.tolist(), strict=True):
        for _ in range(6):
            x, y, u, v, other = (int(torch.randint(n, (), generator=draw)) for n in (20, 20, 4, 4, 4))
            image[x : x + 4, y : y + 4] += signs[other, u : u + 4, v : v + 4]
        x, y = (int(torch.randint(17, (), generator=draw)) for _ in range(2))
        image[x : x + 7, y : y + 7] = 0.3 * image[x : x + 7, y : y + 7] + signs[k]
        mask[x : x + 7, y : y + 7] = True
    return images[:, None] - 0.4, classes, masks


@pytest.mark.slow
def test_signs_among_scraps():
    """Accuracy, pointing and attacks: learnt maps, and Grad-CAM on the same network without attention."""
    draw = torch.Generator().manual_seed(0)
    x, classes, _ = scenes(2048, draw)
    seen, truth, masks = scenes(400, draw)
    figures: dict[str, dict[str, float]] = {}
    for name, options in (("plain", {"levels": 0}), ("pc", {"score": "pc"}), ("dp", {"score": "dp"})):
        torch.manual_seed(0)
        narrow = {"widths": [8, 8, 16, 16, 16, 16], "layers": [1, 1, 1, 1, 1, 2]}
        model = AttentionClassifier(num_classes=4, in_channels=1, feature_dim=16, options=narrow, **options)
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=200)
        for _ in range(200):
            rows = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            model.losses(x[rows], classes[rows])["loss"].backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            scores, maps = model.with_maps(seen)
        attacked = model(fgsm(model, seen, truth, 0.1)).argmax(1) == truth
        found = {"accuracy": (scores.argmax(1) == truth).float().mean(), "under_attack": attacked.float().mean()}
        for level, c in enumerate(maps):
            found[f"map_{level + 1}"] = pointing_hits(c, masks).float().mean()
        for block in (2, 3, 4):
            explained = GradCAM(layer=f"backbone.blocks.{block}").explain(model, seen, truth).maps
            found[f"grad_cam_{block - 1}"] = pointing_hits(explained, masks).float().mean()
        figures[name] = {key: round(float(value), 3) for key, value in found.items()}
    assert min(f["accuracy"] for f in figures.values()) > 0.9
    assert max(figures["pc"]["map_1"], figures["pc"]["map_2"]) > 0.4  # the sign covers 8.5 % of an image
    assert min(figures[score]["under_attack"] for score in ("pc", "dp")) > figures["plain"]["under_attack"]


def test_masks_and_pointing():
    scores = torch.zeros(3, 1, 4, 4)
    scores[0, 0, 1, 1] = 5.0
    scores[1, 0, 3, 3] = -2.0
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[:, 2:4, 2:4] = True
    found = foreground(scores, (8, 8))
    assert found[0, 2:4, 2:4].all()
    assert found[0].sum() < 30
    assert found[1, :4, :4].all()
    assert not found[1, 7, 7]
    assert not found[2].any()
    assert pointing_hits(scores, masks).tolist() == [True, False, False]


def test_bad_arguments_are_named():
    for options in ({"score": "sum"}, {"project": "both"}, {"decision": "vote"}, {"levels": 4}, {"drop": 1.0}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            network(**options)
    with pytest.raises(ValueError, match="max"):
        CompatibilityAttention(4, normalisation="max")
    with pytest.raises(ValueError, match="4"):
        CompatibilityAttention(4)(torch.randn(1, 5, 3, 3), torch.randn(1, 4))
    with pytest.raises(ValueError, match="global"):
        GridAttention(4, 6)(torch.randn(1, 4, 3, 3), torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"\(2, 4\), got shape \(3, 4\)"):
        CompatibilityAttention(4)(torch.randn(2, 4, 3, 3), torch.randn(3, 4))
    with pytest.raises(ValueError, match="six"):
        VGGMaps((8, 8))
