"""Grad-CAM: the paper's formula, CAM as a special case, other libraries, and networks left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from captum.attr import GuidedBackprop, LayerGradCam
from torch import Tensor, nn

from torchive.methods.explanation.grad_cam import (
    GradCAM,
    TokenGrid,
    boxes_from_maps,
    cam_from_fc,
    faithfulness,
    guided_backpropagation,
    last_spatial_layer,
    localised,
    min_max,
    overlay,
    pointing_game,
    randomisation_check,
)
from torchive.methods.explanation.grad_cam.maps import VARIANTS, class_maps
from torchive.testing.models import SmallNetwork


def flat_network() -> nn.Sequential:
    """A network whose score is no mean over positions: two convolutions and two linear layers, for 12 x 14 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 6 * 7, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def reference(a: Tensor, g: Tensor, variant: str) -> Tensor:
    """The formulas of the four papers, position by position."""
    n, k, h, w = a.shape
    maps = a.new_zeros(n, h, w)
    for s in range(n):
        for c in range(k):
            total = sum(float(v) for v in a[s, c].flatten())
            mean = sum(float(v) for v in g[s, c].flatten()) / (h * w)
            plus = 0.0
            for i in range(h):
                for j in range(w):
                    slope = float(g[s, c, i, j])
                    below = 2 * slope**2 + total * slope**3
                    plus += (slope**2 / below if below else 0.0) * max(slope, 0.0)
            for i in range(h):
                for j in range(w):
                    slope, value = float(g[s, c, i, j]), float(a[s, c, i, j])
                    maps[s, i, j] += {
                        "grad_cam": mean * value,
                        "grad_cam++": plus * value,
                        "hires_cam": slope * value,
                        "layer_cam": max(slope, 0.0) * value,
                    }[variant]
    return maps.clamp(min=0)[:, None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loops_of_the_formulas(variant: str) -> None:
    activations = torch.rand(2, 5, 3, 4, dtype=torch.float64)
    gradients = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    gap = (class_maps(activations, gradients, variant) - reference(activations, gradients, variant)).abs().max()
    assert gap < 1e-14


def test_whole_call_equals_gradients_by_finite_differences(record: Callable[..., None]) -> None:
    """The gradient at the layer is measured by moving each activation, so nothing of autograd is trusted."""
    net = flat_network().double()
    x, target, step = torch.rand(2, 3, 12, 14, dtype=torch.float64), torch.tensor([1, 3]), 1e-6
    with torch.no_grad():
        a = net[:5](x)
        g = torch.zeros_like(a)
        flat = torch.eye(a[0].numel(), dtype=torch.float64).view(-1, *a.shape[1:]) * step
        for s in range(2):
            up, down = net[5:](a[s] + flat), net[5:](a[s] - flat)
            g[s] = ((up - down)[:, target[s]] / (2 * step)).view_as(a[s])
    largest = 0.0
    for variant in VARIANTS:
        found = GradCAM("4", variant=variant).explain(net, x, target).raw
        largest = max(largest, float((found - reference(a, g, variant)).abs().max()))
    assert largest < 1e-7
    record("grad_cam", "referenced", largest_difference=largest, variants=list(VARIANTS))


def test_on_a_mean_and_a_linear_layer_it_is_cam_exactly() -> None:
    """The notes' claim: the weight of the linear layer equals the gradient that the map receives, over Z."""
    net = SmallNetwork().double().eval()
    x, target = torch.rand(3, 3, 16, 20, dtype=torch.float64), torch.tensor([0, 3, 1])
    features = net.body(x)
    cam = cam_from_fc(features, net.head.weight, target)
    by_hand = torch.einsum("nkhw,nk->nhw", features, net.head.weight[target]).clamp(min=0)[:, None] / (8 * 10)
    found = GradCAM("body").explain(net, x, target)
    torch.testing.assert_close(found.raw, cam, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(cam, by_hand, rtol=1e-12, atol=1e-16)
    assert (cam > 0).any()
    torch.testing.assert_close(GradCAM("body").explain(net, x, 2).raw, cam_from_fc(features, net.head.weight, 2))


def test_the_gradient_is_predictable_on_a_mean_and_a_linear_layer_only() -> None:
    """The notes' question: a constant predicts dy/dA without error there, and leaves an error behind a deep head."""

    def spread(head: nn.Module) -> float:
        a = torch.rand(32, 8, 6, 7, requires_grad=True)
        (g,) = torch.autograd.grad(head(a)[:, 1].sum(), a)
        return float((g - g[:1]).norm() / g.norm())

    assert spread(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))) == 0
    assert spread(flat_network()[5:]) > 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_pytorch_grad_cam(variant: str, parity: Callable[[str], dict[str, Tensor]]) -> None:
    """Numbers of package grad-cam 1.5.7; its Grad-CAM++ has a constant 1e-6 in a denominator of about one."""
    saved = parity("grad_cam")
    net = _saved_network(saved)
    found = GradCAM("4", variant=variant).explain(net, saved["input"], saved["classes"])
    raw = saved[f"raw.{variant}"][:, None]
    close = 1e-4 if variant == "grad_cam++" else 1e-12
    torch.testing.assert_close(found.raw, raw, rtol=close, atol=close * float(raw.max()))
    display = min_max(F.interpolate(min_max(found.raw), size=(12, 14), mode="bilinear"))
    torch.testing.assert_close(display[:, 0].float(), saved[f"final.{variant}"], rtol=0, atol=2e-4)
    torch.testing.assert_close(found.display, display, rtol=0, atol=1e-12)


def _saved_network(saved: dict[str, Tensor]) -> nn.Module:
    net = flat_network().double()
    net.load_state_dict({k.removeprefix("weights."): v for k, v in saved.items() if k.startswith("weights.")})
    return net


def test_matches_two_libraries(parity: Callable[[str], dict[str, Tensor]], record: Callable[..., None]) -> None:
    saved = parity("grad_cam")
    net, x, target = _saved_network(saved), saved["input"], saved["classes"]
    found = GradCAM("4").explain(net, x, target)
    captum = LayerGradCam(net, net[4]).attribute(x, target=target, relu_attributions=True)
    gaps = {
        "captum 0.9.0 LayerGradCam": float((found.raw - captum).abs().max().detach()),
        "grad-cam 1.5.7": float((found.raw[:, 0] - saved["raw.grad_cam"]).abs().max()),
    }
    with pytest.warns(UserWarning, match="backward hooks"):
        theirs = GuidedBackprop(net).attribute(x, target=target)
    gaps["captum 0.9.0 GuidedBackprop"] = float((guided_backpropagation(net, x, target) - theirs).abs().max())
    assert max(gaps.values()) < 1e-13, gaps
    record(
        "grad_cam",
        "matched",
        repository="jacobgil/pytorch-grad-cam, pytorch/captum",
        package_versions="grad-cam 1.5.7, captum 0.9.0",
        authors="ramprs/grad-cam needs Lua Torch and was read, not run; two public libraries stand in for it",
        largest_difference=max(gaps.values()),
        differences=gaps,
    )


def test_guided_grad_cam_is_the_product_and_restores_everything() -> None:
    net = flat_network().double().train()
    x = torch.rand(2, 3, 12, 14, dtype=torch.float64)
    parts, hooks = list(net.modules()), _hooks(net)
    explainer = GradCAM("4")
    guided = explainer.guided(net, x, 1)
    expected = guided_backpropagation(net, x, 1) * explainer.explain(net, x, 1).maps
    torch.testing.assert_close(guided, expected, rtol=0, atol=0)
    assert list(net.modules()) == parts
    assert _hooks(net) == hooks
    assert net.training
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    assert not torch.allclose(plain, guided_backpropagation(net, x, 1)), "guiding changed nothing"
    (again,) = torch.autograd.grad(net(leaf)[:, 1].sum(), leaf)
    assert torch.equal(plain, again)


class _EveryReLU(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.layer = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.form == "module":
            y = self.layer(y)
        elif self.form == "method in place":
            y.relu_()
        elif self.form == "in place":
            F.relu(y, inplace=True)
        else:
            y = {"function": F.relu, "torch": torch.relu, "relu6": F.relu6}[self.form](y)
        return self.second(y).mean((2, 3))


@pytest.mark.parametrize("form", ["module", "function", "torch", "method in place", "in place", "relu6"])
def test_guided_back_propagation_catches_every_way_to_write_a_relu(form: str) -> None:
    net = _EveryReLU(form)
    x = torch.randn(2, 3, 7, 7)
    found = guided_backpropagation(net, x, 0)
    hidden = net.first(x)
    gradient = F.conv_transpose2d(torch.full((2, 1, 3, 3), 1 / 9), net.second.weight[:1])
    expected = F.conv_transpose2d(gradient.clamp(min=0) * (hidden > 0), net.first.weight)
    torch.testing.assert_close(found, expected)


def test_scores_scale_maps_and_counterfactuals_take_the_other_sign() -> None:
    net = flat_network().double()
    x = torch.randn(16, 3, 12, 14, dtype=torch.float64) * 3
    one = GradCAM("4").explain(net, x, lambda out: out[:, 2]).raw
    many = GradCAM("4").explain(net, x, lambda out: 7.5 * out[:, 2]).raw
    torch.testing.assert_close(many, 7.5 * one, rtol=1e-12, atol=1e-15)
    against = GradCAM("4", counterfactual=True).explain(net, x, 2).raw
    torch.testing.assert_close(against, GradCAM("4").explain(net, x, lambda out: -out[:, 2]).raw, rtol=0, atol=0)
    assert not ((one > 0) & (against > 0)).any()
    assert (against > 0).any()


def test_every_kind_of_target_says_the_same() -> None:
    net = flat_network()
    x = torch.rand(3, 3, 12, 14)
    best = net(x).argmax(1)
    expected = GradCAM("4").explain(net, x)
    targets: list[Any] = [
        best,
        best.tolist(),
        lambda out: out.gather(1, best[:, None])[:, 0],
        lambda out: out.amax(1).sum(),
    ]
    targets.append([lambda row, c=int(c): row[c] for c in best])
    for target in targets:
        assert torch.equal(GradCAM("4").explain(net, x, target).maps, expected.maps)
    torch.testing.assert_close(expected.scores, net(x).amax(1))
    # samples do not mix, and one backward pass serves all
    alone = torch.cat([GradCAM("4").explain(net, x[i : i + 1], int(best[i])).raw for i in range(3)])
    torch.testing.assert_close(alone, expected.raw, rtol=1e-4, atol=1e-7)


def _hooks(model: nn.Module) -> list[int]:
    return [len(p._forward_hooks) + len(p._forward_pre_hooks) + len(p._backward_hooks) for p in model.modules()]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "frozen"])
def test_works_wherever_it_is_called_and_leaves_the_model_alone(mode: str) -> None:
    net = torchvision.models.resnet18(num_classes=5)
    x = torch.rand(2, 3, 64, 64)
    expected = GradCAM("layer3").explain(net, x, 1).maps
    assert (expected > 0).any()
    net.bn1.eval()
    flags = [part.training for part in net.modules()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
        p.requires_grad_(mode != "frozen")
    state, hooks = copy.deepcopy(net.state_dict()), _hooks(net)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": torch.enable_grad}[mode]
    with context():
        inputs = x.clone()
        found = GradCAM("layer3").explain(net, inputs, 1).maps
        assert torch.is_grad_enabled() == (mode == "frozen")
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert [part.training for part in net.modules()] == flags
    assert _hooks(net) == hooks
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"):
        GradCAM("layer3").explain(net, x, _stop)
    assert [part.training for part in net.modules()] == flags
    assert _hooks(net) == hooks


def _stop(_output: Any) -> Tensor:
    raise RuntimeError("stop")


def test_several_layers_and_layers_behind_in_place_operations() -> None:
    """Behind bn2 of a residual block come a sum and a ReLU in place, which must not reach the kept tensor."""
    net = torchvision.models.resnet18(num_classes=5).eval()
    x = torch.rand(1, 3, 64, 64)
    found = GradCAM(["layer2", net.layer3[1].bn2, "layer4"]).explain(net, x, 1)
    assert [m.raw.shape[-1] for m in found] == [8, 4, 2]
    assert all(m.maps.shape == (1, 1, 64, 64) for m in found)
    seen: list[Tensor] = []
    hook = net.layer3[1].bn2.register_forward_hook(lambda *a: seen.append(a[2].clone()))
    net(x)
    hook.remove()
    block = net.layer3[1]
    a = seen[0].detach().requires_grad_()
    before = net.layer3[0](net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))))
    y = net.fc(net.layer4(F.relu(a + before)).mean((2, 3)))
    (g,) = torch.autograd.grad(y[:, 1].sum(), a)
    assert block.bn2 is net.layer3[1].bn2
    torch.testing.assert_close(found[1].raw, class_maps(a.detach(), g), rtol=1e-4, atol=1e-8)


def test_cost_is_one_forward_pass_and_no_gradient_below_the_layer() -> None:
    net = torchvision.models.resnet18(num_classes=5).eval()
    passes: list[bool] = []
    hook = net.layer1.register_forward_hook(lambda _m, _i, out: passes.append(out.requires_grad))
    GradCAM("layer3").explain(net, torch.rand(1, 3, 64, 64), 1)
    hook.remove()
    assert passes == [False]


def test_the_default_layer_is_the_last_with_more_than_one_position() -> None:
    import timm

    x = torch.rand(1, 3, 64, 64)
    expected = {"resnet10t": "layer4.0.act2", "mobilenetv3_small_050": "blocks.5.0.bn1.act"}
    for name, layer in expected.items():
        net = timm.create_model(name, num_classes=3)
        assert last_spatial_layer(net, x) == layer
        assert GradCAM().explain(net, x).raw.shape[2:] == (2, 2)
    assert last_spatial_layer(SmallNetwork(), x) == "body.4"
    with pytest.raises(ValueError, match="no module returns a 4-D tensor"):
        last_spatial_layer(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.rand(1, 3, 2, 2))


def test_transformers_are_explained_through_their_tokens() -> None:
    import timm

    net = timm.create_model("test_vit", num_classes=3, img_size=64)
    x = torch.rand(2, 3, 64, 64)
    found = GradCAM("blocks.1.norm1", reshape=TokenGrid(prefix=1)).explain(net, x, 1)
    assert found.raw.shape == (2, 1, 4, 4)
    assert found.maps.shape == (2, 1, 64, 64)
    with pytest.raises(ValueError, match="TokenGrid"):
        GradCAM().explain(net, x, 1)
    tokens = torch.arange(2 * 7 * 5.0).view(2, 7, 5)
    assert torch.equal(TokenGrid(grid=(2, 3))(tokens)[1, :, 1, 0], tokens[1, 1 + 3])
    with pytest.raises(ValueError, match="expected tokens"):
        TokenGrid()(tokens)


def test_clips_and_segmenters() -> None:
    clip = nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    assert GradCAM().explain(clip, torch.rand(2, 3, 4, 8, 10), 1).maps.shape == (2, 1, 4, 8, 10)
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    x = torch.rand(2, 3, 9, 11)
    anywhere = GradCAM("1").explain(segmenter, x, 2).raw
    by_hand = GradCAM("1").explain(segmenter, x, lambda out: out[:, 2].sum((1, 2))).raw
    torch.testing.assert_close(anywhere, by_hand)
    with pytest.raises(ValueError, match="no one best class"):
        GradCAM("1").explain(segmenter, x)


def test_detectors_take_a_callable_and_lists_of_images() -> None:
    from torchvision.models.detection.image_list import ImageList

    class Detector(nn.Module):
        """Pads its images to one batch as torchvision's detectors do, and scores each."""

        def __init__(self) -> None:
            super().__init__()
            self.transform, self.body = Pad(), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            batch = self.transform(images)
            return [{"scores": row.amax((1, 2))} for row in self.body(batch.tensors)]

    class Pad(nn.Module):
        def forward(self, images: list[Tensor]) -> ImageList:
            batch = torch.zeros(len(images), 3, 16, 24)
            for i, image in enumerate(images):
                batch[i, :, : image.shape[1], : image.shape[2]] = image
            return ImageList(batch, [(i.shape[1], i.shape[2]) for i in images])

    net, images = Detector(), [torch.rand(3, 16, 12), torch.rand(3, 9, 24)]
    found = GradCAM("body").explain(net, images, lambda out: torch.stack([d["scores"][1] for d in out]))
    assert [tuple(m.shape) for m in found.maps] == [(1, 1, 16, 12), (1, 1, 9, 24)]
    assert torch.equal(found.maps[0][0], found.raw[0, :, :16, :12]), "the padding was not cut away"
    assert torch.equal(found.maps[1][0], found.raw[1, :, :9, :24])
    assert [d.shape for d in found.display] == [m.shape for m in found.maps]
    guided = GradCAM("body").guided(net, images, lambda out: out[0]["scores"].sum() + out[1]["scores"].sum())
    assert [tuple(g.shape) for g in guided] == [(3, 16, 12), (3, 9, 24)]
    with pytest.raises(ValueError, match="give a callable"):
        GradCAM("body").explain(net, images, 1)


def test_an_rcnn_is_explained() -> None:
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    net = build(weights=None, weights_backbone=None, num_classes=3, box_score_thresh=0.0)
    images = [torch.rand(3, 60, 80), torch.rand(3, 60, 80)]
    found = GradCAM("backbone.fpn.layer_blocks.0").explain(net, images, lambda out: sum(d["scores"].sum() for d in out))
    assert found.maps.shape == (2, 1, 60, 80)
    assert (found.raw != 0).any()
    assert net.training


def test_boxes_from_maps_on_drawn_maps() -> None:
    maps = torch.zeros(5, 1, 9, 12)
    maps[0, 0, 2:5, 3:9] = 1
    maps[0, 0, 8, 0] = 5 * 1.0  # a higher but smaller component: size decides
    maps[1, 0, 1:3, 1:3], maps[1, 0, 3:5, 3:5] = 1, 0.2  # joined at a corner, above 15 %
    maps[2, 0, 1:3, 1:3], maps[2, 0, 3:5, 3:5] = 1, 0.1  # below 15 %
    maps[4, 0, 0, 0] = 1  # next to nothing of sample 3
    boxes = boxes_from_maps(maps)
    expected = [[3, 2, 9, 5], [1, 1, 5, 5], [1, 1, 3, 3], [0, 0, 12, 9], [0, 0, 1, 1]]
    assert boxes.tolist() == expected
    truth = torch.tensor([[3.0, 2, 9, 5], [1, 1, 3, 3], [1, 1, 4, 4], [0, 0, 12, 9], [5, 5, 6, 6]])
    assert localised(boxes, truth).tolist() == [True, False, False, True, False]
    assert boxes_from_maps(torch.zeros(0, 1, 4, 4)).shape == (0, 4)


def test_pointing_game() -> None:
    maps = torch.zeros(3, 1, 20, 30)
    maps[0, 0, 5, 6] = maps[1, 0, 5, 6] = maps[2, 0, 19, 29] = 1
    boxes = torch.tensor([[6.0, 5, 7, 6], [8, 5, 12, 9], [0, 0, 3, 3]])
    assert pointing_game(maps, boxes, tolerance=0).tolist() == [True, False, False]
    assert pointing_game(maps, boxes, tolerance=1.5).tolist() == [True, True, False]
    masks = torch.zeros(3, 20, 30)
    masks[0, 5, 6] = masks[1, 5, 8] = masks[2, 0, 0] = 1
    assert pointing_game(maps, masks, tolerance=0).tolist() == [True, False, False]
    assert pointing_game(maps, masks, tolerance=2).tolist() == [True, True, False]


class _Corner(nn.Module):
    """Two classes; the logit of class 1 is the mean of the left upper quarter."""

    def forward(self, x: Tensor) -> Tensor:
        score = 8 * x[:, :, :4, :4].mean((1, 2, 3)) - 4
        return torch.stack([-score, score], 1)


def test_deletion_and_insertion_rank_the_truth_before_noise_and_its_opposite() -> None:
    x = torch.ones(2, 3, 8, 8)
    right = torch.zeros(2, 1, 8, 8)
    right[:, :, :4, :4] = 1
    for mode, sign in (("deletion", 1), ("insertion", -1)):
        areas = [
            float(faithfulness(_Corner(), x, m, 1, mode=mode, steps=16, blank=torch.zeros_like).mean())
            for m in (right, torch.rand(2, 1, 8, 8), -right)
        ]
        assert sorted(areas, reverse=sign < 0) == areas
        assert areas[0] != areas[2]
    # by hand: with the right map the score falls evenly over the first quarter, then stays
    points = [2 * (8 * max(1 - i / 4, 0) - 4) for i in range(17)]
    curve = torch.tensor(points, dtype=torch.float64).sigmoid()
    found = faithfulness(_Corner(), x, right, 1, mode="deletion", steps=16)
    assert float(found[0]) == pytest.approx(float(torch.trapezoid(curve, dx=1 / 16)), abs=1e-5)


def test_the_map_depends_on_the_weights() -> None:
    """Sanity check by randomisation; a map that shows the image alone is the control, and is found out."""
    net, x = flat_network(), torch.rand(24, 3, 12, 14)
    before = copy.deepcopy(net.state_dict())
    correlation = randomisation_check(GradCAM("4"), net, x, 1)
    assert correlation.shape == (24,)
    assert float(correlation.abs().mean()) < 0.6
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    class Edges:
        def explain(self, _model: nn.Module, inputs: Tensor, _target: Any) -> Any:
            return type("Maps", (), {"raw": inputs.mean(1, keepdim=True)})

    assert randomisation_check(Edges(), net, x, 1).tolist() == pytest.approx([1.0] * 24)
    with pytest.raises(ValueError, match="reset_parameters"):
        randomisation_check(Edges(), _Corner(), x)


def test_overlay_runs_from_blue_to_red() -> None:
    ramp = torch.linspace(-1, 3, 5).view(1, 1, 1, 5)
    colours = overlay(torch.zeros(1, 1, 1, 5), ramp, opacity=1.0)[0, :, 0].T
    expected = [[0, 0, 0.5], [0, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 0], [0.5, 0, 0]]
    torch.testing.assert_close(colours, torch.tensor(expected))
    image = torch.rand(2, 3, 4, 5)
    assert torch.equal(overlay(image, torch.rand(2, 1, 4, 5), opacity=0.0), image)
    assert torch.equal(min_max(torch.full((2, 1, 3, 3), 4.0)), torch.zeros(2, 1, 3, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: GradCAM(variant="cam"), "'cam'"),
        (lambda net, x: GradCAM("44").explain(net, x), "did you mean '4'"),
        (lambda net, x: GradCAM(nn.ReLU()).explain(net, x), "no part of the model"),
        (lambda net, x: GradCAM([]).explain(net, x), "at least one layer"),
        (lambda net, x: GradCAM("4").explain(net, x, 4), "classes 0 to 3, got 4"),
        (lambda net, x: GradCAM("4").explain(net, x, torch.zeros(3, dtype=torch.long)), "each of 2 samples"),
        (lambda net, x: GradCAM("4").explain(net, x, lambda out: out), "one scalar"),
        (lambda net, x: GradCAM("4").explain(net, x, lambda out: torch.zeros(2)), "no gradient"),
        (lambda net, x: GradCAM("6").explain(net, x), "give reshape or another layer"),
        (lambda net, x: GradCAM(["4", "2"]).guided(net, x), "one layer, got 2"),
        (lambda net, x: overlay(x, x), "expected images"),
        (lambda net, x: boxes_from_maps(x), "expected maps"),
        (lambda net, x: faithfulness(net, x, x[:, :1], mode="both"), "'both'"),
    ],
)
def test_errors_name_what_was_wrong(call: Callable[[nn.Module, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(flat_network(), torch.rand(2, 3, 12, 14))
