"""Global context and non-local blocks: loop references, the authors' modules on copied weights, special cases."""

from __future__ import annotations

import math

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from torchive.methods.blocks.gcnet import (
    GlobalContext,
    NonLocal,
    SimplifiedNonLocal,
    cosine_distance,
    js_distance,
    query_dependence,
)
from torchive.methods.blocks.gcnet.pooling import attention_pool

REPOSITORY, COMMIT = "xvjiarui/GCNet", "029db5407dc27147eb1d41f62b09dfed8ec88837"


def shake(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """Weights away from their start, where the last layer is zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=scale)
    return module


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def transformed(layers: nn.Sequential, context: list[float]) -> list[float]:
    """The transform, number by number."""
    values = context
    for layer in layers:
        if isinstance(layer, nn.Linear):
            bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
            rows = layer.weight.tolist()
            values = [
                sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in zip(rows, bias, strict=True)
            ]
        elif isinstance(layer, nn.LayerNorm):
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + layer.eps)
            affine = zip(values, layer.weight.tolist(), layer.bias.tolist(), strict=True)
            values = [(v - mean) / deviation * g + b for v, g, b in affine]
        else:
            values = [max(v, 0.0) for v in values]
    return values


def reference(block: GlobalContext, x: Tensor) -> Tensor:
    """The block from the formulas, sample by sample; x is (N, C, H, W)."""
    y = torch.zeros_like(x)
    for n in range(len(x)):
        columns = x[n].flatten(1).T.tolist()  # L lists of C numbers
        if block.query is None:
            a = [1 / len(columns)] * len(columns)
        else:
            query = block.query.tolist()
            a = softmax([sum(q * v for q, v in zip(query, column, strict=True)) for column in columns])
        context = [sum(w * column[c] for w, column in zip(a, columns, strict=True)) for c in range(x.shape[1])]
        gate = [1.0] * x.shape[1]
        if block.scale is not None:
            gate = [1 / (1 + math.exp(-t)) for t in transformed(block.scale, context)]
        shift = [0.0] * x.shape[1] if block.add is None else transformed(block.add, context)
        for c in range(x.shape[1]):
            y[n, c] = x[n, c] * gate[c] + shift[c]
    return y


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", ["attention", "average"])
@pytest.mark.parametrize("fusion", ["add", "scale", "both"])
@pytest.mark.parametrize("transform", ["bottleneck", "linear"])
def test_equals_the_loop_reference(double, record, pool, fusion, transform, layout):
    block = shake(GlobalContext(6, reduction=2, pool=pool, fusion=fusion, transform=transform))
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=layout)
    with torch.no_grad():
        difference = (block(x) - reference(block, x)).abs().max().item()
    assert difference < 1e-13
    assert (block(x) - reference(block, x)).abs().max() < 1e-13  # and with the gradient's own pooling
    if (pool, fusion, transform, layout) == ("attention", "both", "bottleneck", torch.contiguous_format):
        record("gcnet", "referenced", largest_difference=difference, dtype="float64")


@pytest.mark.parametrize("kind", ["embedded_gaussian", "gaussian", "dot", "concat"])
def test_non_local_equals_the_loop_reference(double, kind):
    block = shake(NonLocal(4, kind=kind))
    x = torch.randn(2, 4, 2, 3)
    expected = torch.zeros(2, 4, 6)
    maps = torch.zeros(2, 6, 6)
    for n in range(2):
        columns = x[n].flatten(1).T  # (L, C)

        def embed(layer: nn.Conv2d | None, columns: Tensor = columns) -> Tensor:
            return columns if layer is None else columns @ layer.weight[:, :, 0, 0].T + layer.bias

        theta, phi, g = embed(block.theta), embed(block.phi), embed(block.g)
        for i in range(6):
            f = []
            for j in range(6):
                if kind == "concat":
                    product = (block.pair.flatten() * torch.cat([theta[i], phi[j]])).sum().item()
                    f.append(max(product, 0.0) / 6)
                else:
                    f.append((theta[i] * phi[j]).sum().item())
            if kind == "dot":
                f = [v / 6 for v in f]
            elif "gaussian" in kind:
                f = softmax(f)
            maps[n, i] = torch.tensor(f)
            context = sum(f[j] * g[j] for j in range(6))
            expected[n, :, i] = x[n].flatten(1)[:, i] + block.out.weight[:, :, 0, 0] @ context + block.out.bias
    assert (block(x) - expected.view_as(x)).abs().max() < 1e-13
    assert (block.attention(x) - maps).abs().max() < 1e-13


def copied(stored: dict[str, Tensor], case: str) -> nn.Module:
    """Our module with the authors' weights."""
    weight = {k.removeprefix(f"{case}."): v for k, v in stored.items() if k.startswith(f"{case}.")}
    if case.startswith("nl."):
        kind = case.removeprefix("nl.")
        scale = 4**0.5 if kind == "embedded_gaussian" else 1.0  # the release multiplies where it means to divide
        block: nn.Module = NonLocal(8, kind=kind, reduction=1 if kind == "gaussian" else 2, scale=scale)
        state = {k.replace(".conv.", ".").replace("conv_out", "out"): v for k, v in weight.items()}
        if kind == "concat":
            state["pair"] = state.pop("concat_project.weight").view(2, -1)
    else:
        pool, fusion = case.split(".")
        block = GlobalContext(
            8,
            reduction=4,
            pool={"att": "attention", "avg": "average"}[pool],
            fusion={"add": "add", "mul": "scale", "both": "both"}[fusion],
        )
        names = {"channel_add_conv": "add", "channel_mul_conv": "scale"}
        state = {f"{names[k.split('.')[0]]}.{k.split('.', 1)[1]}": v.flatten(1) if v.ndim == 4 else v.flatten()
                 for k, v in weight.items() if not k.startswith("conv_mask")}  # fmt: skip
        if pool == "att":
            state["query"] = weight["conv_mask.weight"].flatten()
    block.load_state_dict(state)
    return block


def test_matches_the_authors_modules(double, record, parity):
    """Output, gradient, and the output after one optimiser step, relative to the largest value; nine settings."""
    stored = parity("gcnet")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    cases = [k.removesuffix(":y") for k in stored if k.endswith(":y")]
    assert len(cases) == 9
    for case in cases:
        block = copied(stored, case)
        x = stored[f"{case}:x"].clone().requires_grad_()
        optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
        y = block(x)
        y.backward(stored[f"{case}:g"])
        optimiser.step()
        found = {"output": (y, "y"), "gradient": (x.grad, "dx"), "optimiser_step": (block(x), "next")}
        for key, (value, name) in found.items():
            expected = stored[f"{case}:{name}"]
            worst[key] = max(worst[key], ((value - expected).abs().max() / expected.abs().max()).item())
    assert max(worst.values()) < 1e-12
    record(
        "gcnet",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        cases=9,
        **worst,
    )


@pytest.mark.parametrize(("add", "scale"), [(True, False), (False, True), (True, True)])
def test_equals_timm_where_the_settings_agree(double, add, scale):
    theirs = shake(timm.layers.GlobalContext(8, fuse_add=add, fuse_scale=scale, rd_ratio=1 / 4))
    ours = GlobalContext(8, reduction=4, fusion="both" if add and scale else "add" if add else "scale")
    ours.query.data = theirs.conv_attn.weight.detach().flatten()
    for mine, other in ((ours.add, theirs.mlp_add), (ours.scale, theirs.mlp_scale)):
        if mine is None:
            continue
        mine[1].eps = other.norm.eps
        for layer, name in ((mine[0], "fc1"), (mine[1], "norm"), (mine[3], "fc2")):
            given = getattr(other, name)
            layer.weight.data, layer.bias.data = given.weight.detach().view_as(layer.weight), given.bias.detach()
    x = torch.randn(2, 8, 5, 3)
    assert (ours(x) - theirs(x)).abs().max() < 1e-13


@pytest.mark.parametrize("block", [GlobalContext(32), SimplifiedNonLocal(8), *(NonLocal(8, kind=k) for k in
    ("embedded_gaussian", "gaussian", "dot", "concat"))])  # fmt: skip
def test_a_new_block_changes_nothing(block):
    x = torch.randn(2, block.channels, 6, 5)
    assert torch.equal(block(x), x)


def test_a_new_scaling_block_halves():
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(GlobalContext(32, fusion="scale")(x), x / 2)


@pytest.mark.parametrize("axes", ["joint", "spatial_then_temporal", "temporal"])
def test_weights_sum_to_one_and_give_the_context(double, axes):
    block = GlobalContext(6, reduction=2, axes=axes)
    x = torch.randn(2, 6, 4, 3, 5)
    a = block.attention(x)
    assert a.shape == (2, 4, 3, 5)
    assert (a.flatten(1).sum(1) - 1).abs().max() < 1e-14
    expected = (x * a.unsqueeze(1)).flatten(2).sum(2)
    assert (block.context(x) - expected).abs().max() < 1e-14
    if axes == "temporal":  # equal inside a frame
        assert (a - a.mean((2, 3), keepdim=True)).abs().max() < 1e-16


def test_spatial_then_temporal_by_hand(double):
    block = GlobalContext(2, axes="spatial_then_temporal")
    x = torch.randn(1, 2, 3, 1, 4)
    frames = []
    for t in range(3):
        a = softmax([(block.query @ x[0, :, t, 0, j]).item() for j in range(4)])
        frames.append(sum(a[j] * x[0, :, t, 0, j] for j in range(4)))
    b = softmax([(block.frame_query @ f).item() for f in frames])
    assert (block.context(x)[0] - sum(w * f for w, f in zip(b, frames, strict=True))).abs().max() < 1e-14


def test_no_form_knows_the_order_of_frames(double):
    """Reversing a clip leaves the context: what the note asks about time cannot come from these soft-maxes."""
    x = torch.randn(2, 4, 5, 3, 3)
    for axes in ("joint", "spatial_then_temporal", "temporal"):
        block = GlobalContext(4, axes=axes)
        assert (block.context(x) - block.context(x.flip(2))).abs().max() < 1e-14


def test_query_independent_non_local_is_the_simplified_block(double):
    """theta = 0 and a bias: one map for all queries, so one context everywhere, that of the simplified block."""
    full, simple = shake(NonLocal(4, reduction=1)), SimplifiedNonLocal(4)
    full.theta.weight.data.zero_()
    full.phi.bias.data.zero_()
    full.g.bias.data.zero_()
    full.out.bias.data.zero_()
    simple.query.data = full.phi.weight.detach()[:, :, 0, 0].T @ full.theta.bias.detach()
    simple.add[0].weight.data = full.out.weight.detach()[:, :, 0, 0] @ full.g.weight.detach()[:, :, 0, 0]
    x = torch.randn(2, 4, 3, 5)
    maps = full.attention(x)
    assert (maps - maps[:, :1]).abs().max() < 1e-15
    assert (maps[:, 0] - simple.attention(x).flatten(1)).abs().max() < 1e-14
    added = full(x) - x
    assert (added - added.mean((2, 3), keepdim=True)).abs().max() < 1e-13
    assert (full(x) - simple(x)).abs().max() < 1e-13
    distances = query_dependence(full, x)
    assert distances["attention"].abs().max() < 1e-13
    assert distances["attention_js"].abs().max() < 1e-13
    assert distances["output"].abs().max() < 1e-13
    assert distances["input"].min() > 0.1


def test_average_and_scale_without_norm_is_squeeze_and_excitation(double):
    ours = shake(GlobalContext.named("squeeze_excitation", 8, reduction=4))
    theirs = timm.layers.SEModule(8, rd_channels=2)
    for mine, other in ((ours.scale[0], theirs.fc1), (ours.scale[2], theirs.fc2)):
        other.weight.data, other.bias.data = mine.weight.detach()[..., None, None], mine.bias.detach()
    x = torch.randn(2, 8, 5, 3)
    assert (ours(x) - theirs(x)).abs().max() < 1e-14


def test_named_cases_and_cost():
    block = GlobalContext.named("global_context", 64)
    weights = sum(p.numel() for n, p in block.named_parameters() if p.ndim == 2 or n == "query")
    assert weights == 64 + 2 * 64**2 // 16
    simple, named = SimplifiedNonLocal(8), GlobalContext.named("simplified_non_local", 8)
    assert {k: v.shape for k, v in simple.state_dict().items()} == {k: v.shape for k, v in named.state_dict().items()}
    with pytest.raises(ValueError, match="nothing"):
        GlobalContext.named("nothing", 8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_gradient(double, layout):
    x = torch.randn(2, 3, 2, 4).contiguous(memory_format=layout).requires_grad_()
    query = torch.randn(3, requires_grad=True)
    assert torch.autograd.gradcheck(attention_pool, (x, query))
    attention_pool(x, query).sum().backward()
    assert x.grad.is_contiguous(memory_format=layout)


def test_tokens_clips_and_half_precision():
    block = shake(GlobalContext(8, reduction=2, channel_dim=-1))
    x = torch.randn(2, 12, 8)
    twin = GlobalContext(8, reduction=2)
    twin.load_state_dict(block.state_dict())
    assert torch.allclose(block(x), twin(x.transpose(1, 2).view(2, 8, 3, 4)).flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.allclose(twin(x.transpose(1, 2).view(2, 8, 2, 3, 2)).flatten(2).transpose(1, 2), block(x), atol=1e-6)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = twin(x)
        y.float().sum().backward()
    assert torch.allclose(y.float(), twin(x), atol=0.1)
    assert x.grad.dtype == torch.float32


def test_distances_by_pairs(double):
    maps = torch.rand(2, 5, 7).softmax(-1)
    cosine, divergence = torch.zeros(2), torch.zeros(2)
    for n in range(2):
        for i in range(5):
            for j in range(5):
                p, q = maps[n, i], maps[n, j]
                cosine[n] += (1 - (p @ q) / (p.norm() * q.norm())) / 2 / 25
                middle = (p + q) / 2
                divergence[n] += ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2 / 25
    assert (cosine_distance(maps) - cosine).abs().max() < 1e-14
    assert (js_distance(maps, chunk=2) - divergence).abs().max() < 1e-14
    one_hot = torch.eye(4)[None]
    assert torch.allclose(js_distance(one_hot), torch.tensor([math.log(2) * 12 / 16]))
    with pytest.raises(ValueError, match="-1"):
        js_distance(-one_hot)
    with pytest.raises(ValueError, match="one map"):
        query_dependence(GlobalContext(4), torch.randn(1, 4, 3, 3))
    assert "attention_js" not in query_dependence(shake(NonLocal(4, kind="dot")), torch.randn(1, 4, 3, 3))


def test_bad_arguments_are_named():
    for options in ({"pool": "max"}, {"fusion": "mul"}, {"axes": "space"}, {"transform": "none"}, {"channel_dim": 2}):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            GlobalContext(8, **options)
    with pytest.raises(ValueError, match="0"):
        GlobalContext(8, reduction=0)
    with pytest.raises(ValueError, match="T, H, W"):
        GlobalContext(4, axes="temporal")(torch.randn(1, 4, 3, 3))
    with pytest.raises(ValueError, match="sum"):
        NonLocal(8, kind="sum")


def _majority(seed: int, count: int = 128) -> tuple[Tensor, Tensor]:
    """Images of scattered single pixels of two kinds; the class is the kind that occurs more often."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.rand(count, 16, 16, generator=draw)
    share = torch.where(torch.rand(count, generator=draw) < 0.5, 0.12, 0.28).view(-1, 1, 1)
    images = torch.stack([(kinds < share), (kinds > 0.8)], 1).float()
    labels = (images[:, 0].sum((1, 2)) > images[:, 1].sum((1, 2))).long()
    return images, labels


@pytest.mark.slow
def test_a_task_that_needs_the_whole_image():
    """One corner pixel decides, so only a block that carries the whole image there can tell the majority."""
    scores = {}
    parts = {
        "none": lambda: nn.Identity(),
        "global_context": lambda: GlobalContext(16, reduction=2),
        "squeeze_excitation": lambda: GlobalContext.named("squeeze_excitation", 16, reduction=2),
        "non_local": lambda: NonLocal(16),
        "simplified_non_local": lambda: SimplifiedNonLocal(16),
    }
    for name, part in parts.items():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), part(), nn.Conv2d(16, 16, 1), nn.ReLU())
        head = nn.Linear(16, 2)
        optimiser = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
        for step in range(200):
            images, labels = _majority(step, 64)
            loss = nn.functional.cross_entropy(head(body(images)[:, :, 0, 0]), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        images, labels = _majority(10**6, 1000)
        with torch.no_grad():
            scores[name] = (head(body(images)[:, :, 0, 0]).argmax(1) == labels).float().mean().item()
    assert scores["none"] < 0.7
    assert min(scores[name] for name in ("global_context", "simplified_non_local", "non_local")) > 0.85, scores
