"""The EM attention unit: a loop reference, the authors' unit on copied weights, its special cases and laws."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import torchive
from torchive.methods.blocks.emanet import EMAttentionUnit, expectation, log_likelihood, maximisation
from torchive.methods.blocks.gcnet import NonLocal

REPOSITORY, COMMIT = "XiaLiPKU/EMANet", "f09ffac3a2294881b353b43300f1295065a398a8"


def shaken(channels: int = 6, **options: object) -> EMAttentionUnit:
    """A unit whose weights, norm and statistics are all away from their start."""
    unit = EMAttentionUnit(channels, **{"bases": 4, **options})
    for parameter in unit.parameters():
        nn.init.normal_(parameter)
    unit.norm.running_mean.normal_()
    unit.norm.running_var.uniform_(0.5, 2.0)
    return unit.eval()


def reference(unit: EMAttentionUnit, x: Tensor) -> tuple[Tensor, list[list[list[float]]]]:
    """The output in eval mode and the bases, number by number; x is (N, C, H, W)."""
    batch, channels, height, width = x.shape
    y, all_bases = torch.zeros_like(x), []
    w1, b1 = unit.reduce.weight[:, :, 0, 0].tolist(), unit.reduce.bias.tolist()
    w2, norm = unit.restore.weight[:, :, 0, 0].tolist(), unit.norm
    for n in range(batch):
        own = [[x[n, c, i, j].item() for c in range(channels)] for i in range(height) for j in range(width)]
        inner = [[sum(a * b for a, b in zip(r, p, strict=True)) + o for r, o in zip(w1, b1, strict=True)] for p in own]
        bases = unit.mu[0].T.tolist()  # K lists of C numbers
        for _ in range(unit.iterations):
            z = []
            for p in inner:
                powers = [math.exp(sum(a * b for a, b in zip(p, m, strict=True)) / unit.temperature) for m in bases]
                z.append([v / sum(powers) for v in powers])
            for k in range(len(bases)):
                total = 1e-6 + sum(row[k] for row in z)
                mean = [sum(row[k] * p[c] for row, p in zip(z, inner, strict=True)) / total for c in range(channels)]
                length = 1e-6 + math.sqrt(sum(v * v for v in mean))
                bases[k] = [v / length for v in mean]
        all_bases.append(bases)
        for place, row in enumerate(z):
            rebuilt = [max(sum(row[k] * bases[k][c] for k in range(len(bases))), 0.0) for c in range(channels)]
            for c in range(channels):
                value = sum(a * b for a, b in zip(w2[c], rebuilt, strict=True))
                deviation = math.sqrt(norm.running_var[c].item() + norm.eps)
                value = (value - norm.running_mean[c].item()) / deviation * norm.weight[c].item() + norm.bias[c].item()
                y[n, c, place // width, place % width] = max(own[place][c] + value, 0.0)
    return y, all_bases


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("iterations", "temperature"), [(1, 1.0), (3, 1.0), (3, 0.5)])
@pytest.mark.parametrize("differentiable", [False, True])
def test_equals_the_loop_reference(double, record, iterations, temperature, layout, differentiable):
    unit = shaken(iterations=iterations, temperature=temperature, differentiable=differentiable)
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=layout)
    expected, bases = reference(unit, x)
    difference = (unit(x) - expected).abs().max().item()
    assert difference < 1e-13
    assert (unit.fitted_bases(x).mT - torch.tensor(bases)).abs().max() < 1e-13
    if (iterations, layout, differentiable, temperature) == (3, torch.contiguous_format, False, 1.0):
        record("emanet", "referenced", largest_difference=difference, dtype="float64")


def test_matches_the_authors_unit(double, record, parity):
    """Output in training and evaluation, bases, gradients, the moved buffer, and the output after one SGD step."""
    stored = parity("emanet")
    names = {"conv1.": "reduce.", "conv2.0.": "restore.", "conv2.1.": "norm."}
    worst = {"output": 0.0, "gradient": 0.0, "buffer": 0.0, "optimiser_step": 0.0}
    for case, iterations in (("a", 3), ("b", 1), ("c", 5)):
        given = {k.removeprefix(f"{case}:"): v for k, v in stored.items() if k.startswith(f"{case}:")}
        weight = {k.removeprefix(f"{case}."): v for k, v in stored.items() if k.startswith(f"{case}.")}
        state = {next((k.replace(a, b) for a, b in names.items() if k.startswith(a)), k): v for k, v in weight.items()}
        _, channels, bases = state["mu"].shape
        unit = EMAttentionUnit(channels, bases=bases, iterations=iterations)
        unit.load_state_dict({**state, "norm.num_batches_tracked": torch.tensor(0)})
        x = given["x"].clone().requires_grad_()
        pairs = {"output": [(unit.eval()(x), given["eval"]), (unit.fitted_bases(x), given["bases"])]}
        y = unit.train()(x)
        y.backward(given["g"])
        pairs["output"].append((y, given["y"]))
        pairs["gradient"] = [(x.grad, given["dx"]), (unit.restore.weight.grad.clone(), given["dw"])]
        pairs["buffer"] = [(unit.mu.clone(), given["mu"])]
        assert unit.reduce.weight.grad is None
        torch.optim.SGD([p for p in unit.parameters() if p.requires_grad], lr=0.1).step()
        pairs["optimiser_step"] = [(unit(x), given["next"])]
        for key, found in pairs.items():
            worst[key] = max(worst[key], *((a - b).abs().max().item() for a, b in found))
    assert max(worst.values()) < 1e-12
    record(
        "emanet",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=3,
        **worst,
    )


def test_gradients_pass_through_the_iterations_only_where_asked(double):
    x = torch.randn(2, 6, 3, 4, requires_grad=True)
    frozen, trained = shaken(act=nn.Identity), shaken(act=nn.Identity, differentiable=True)
    grad = torch.randn(2, 6, 3, 4)
    (slope,) = torch.autograd.grad(frozen(x), x, grad)
    assert torch.equal(slope, grad)  # the identity alone
    assert not any(p.requires_grad for p in frozen.reduce.parameters())
    (slope,) = torch.autograd.grad(trained(x), x, grad)
    assert not torch.allclose(slope, grad)
    assert torch.autograd.gradcheck(trained, (x,))
    trained.train()(x).sum().backward()  # the buffer moves before the backward pass
    assert trained.reduce.weight.grad.abs().max() > 0


def test_weights_and_lengths(double):
    unit = shaken(bases=5)
    x = torch.randn(3, 6, 4, 7)
    z = unit.responsibilities(x)
    assert z.shape == (3, 5, 4, 7)
    assert (z.sum(1) - 1).abs().max() < 1e-14
    assert (unit.fitted_bases(x).norm(dim=1) - 1).abs().max() < 1e-5
    flat = z.flatten(2).mT
    assert ((flat / (1e-6 + flat.sum(1, keepdim=True))).sum(1) - 1).abs().max() < 1e-5


def test_the_rebuilt_features_have_the_rank_of_the_bases(double):
    unit = shaken(12, bases=3)
    x = torch.randn(2, 12, 5, 6)
    rebuilt = unit.fitted_bases(x) @ unit.responsibilities(x).flatten(2)  # (N, C, L)
    values = torch.linalg.svdvals(rebuilt)
    assert (values[:, 3:] < 1e-12 * values[:, :1]).all()
    assert (values[:, 2] > 1e-6 * values[:, 0]).all()


def test_order_of_pixels_and_of_bases(double):
    unit = shaken()
    x = torch.randn(2, 6, 4, 5)
    order = torch.randperm(20)
    moved = unit(x.flatten(2)[:, :, order].unflatten(2, (4, 5)))
    assert (moved.flatten(2) - unit(x).flatten(2)[:, :, order]).abs().max() < 1e-13
    before = unit(x)
    unit.mu.copy_(unit.mu[:, :, [2, 0, 3, 1]])
    assert (unit(x) - before).abs().max() < 1e-13


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_likelihood_never_falls(double, temperature):
    """With bases of length one the steps are exact EM (von Mises-Fisher), on any data."""
    for scale in (0.5, 3.0):
        x = torch.randn(8, 5, 30) * scale
        mu = nn.functional.normalize(torch.randn(8, 5, 4), dim=1)
        before = log_likelihood(x, mu, temperature)
        for _ in range(12):
            mu = maximisation(x, expectation(x, mu, temperature))
            after = log_likelihood(x, mu, temperature)
            assert (after >= before - 1e-4 * before.abs()).all()  # lengths are 1 - 1e-6 / |mean|
            before = after


def test_clusters_are_found_without_labels():
    """Three directions with noise: after the steps each basis points along one of them."""
    centres = nn.functional.normalize(torch.randn(8, 3), dim=0)
    member = torch.arange(90) % 3
    x = (6 * centres[:, member] + 0.3 * torch.randn(8, 90))[None]
    mu = nn.functional.normalize(centres + 0.4 * torch.randn(8, 3), dim=0)[None]
    for _ in range(10):
        z = expectation(x, mu)
        mu = maximisation(x, z)
    assert ((mu[0] * centres).sum(0) > 0.99).all()
    assert (z[0].argmax(1) == member).all()


def test_the_buffer_moves_in_training_alone():
    unit = EMAttentionUnit(6, bases=4)
    x, start = torch.randn(3, 6, 5, 5), unit.mu.clone()
    unit.eval()(x)
    assert torch.equal(unit.mu, start)
    expected = 0.9 * start + 0.1 * unit.fitted_bases(x).mean(0, keepdim=True)
    unit.train()(x)
    assert torch.allclose(unit.mu, expected, atol=1e-6)
    assert unit.mu.norm(dim=1).max() < 1  # the release does not bring it back to length one either
    kept = unit.mu.clone()
    unit(torch.zeros(0, 6, 5, 5))
    assert torch.equal(unit.mu, kept)


def _distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    unit, images = EMAttentionUnit(6, bases=4), torch.randn(4, 6, 3, 3)
    whole = 0.9 * unit.mu + 0.1 * unit.fitted_bases(images).mean(0, keepdim=True)
    unit.train()(images[2 * rank : 2 * rank + 2])
    assert torch.allclose(unit.mu, whole, atol=1e-6)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_the_same_bases(tmp_path: Path):
    mp.spawn(_distributed, args=(str(tmp_path),), nprocs=2)


@pytest.mark.parametrize(
    ("name", "place"),
    [("resnet18", "layer4"), ("densenet121", "features"), ("regnetx_002", "s4"), ("vgg11", "features")],
)
def test_one_unit_at_the_end_of_known_networks(name, place):
    """DenseNet has modules called denselayer4, which are no stages."""
    with torch.device("meta"):
        network = timm.create_model(name)
    assert [change.name for change in torchive.convert(network, "emanet").changes] == [place]


def test_memory_grows_with_the_positions_and_not_with_their_square():
    """Numbers kept for the backward pass, against the non-local block."""
    kept: dict[str, list[int]] = {"em": [], "non_local": []}
    for side in (16, 32):
        for name, block in (("em", EMAttentionUnit(8, bases=16)), ("non_local", NonLocal(8))):
            sizes: dict[int, int] = {}

            def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                block(torch.randn(1, 8, side, side, requires_grad=True))
            kept[name].append(sum(sizes.values()))
    assert kept["em"][1] < 4.1 * kept["em"][0]  # four times the positions
    assert kept["non_local"][1] > 12 * kept["non_local"][0]


def test_converted_units_start_as_the_identity():
    x = torch.randn(2, 8, 5, 6)
    unit = EMAttentionUnit.from_channels(8, bases=4)
    assert torch.equal(unit(x), x)
    unit(x).square().sum().backward()
    assert unit.norm.weight.grad.abs().max() > 0
    assert torch.equal(EMAttentionUnit(8, start="identity")(x), x.relu())


def test_tokens_lines_clips_and_half_precision():
    maps = shaken()
    tokens = shaken(channel_dim=-1)
    tokens.load_state_dict(maps.state_dict())
    x = torch.randn(2, 6, 4, 3)
    expected = maps(x).flatten(2)
    assert torch.allclose(maps(x.flatten(2)), expected, atol=1e-5)
    assert torch.allclose(maps(x.unflatten(2, (2, 2))).flatten(2), expected, atol=1e-5)
    assert torch.allclose(tokens(x.flatten(2).mT).mT, expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = maps.train()(x.requires_grad_())
        y.float().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert maps.mu.dtype == torch.float32


def test_bad_arguments_are_named():
    wrong = {"bases": 0, "iterations": 0, "momentum": 1.5, "temperature": -2.0, "start": "zero", "channel_dim": 2}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=str(value)):
            EMAttentionUnit(4, **{name: value})
    with pytest.raises(ValueError, match="Identity"):
        EMAttentionUnit(4, norm=nn.Identity, start="identity")
    with pytest.raises(ValueError, match="4 channels"):
        EMAttentionUnit(4)(torch.randn(1, 5, 3, 3))
