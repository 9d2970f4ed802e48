"""Attention U-Net against a float64 reference, the authors' code and the paper's special cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchive.methods.segmentation.attention_unet import AttentionGate, AttentionUNet
from torchive.nn.cascade import TwoStageUNet, foreground_box
from torchive.nn.dice import SoftDiceLoss
from torchive.nn.unet import UNet, resize, unet_of_size

REPOSITORY = "ozan-oktay/Attention-Gated-Networks"
COMMIT = "eee4881fdc31920efd873773e0b744df8dacbfb6"


def linear_weights(old: int, new: int) -> list[list[tuple[int, float]]]:
    """For each new position the old ones it mixes: linear interpolation between cell centres, borders repeated."""
    rows = []
    for i in range(new):
        place = max((i + 0.5) * old / new - 0.5, 0.0)
        low = min(int(place), old - 1)
        high = min(low + 1, old - 1)
        rows.append([(low, 1 - (place - low)), (high, place - low)])
    return rows


def slow_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    y = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    for i, rows in enumerate(linear_weights(x.shape[2], size[0])):
        for j, columns in enumerate(linear_weights(x.shape[3], size[1])):
            for r, a in rows:
                for c, b in columns:
                    y[:, :, i, j] += a * b * x[:, :, r, c]
    return y


def slow_gate(gate: AttentionGate, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's equations 1 and 2, position by position."""
    samples, _, height, width = x.shape
    half = (height // 2, width // 2)
    theta, phi, psi = gate.theta.weight, gate.phi.weight[:, :, 0, 0], gate.psi.weight[0, :, 0, 0]
    signal = torch.zeros(samples, len(phi), *g.shape[2:], dtype=x.dtype)
    for i in range(g.shape[2]):
        for j in range(g.shape[3]):
            signal[:, :, i, j] = g[:, :, i, j] @ phi.T + gate.phi.bias
    signal = slow_resize(signal, half)
    q = torch.zeros(samples, 1, *half, dtype=x.dtype)
    for n in range(samples):
        for i in range(half[0]):
            for j in range(half[1]):
                patch = x[n, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                hidden = [(theta[k] * patch).sum() + signal[n, k, i, j] for k in range(len(theta))]
                q[n, 0, i, j] = sum(psi[k] * max(float(h), 0.0) for k, h in enumerate(hidden)) + gate.psi.bias[0]
    if gate.normalisation == "sigmoid":
        alpha = 1 / (1 + torch.exp(-q))
    else:
        alpha = torch.exp(q) / torch.exp(q).sum((2, 3), keepdim=True)
    alpha = slow_resize(alpha, (height, width))
    conv, norm = gate.output
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            y = (alpha * x)[:, :, i, j] @ conv.weight[:, :, 0, 0].T + conv.bias
            out[:, :, i, j] = (y - norm.running_mean) / torch.sqrt(
                norm.running_var + norm.eps
            ) * norm.weight + norm.bias
    return out, alpha


@pytest.mark.parametrize("normalisation", ["sigmoid", "softmax"])
def test_gate_equals_slow_reference(normalisation: str, record) -> None:
    gate = AttentionGate(4, 6, normalisation=normalisation, open_bias=0.3).double().eval()
    gate.psi.weight.data.normal_()
    gate.output[1].running_mean.normal_()
    largest = 0.0
    with torch.no_grad():
        for size, coarse in (((8, 6), (4, 3)), ((7, 9), (2, 3)), ((5, 4), (1, 1))):
            x, g = torch.randn(2, 4, *size, dtype=torch.double), torch.randn(2, 6, *coarse, dtype=torch.double)
            y, alpha = slow_gate(gate, x, g)
            torch.testing.assert_close(gate(x, g), y, rtol=0, atol=1e-12)
            torch.testing.assert_close(gate.attention(x, g), alpha, rtol=0, atol=1e-12)
            largest = max(largest, float((gate(x, g) - y).abs().max()))
    if normalisation == "sigmoid":
        record("attention_unet", "referenced", largest_difference=largest, dtype="float64")


@pytest.mark.parametrize(
    "case", ["sigmoid/2d", "sigmoid/2d_odd", "sigmoid/3d", "sigmoid/3d_odd", "softmax/2d_odd", "softmax/3d_odd"]
)
def test_gate_equals_authors_code(case: str, parity) -> None:
    t = {
        k.removeprefix(f"gate/{case}/"): v.double()
        for k, v in parity("attention_unet").items()
        if k.startswith(f"gate/{case}/")
    }
    gate = AttentionGate(4, 6, inter_channels=3, ndim=t["x"].ndim - 2, normalisation=case.split("/")[0]).double()
    state = {k.removeprefix("w/").replace("W.", "output."): v for k, v in t.items() if k.startswith("w/")}
    gate.load_state_dict({**gate.state_dict(), **state})
    x, g = t["x"].requires_grad_(), t["g"].requires_grad_()
    y = gate(x, g)
    y.square().mean().backward()
    torch.testing.assert_close(y, t["y"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gate.attention(x, g), t["alpha"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, t["dx"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g.grad, t["dg"], rtol=1e-4, atol=1e-6)
    for name, parameter in gate.named_parameters():
        torch.testing.assert_close(parameter.grad, t[f"d/{name.replace('output.', 'W.')}"], rtol=1e-4, atol=1e-6)


def release_dice(logits: Tensor, target: Tensor, smooth: float = 0.01) -> Tensor:
    """The release's loss: its smooth term stands inside the factor two."""
    p, t = logits.softmax(1).flatten(2), F.one_hot(target, logits.shape[1]).movedim(-1, 1).flatten(2)
    return 1 - (2 * ((p * t).sum(2) + smooth) / (p.sum(2) + t.sum(2) + smooth)).mean()


def test_network_equals_authors_code(parity, record) -> None:
    """Output in evaluation and in training, loss, each fourth gradient, and the output after one optimiser step."""
    t = {k.removeprefix("net/"): v for k, v in parity("attention_unet").items() if k.startswith("net/")}
    net = AttentionUNet(num_classes=3, in_channels=1, ndim=3, widths=(1, 2, 4, 8, 16))
    state, start = net.state_dict(), 0
    for value in state.values():
        if value.is_floating_point():
            value.copy_(t["weights"][start : start + value.numel()].view_as(value))
            start += value.numel()
    assert start == len(t["weights"])
    net.double().eval()
    x, target = t["x"].double(), t["t"].long()
    thin = (..., *[slice(None, None, 4)] * 3)
    gaps = [float((net(x)[thin] - t["y"]).detach().abs().max())]
    net.train()
    y = net(x)
    loss = release_dice(y, target)
    loss.backward()
    gaps += [float((y[thin] - t["train_y"]).detach().abs().max()), float((loss - t["loss"][0]).detach().abs())]
    gradients = torch.cat([p.grad.flatten() for p in net.parameters()])[::4]
    gaps.append(float((gradients - t["gradients"]).abs().max()))
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    gaps.append(float((net.eval()(x)[thin] - t["after"]).detach().abs().max()))
    assert max(gaps) < 1e-5, gaps
    record(
        "attention_unet",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(gaps),
        dtype="float64",
        what="3-D network: output, loss, gradients, output after one optimiser step; six gates in 2-D and 3-D",
    )


@pytest.mark.parametrize(("kwargs", "count"), [({}, 6_214_151)])
def test_parameters_of_the_authors_network(kwargs: dict, count: int) -> None:
    with torch.device("meta"):
        net = AttentionUNet(num_classes=4, in_channels=1, ndim=3, **kwargs)
        plain = UNet(num_classes=4, in_channels=1, ndim=3)
    assert sum(p.numel() for p in net.parameters()) == count
    assert sum(p.numel() for p in plain.parameters()) == 5_888_004
    assert set(plain.state_dict()) < set(net.state_dict())


@pytest.mark.parametrize("ndim", [2, 3])
def test_open_gates_give_a_unet_with_a_1x1_norm_on_its_skips(ndim: int) -> None:
    widths = (4, 8, 16, 8)
    net = AttentionUNet(num_classes=3, in_channels=2, widths=widths, ndim=ndim).double().eval()
    plain = UNet(num_classes=3, in_channels=2, widths=widths, ndim=ndim).double().eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k in plain.state_dict()})
    for gate in net.gates:
        torch.nn.init.constant_(gate.psi.bias, 60.0)
    x = torch.randn(2, 2, *(24, 17, 16)[:ndim], dtype=torch.double)
    *skips, y = plain.encoder(x)
    skips = [skips[0]] + [c(g.output(s)) for g, c, s in zip(net.gates, net.combine, skips[1:], strict=True)]
    maps: list[Tensor] = []
    for step, skip in zip(reversed(plain.decoder), reversed(skips), strict=True):
        y = step(skip, y)
        maps.insert(0, y)
    torch.testing.assert_close(net(x), plain.head(maps), rtol=0, atol=1e-12)
    with torch.no_grad():  # identity transforms (ReLU keeps the skips, which are not negative): exactly the plain U-Net
        for gate, combine in zip(net.gates, net.combine, strict=True):
            for conv, norm in ((gate.output[0], gate.output[1]), (combine[0], combine[1])):
                torch.nn.init.dirac_(conv.weight)
                conv.bias.zero_()
                norm.eps = 0.0
    torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-10)


def test_gates_start_open() -> None:
    net = AttentionUNet(widths=(8, 16, 32, 64)).eval()
    for alpha in net.attention_maps(torch.randn(2, 3, 32, 48)):
        alpha = alpha.detach()
        assert alpha.min() > 0.85
        assert abs(float(alpha.mean()) - 1 / (1 + math.exp(-3))) < 0.02


@pytest.mark.parametrize("coarse", [(1, 1), (2, 5), (5, 4), (9, 11)])
def test_gating_signal_of_any_coarser_size(coarse: tuple[int, int]) -> None:
    gate = AttentionGate(6, 4)
    torch.nn.init.normal_(gate.psi.weight)
    x, g = torch.randn(2, 6, 9, 11), torch.randn(2, 4, *coarse)
    alpha = gate.attention(x, g)
    assert alpha.shape == (2, 1, 9, 11)
    assert 0 < alpha.min() <= alpha.max() < 1
    assert gate(x, g).shape == x.shape


def test_softmax_gate_sums_to_one_on_the_coarse_grid() -> None:
    gate = AttentionGate(6, 4, normalisation="softmax")
    torch.nn.init.normal_(gate.psi.weight)
    alpha = gate.attention(torch.randn(2, 6, 8, 12), torch.randn(2, 4, 4, 6))
    pooled = F.avg_pool2d(alpha, 2) * 4  # linear upsampling by two keeps the mean up to the borders
    torch.testing.assert_close(pooled.sum((2, 3)), torch.full((2, 1), 4.0), rtol=0.1, atol=0)


def test_gradient_of_the_skip_is_scaled_by_alpha() -> None:
    """The claimed mechanism: with alpha held, d loss / d x = alpha * d loss / d (alpha x)."""
    gate = AttentionGate(5, 3).double().eval()
    torch.nn.init.normal_(gate.psi.weight)
    x, g = torch.randn(2, 5, 8, 8, dtype=torch.double), torch.randn(2, 3, 4, 4, dtype=torch.double)
    alpha = gate.attention(x, g).detach()
    skip = x.clone().requires_grad_()
    weight = torch.randn_like(x)
    (gate.output(alpha * skip) * weight).sum().backward()
    open_skip = (alpha * x).requires_grad_()
    (gate.output(open_skip) * weight).sum().backward()
    torch.testing.assert_close(skip.grad, alpha * open_skip.grad, rtol=1e-12, atol=0)
    closed = AttentionGate(5, 3, open_bias=-40.0).double().eval()
    x.requires_grad_()
    (closed(x, g) * weight).sum().backward()
    assert x.grad.abs().max() < 1e-12


def test_supervision_reaches_each_decoder_level() -> None:
    net = AttentionUNet(widths=(4, 8, 16, 8), num_classes=3)
    net.losses(torch.randn(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16)))["loss"].backward()
    assert len(net.head.heads) == 3
    assert all(head.weight.grad.abs().sum() > 0 for head in net.head.heads)
    assert len(AttentionUNet(widths=(4, 8, 16), deep_supervision=False).head.heads) == 1


def slow_dice(logits: Tensor, target: Tensor, smooth: float, ignore: int) -> float:
    samples, classes = logits.shape[:2]
    total = 0.0
    for n in range(samples):
        for k in range(classes):
            overlap = mass = 0.0
            for i in range(logits.shape[2]):
                for j in range(logits.shape[3]):
                    if int(target[n, i, j]) == ignore:
                        continue
                    p = float(logits[n, :, i, j].softmax(0)[k])
                    true = float(target[n, i, j] == k)
                    overlap, mass = overlap + p * true, mass + p + true
            total += 1 - (2 * overlap + smooth) / (mass + smooth)
    return total / (samples * classes)


def test_dice_equals_slow_reference_and_obeys_its_laws() -> None:
    logits, target = torch.randn(2, 3, 4, 5, dtype=torch.double), torch.randint(0, 3, (2, 4, 5))
    target[0, 0] = 255
    loss = SoftDiceLoss(smooth=0.1)
    assert abs(float(loss(logits, target)) - slow_dice(logits, target, 0.1, 255)) < 1e-12
    perfect = F.one_hot(target.clamp(max=2), 3).movedim(-1, 1).double() * 1e3
    assert float(SoftDiceLoss()(perfect, target)) < 1e-9
    assert float(SoftDiceLoss(over="batch")(perfect, target)) < 1e-9
    empty = torch.full((2, 4, 5), 255)
    logits.requires_grad_()
    ignored = SoftDiceLoss()(logits, empty)
    ignored.backward()
    assert float(ignored) == 0
    assert logits.grad.abs().max() == 0
    parts = SoftDiceLoss(reduction="none")(logits, target)
    torch.testing.assert_close(parts.sum(), SoftDiceLoss(reduction="sum")(logits, target))


def test_release_dice_goes_below_zero_where_a_class_is_absent() -> None:
    """Why the smooth term stands outside the factor two here."""
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    logits = torch.zeros(1, 2, 8, 8)
    logits[:, 0] = 40.0
    assert float(release_dice(logits, target)) < -0.4
    assert 0 <= float(SoftDiceLoss()(logits, target)) < 1e-6


def test_unet_of_size_matches_parameters() -> None:
    net = AttentionUNet(num_classes=2)
    wanted = sum(p.numel() for p in net.parameters())
    plain = unet_of_size(wanted, num_classes=2)
    assert abs(sum(p.numel() for p in plain.parameters()) / wanted - 1) < 0.01


def test_cascade_crops_the_foreground() -> None:
    mask = torch.zeros(2, 16, 32, dtype=torch.bool)
    mask[0, 4:8, 8:16] = True
    centre, half = foreground_box(mask, 1.0)
    torch.testing.assert_close(centre, torch.tensor([[-0.25, -0.25], [0.0, 0.0]]))
    torch.testing.assert_close(half, torch.tensor([[0.25, 0.25], [1.0, 1.0]]))
    for ndim in (2, 3):
        net = TwoStageUNet(num_classes=2, in_channels=1, widths=(4, 8), ndim=ndim)
        x = torch.randn(2, 1, *[16] * ndim)
        assert net(x).shape == (2, 2, *[16] * ndim)
        losses = net.losses(x, torch.randint(0, 2, (2, *[16] * ndim)))
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in net.parameters())


def test_bad_arguments_name_the_value() -> None:
    with pytest.raises(ValueError, match="16"):
        AttentionUNet()(torch.zeros(1, 3, 15, 32))
    with pytest.raises(ValueError, match="1"):
        AttentionUNet(num_classes=1)
    with pytest.raises(ValueError, match="4"):
        AttentionUNet(ndim=4)
    with pytest.raises(ValueError, match="tanh"):
        AttentionGate(4, 4, normalisation="tanh")
    with pytest.raises(ValueError, match=r"\(2, 3"):
        AttentionGate(4, 3)(torch.zeros(2, 4, 8, 8), torch.zeros(2, 5, 4, 4))


def discs_among_distractors(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, size, size): one small disc to find among squares, rings and triangles as bright."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.randn(count, 1, size, size, generator=generator) * 0.3
    targets = torch.zeros(count, size, size, dtype=torch.long)
    for n in range(count):
        free = torch.ones(size, size, dtype=torch.bool)
        for kind in ("disc", "square", "ring", "triangle", "square", "ring", "triangle"):
            for _ in range(50):
                cx, cy = (int(v) for v in torch.randint(6, size - 6, (2,), generator=generator))
                r = int(torch.randint(3, 6, (1,), generator=generator))
                u, v = x - cx, y - cy
                shape = {
                    "disc": u**2 + v**2 <= r**2,
                    "ring": (u**2 + v**2 <= r**2) & (u**2 + v**2 > (r - 2) ** 2),
                    "square": (u.abs() <= r - 1) & (v.abs() <= r - 1),
                    "triangle": (v.abs() <= r - 1) & (u.abs() <= (v + r) / 2),
                }[kind]
                if free[shape].all():
                    break
            else:
                continue
            free &= (u.abs() > r + 1) | (v.abs() > r + 1)
            images[n, 0][shape] += 2.0
            if kind == "disc":
                targets[n][shape] = 1
    return images, targets


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_disc_among_distractors(capsys) -> None:
    """Dice of the disc for U-Net, U-Net of equal parameters, gated U-Net and two-stage cascade after the same 500
    steps.

    The cascade's two stages see half the side each, so its widths are sqrt 2 larger at about equal operations.
    """
    draw = torch.Generator().manual_seed(0)
    images, targets = discs_among_distractors(256, 64, draw)
    unseen, truth = discs_among_distractors(64, 64, draw)
    widths, options = (8, 16, 32, 32), {"num_classes": 2, "in_channels": 1}
    gated_size = sum(p.numel() for p in AttentionUNet(widths=widths, **options).parameters())
    makers = {
        "unet": lambda: UNet(widths=widths, **options),
        "unet_of_size": lambda: unet_of_size(gated_size, widths=widths, **options),
        "attention_unet": lambda: AttentionUNet(widths=widths, **options),
        "two_stage": lambda: TwoStageUNet(widths=tuple(round(w * 2**0.5) for w in widths), **options),
    }
    scores = {}
    for name, make in makers.items():
        dices = []
        for seed in range(3):
            torch.manual_seed(seed)
            net = make()
            optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
            order = torch.Generator().manual_seed(seed)
            for _ in range(500):
                pick = torch.randint(0, len(images), (8,), generator=order)
                optimiser.zero_grad()
                sum(net.losses(images[pick], targets[pick]).values()).backward()
                optimiser.step()
            net.eval()
            with torch.no_grad():
                found = net(unseen).argmax(1) == 1
            dices.append(float(2 * (found & (truth == 1)).sum() / (found.sum() + (truth == 1).sum())))
        scores[name] = dices
    with capsys.disabled():
        print("\nDice of the disc:", {k: [round(d, 3) for d in v] for k, v in scores.items()})
    assert all(min(v) > 0.3 for v in scores.values()), scores


def test_resize_returns_the_tensor_itself() -> None:
    x = torch.randn(1, 2, 4, 4)
    assert resize(x, (4, 4)) is x
