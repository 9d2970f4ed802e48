"""MABN: a loop reference from the formulas, the authors' module on copied state, folding, checkpoints."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from torchive.engine.convert import convert
from torchive.methods.blocks.mabn import CenConv2d, MABN2d, fold, fold_into_conv
from torchive.methods.blocks.mabn.norm import second_moment

KEYS = ("y", "dx", "dgamma", "dbeta", "running_var")
REPOSITORY, COMMIT = "megvii-model/MABN", "995e8f5af82ced88394166a322766a5378ece969"


def reference(
    steps: list[tuple[Tensor, Tensor]],
    gamma: list[float],
    beta: list[float],
    *,
    m: int,
    warmup: int,
    start: int = 0,
    ema_of: str = "average",
) -> dict[str, Tensor]:
    """Every number by itself, channel after channel, from the paper's formulas; ``steps`` holds pairs (x, dL/dy)."""
    y, dx = ([torch.zeros_like(x) for x, _ in steps] for _ in range(2))
    channels, keep, eps = len(gamma), 0.98, 1e-5
    dgamma, dbeta, running = ([[0.0] * channels for _ in steps] for _ in range(3))
    for c in range(channels):
        v, moments, products = 1.0, [0.0] * m, [0.0] * m  # the last m values, oldest first
        for t, (x, grad) in enumerate(steps):
            step = start + t + 1
            xc, gc = x[:, c].reshape(-1).tolist(), grad[:, c].reshape(-1).tolist()
            own = sum(a * a for a in xc) / len(xc)
            moments = [*moments[1:], own]
            averaged = step > m and step >= warmup
            chi = sum(moments) / m if averaged else own
            r = math.sqrt(chi + eps) / math.sqrt(v + eps)
            r = 1.0 if step <= max(1000, warmup) else min(max(r, 1 / 5), 5.0)
            v = keep * v + (1 - keep) * (chi if ema_of == "average" else own)
            z = [a / math.sqrt(chi + eps) for a in xc]
            g = [b * gamma[c] * r for b in gc]
            psi_own = sum(a * b for a, b in zip(g, z, strict=True)) / len(z)
            products = [*products[1:], psi_own]
            psi = sum(products) / m if averaged else psi_own
            y[t][:, c] = torch.tensor([gamma[c] * r * a + beta[c] for a in z]).view_as(y[t][:, c])
            slope = [(b - a * psi) / math.sqrt(chi + eps) for a, b in zip(z, g, strict=True)]
            dx[t][:, c] = torch.tensor(slope).view_as(dx[t][:, c])
            dgamma[t][c] = sum(b * r * a for a, b in zip(z, gc, strict=True))
            dbeta[t][c] = sum(gc)
            running[t][c] = v
    scalars = (torch.tensor(values) for values in (dgamma, dbeta, running))
    return dict(zip(KEYS, (torch.stack(y), torch.stack(dx), *scalars), strict=True))


def run(norm: MABN2d, steps: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    kept: dict[str, list[Tensor]] = {key: [] for key in KEYS}
    for x, grad in steps:
        x = x.clone().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(grad)
        new = (y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_var)
        for values, value in zip(kept.values(), new, strict=True):
            assert value is not None
            values.append(value.clone())
    return {key: torch.stack(values) for key, values in kept.items()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ema_of", ["average", "batch"])
@pytest.mark.parametrize("start", [0, 990])
def test_equals_the_loop_reference(double, record, start, ema_of, layout):
    steps = []
    for t in range(30):
        x = torch.randn(2, 3, 3, 4) * (1 + t % 3)
        steps.append((x.contiguous(memory_format=layout), torch.randn(2, 3, 3, 4)))
    norm = MABN2d(3, buffer_size=4, warmup_iters=9, ema_of=ema_of)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.normal_(norm.bias)
    norm.iterations.fill_(start)
    gamma, beta = norm.weight.tolist(), norm.bias.tolist()
    expected = reference(steps, gamma, beta, m=4, warmup=9, start=start, ema_of=ema_of)
    if start:  # averaging begins at once here: the rings start as zeros in both
        assert (expected["running_var"][-1] - 1).abs().min() > 0.1
    found = run(norm, steps)
    worst = max((found[key] - expected[key]).abs().max().item() for key in expected)
    assert worst < 1e-12
    if not start and ema_of == "average" and layout == torch.contiguous_format:
        record("mabn", "referenced", largest_difference=worst, dtype="float64", steps=30)


def drawer() -> object:
    stream = np.random.RandomState(0)
    return lambda *shape: torch.from_numpy(stream.standard_normal(shape))


def test_matches_the_authors_module(double, record, parity):
    """200 steps from the start, 40 past step 1000 where r moves, and a network trained by 200 optimiser steps."""
    stored, draw = parity("mabn"), drawer()
    worst = {"output": 0.0, "gradient": 0.0, "state": 0.0}
    for name, count, start in (("layer", 200, 0), ("late", 40, 1000)):
        norm = MABN2d(3)
        norm.weight.data, norm.bias.data = draw(3).abs() + 0.5, draw(3)
        if start:
            norm.running_var = draw(3).abs() + 0.1
            norm.buffer_x2, norm.buffer_gz = draw(16, 3) ** 2, draw(16, 3) * 0.1
            norm.iterations.fill_(start)
        found = run(norm, [(draw(2, 3, 2, 3) * (1 + t % 4), draw(2, 3, 2, 3)) for t in range(count)])
        gradients = torch.stack([found["dgamma"], found["dbeta"]], 1)
        pairs = {
            "output": [(found["y"], stored[f"{name}.y"])],
            "gradient": [(found["dx"], stored[f"{name}.dx"]), (gradients, stored[f"{name}.state"][:, :2])],
            "state": [
                (found["running_var"], stored[f"{name}.state"][:, 2]),
                (norm.buffer_x2, stored[f"{name}.x2"]),
                (norm.buffer_gz, stored[f"{name}.gz"]),
            ],
        }
        for key, values in pairs.items():
            worst[key] = max(worst[key], *((a - b).abs().max().item() for a, b in values))
    conv, norm = CenConv2d(2, 3, 3, padding=1), MABN2d(3)
    conv.weight.data = draw(3, 2, 3, 3)
    optimiser = torch.optim.SGD([*conv.parameters(), *norm.parameters()], lr=0.05, momentum=0.9)
    worst["optimiser_step"] = 0.0
    for t in range(200):
        x, target = draw(2, 2, 4, 4), draw(2, 3, 4, 4)
        loss = (norm(conv(x)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if t in (0, 199):
            now = {"conv": conv.weight, "weight": norm.weight, "bias": norm.bias, "grad": conv.weight.grad}
            gaps = [(value - stored[f"net.{t + 1}.{key}"]).abs().max().item() for key, value in now.items()]
            worst["optimiser_step"] = max(worst["optimiser_step"], *gaps)
    network = nn.Sequential(conv, norm).eval()
    x = draw(2, 2, 5, 4)
    worst["output"] = max(worst["output"], (network(x) - stored["net.eval"]).abs().max().item())
    assert max(worst.values()) < 1e-6
    figures = {"largest_difference": max(worst.values()), "steps": 200, **worst}
    record("mabn", "matched", repository=REPOSITORY, commit=COMMIT, **figures)


def test_float32_follows_float64():
    steps = [(torch.randn(2, 4, 9, 9) * 3, torch.randn(2, 4, 9, 9)) for _ in range(60)]
    single = run(MABN2d(4, buffer_size=4, warmup_iters=5), steps)
    double = run(MABN2d(4, buffer_size=4, warmup_iters=5).double(), [(x.double(), g.double()) for x, g in steps])
    for key, value in single.items():
        assert (value - double[key]).abs().max() <= 2e-6 * double[key].abs().max(), key


def test_single_step_is_the_gradient_of_the_formula(double):
    """m = 1 and r = 1: the true gradient of x / sqrt(E[x^2] + eps), by autograd and by finite differences."""
    x, grad = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    norm = MABN2d(3, buffer_size=1, warmup_iters=10**6)
    norm(x).backward(grad)
    found, x.grad = x.grad, None
    chi = (x * x).mean((0, 2, 3), keepdim=True)
    (x / (chi + 1e-5).sqrt()).backward(grad)
    assert found is not None
    assert x.grad is not None
    assert (found - x.grad).abs().max() < 1e-14
    with torch.no_grad():  # two statistics are enough
        s = (chi + 1e-5).sqrt()
        z = x / s
        assert (found - (grad - z * (grad * z).mean((0, 2, 3), keepdim=True)) / s).abs().max() < 1e-14
    assert torch.autograd.gradcheck(norm, (x,))


def test_scale_of_the_input_does_not_matter(double):
    x = torch.randn(2, 3, 4, 5)
    norm = MABN2d(3, buffer_size=1, eps=0.0)
    expected = norm(x)
    for factor in (1e-6, 0.3, 1e6):
        assert (norm(factor * x) - expected).abs().max() < 1e-12


def test_average_is_over_the_last_steps():
    norm = MABN2d(2, buffer_size=3, warmup_iters=0)
    for scale in (9.0, 1.0, 2.0, 3.0):
        y = norm(torch.full((1, 2, 2, 2), scale))
    assert torch.allclose(y, torch.full_like(y, 3 / math.sqrt((1 + 4 + 9) / 3)), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_folded_convolution_is_the_same_function(groups, bias):
    conv = CenConv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups, bias=bias, padding_mode="reflect")
    norm = MABN2d(6)
    for parameter in (norm.weight, norm.bias, *([conv.bias] if bias else [])):
        nn.init.normal_(parameter)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    both = nn.Sequential(conv, norm).eval()
    x = torch.randn(2, 4, 11, 9)
    folded = fold_into_conv(conv, norm)
    assert type(folded) is nn.Conv2d
    assert (folded(x) - both(x)).abs().max() < 1e-5
    if not bias:
        assert torch.equal(folded.bias, norm.bias)


class Branches(nn.Module):
    """Pairs that may be folded, and three that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = CenConv2d(3, 4, 3), MABN2d(4)
        self.read_twice, self.after_read_twice = CenConv2d(4, 4, 1), MABN2d(4)
        self.shared, self.norm_a, self.norm_b = CenConv2d(4, 4, 1), MABN2d(4), MABN2d(4)
        self.bare, self.after_relu = CenConv2d(4, 4, 1), MABN2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(self.first(x)).relu()
        y = self.read_twice(x)
        x = self.after_read_twice(y) + y.sigmoid()
        x = self.norm_a(self.shared(x)) + self.norm_b(self.shared(x.relu()))
        return self.after_relu(self.bare(x).relu())


def unsettle(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, MABN2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)


def test_fold_takes_only_what_it_may():
    model = Branches()
    unsettle(model)
    x = torch.randn(2, 3, 8, 7)
    folded = fold(model, x)
    assert model.training
    assert not folded.training
    assert (folded(x) - model.eval()(x)).abs().max() < 1e-5
    left = {name for name, module in folded.named_modules() if isinstance(module, MABN2d)}
    assert left == {"after_read_twice", "norm_a", "norm_b", "after_relu"}
    assert not any(isinstance(module, CenConv2d) for module in folded.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_035"])
def test_a_whole_network_folds(name):
    model = timm.create_model(name, num_classes=5)
    convert(model, "mabn", buffer_size=3)
    unsettle(model)
    x = torch.randn(2, 3, 64, 48)
    folded = fold(model, x)
    expected = model.eval()(x)
    assert (folded(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert not any(isinstance(module, MABN2d | CenConv2d) for module in folded.modules())


def test_takes_over_gamma_beta_activation_and_weights_but_no_statistics():
    old = timm.layers.BatchNormAct2d(5, eps=1e-3, act_layer=nn.LeakyReLU)
    for tensor in (old.weight, old.bias, old.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(old.running_var, 2, 3)
    new = MABN2d.from_module(old, channels=5, buffer_size=4)
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)
    assert new.eps == 1e-3
    assert torch.equal(new.running_var, torch.ones(5))
    assert new.buffer_x2.shape == (4, 5)
    x = torch.randn(2, 5, 3, 3)
    new.eval()
    plain = MABN2d.from_module(nn.BatchNorm2d(5))
    plain.load_state_dict(new.state_dict() | {"buffer_x2": plain.buffer_x2, "buffer_gz": plain.buffer_gz})
    plain.eps = 1e-3
    assert torch.equal(new(x), nn.functional.leaky_relu(plain.eval()(x), 0.01))
    conv = nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), groups=2, bias=True)
    centred = CenConv2d.from_module(conv)
    assert torch.equal(centred.weight, conv.weight)
    assert centred.weight is not conv.weight
    shift = conv.weight.mean((1, 2, 3), keepdim=True)
    x = torch.randn(2, 4, 7, 5)
    expected = nn.functional.conv2d(x, conv.weight - shift, conv.bias, 2, (1, 0), 1, 2)
    assert torch.allclose(centred(x), expected, atol=1e-6)
    frozen = MABN2d.from_module(nn.BatchNorm2d(3, affine=False))
    assert not frozen.weight.requires_grad
    assert not frozen.bias.requires_grad


def test_a_constant_added_to_a_filter_changes_nothing(double):
    conv = CenConv2d(3, 4, 3)
    x, grad = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 4, 4)
    expected = conv(x)
    expected.backward(grad)
    before = conv.weight.grad.clone()
    assert before.mean((1, 2, 3)).abs().max() < 1e-12
    with torch.no_grad():
        conv.weight += torch.randn(4, 1, 1, 1)
    conv.zero_grad()
    again = conv(x)
    again.backward(grad)
    assert (again - expected).abs().max() < 1e-12
    assert (conv.weight.grad - before).abs().max() < 1e-12
    assert torch.autograd.gradcheck(conv, (x.requires_grad_(),))


def test_eval_and_empty_batches_write_nothing():
    norm = MABN2d(3, buffer_size=2, warmup_iters=0)
    for _ in range(3):
        norm(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    before = copy.deepcopy(norm.state_dict())
    y = norm(torch.randn(0, 3, 4, 4, requires_grad=True))
    y.sum().backward()
    norm.eval()
    norm(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    assert int(norm.iterations) == 3


def test_a_checkpoint_resumes_bit_for_bit():
    steps = [(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)) for _ in range(24)]
    whole, first = MABN2d(3, buffer_size=4, warmup_iters=6), MABN2d(3, buffer_size=4, warmup_iters=6)
    expected = run(whole, steps)
    run(first, steps[:11])
    second = MABN2d(3, buffer_size=4, warmup_iters=6)
    second.load_state_dict(first.state_dict())
    found = run(second, steps[11:])
    assert all(torch.equal(found[key], expected[key][11:]) for key in found)
    assert all(
        torch.equal(a, b) for a, b in zip(second.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_one_norm_may_serve_several_places():
    """Two forwards before a backward: each backward writes the row of its own step."""
    norm = MABN2d(2, buffer_size=2, warmup_iters=0)
    a, b = torch.randn(1, 2, 3, 3, requires_grad=True), torch.randn(1, 2, 3, 3, requires_grad=True)
    (norm(a).square().sum() + norm(b).pow(3).sum()).backward()
    assert int(norm.iterations) == 2
    assert (norm.buffer_gz != 0).all()
    assert a.grad is not None
    assert b.grad is not None


def test_half_precision_keeps_its_statistics():
    norm, exact = MABN2d(3), MABN2d(3)
    x = (torch.randn(2, 3, 16, 16) * 40).bfloat16().requires_grad_()
    y = norm(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    exact(x.detach().float())
    assert torch.allclose(norm.buffer_x2[1], exact.buffer_x2[1], rtol=1e-5)  # not the bfloat16 sum
    conv = CenConv2d(3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(conv(torch.randn(2, 3, 8, 8)))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert norm.running_var.dtype == torch.float32
    large = torch.full((1, 3, 4, 4), 300.0, dtype=torch.float16)  # 300^2 is no float16
    assert torch.isfinite(second_moment(large)).all()


def test_compiles_whole_in_training():
    network = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4, buffer_size=2, warmup_iters=3))
    twin = copy.deepcopy(network)
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in range(6):
        x = torch.randn(2, 3, 7, 8 + size)
        expected, found = network(x), compiled(x)
        expected.square().sum().backward()
        found.square().sum().backward()
        assert torch.allclose(found, expected, atol=1e-6)
    for a, b in zip(twin.state_dict().values(), network.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(twin[0].weight.grad, network[0].weight.grad, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named():
    for options in ({"buffer_size": 0}, {"momentum": 1.5}, {"warmup_iters": -1}, {"ema_of": "ring"}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            MABN2d(3, **options)


def test_bad_modules_are_named():
    with pytest.raises(TypeError, match="GroupNorm"):
        MABN2d.from_module(nn.GroupNorm(1, 4))
    with pytest.raises(TypeError, match="Linear"):
        CenConv2d.from_module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="4"):
        MABN2d.from_module(nn.BatchNorm2d(4), channels=5)
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 3\)"):
        MABN2d(3)(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match="6 channels"):
        fold_into_conv(nn.Conv2d(3, 6, 1), MABN2d(4))
