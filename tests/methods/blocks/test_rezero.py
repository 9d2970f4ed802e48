"""ReZero: a loop reference, the authors' Transformer layers, the start, folding, the Jacobian, and depth."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from torchive import convert
from torchive.engine.build import build_optimizer
from torchive.engine.recipe import load_recipe
from torchive.methods.blocks.rezero import (
    ReZero,
    ReZeroDecoderLayer,
    ReZeroEncoderLayer,
    ReZeroMLP,
    fold,
    jacobian_singular_values,
    mean_squared_singular_value,
    residual_weights,
)
from torchive.nn import ResidualNetwork

REPOSITORY, COMMIT = "majumderb/rezero", "e2c94a825c5564217e8cf4d75a28d59cab1d7029"


def linear(weight: list[list[float]], bias: list[float], x: list[float]) -> list[float]:
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def reference(layer: ReZeroEncoderLayer, x: Tensor, hidden: set[tuple[int, int]]) -> Tensor:
    """An encoder layer number by number; ``hidden`` holds (sample, key) that no query may see. x is (L, N, C)."""
    length, batch, channels = x.shape
    heads = layer.self_attn.num_heads
    width = channels // heads
    w = {name: value.tolist() for name, value in layer.state_dict().items()}
    alpha, y = w["alpha"][0], torch.zeros_like(x)
    for n in range(batch):
        rows = x[:, n].tolist()
        qkv = [linear(w["self_attn.in_proj_weight"], w["self_attn.in_proj_bias"], row) for row in rows]
        for i in range(length):
            joined: list[float] = []
            for h in range(heads):
                at = range(h * width, (h + 1) * width)
                seen = [j for j in range(length) if j <= i and (n, j) not in hidden]
                scores = {j: sum(qkv[i][c] * qkv[j][channels + c] for c in at) / math.sqrt(width) for j in seen}
                total = sum(math.exp(s) for s in scores.values())
                joined += [sum(math.exp(scores[j]) / total * qkv[j][2 * channels + c] for j in seen) for c in at]
            f = linear(w["self_attn.out_proj.weight"], w["self_attn.out_proj.bias"], joined)
            middle = [a + alpha * b for a, b in zip(rows[i], f, strict=True)]
            inner = [max(v, 0.0) for v in linear(w["linear1.weight"], w["linear1.bias"], middle)]
            f = linear(w["linear2.weight"], w["linear2.bias"], inner)
            y[i, n] = torch.tensor([a + alpha * b for a, b in zip(middle, f, strict=True)])
    return y


def shaken(layer: nn.Module, alpha: float = 0.7) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    for gate in layer.modules():
        if hasattr(gate, "alpha"):
            nn.init.constant_(gate.alpha, alpha)
    return layer


def test_equals_the_loop_reference(double, record):
    layer = shaken(ReZeroEncoderLayer(6, num_heads=2, hidden=10)).eval()
    x = torch.randn(5, 3, 6)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 4] = padding[2, 2] = True
    mask = torch.triu(torch.full((5, 5), -torch.inf), 1)
    found = layer(x, src_mask=mask, src_key_padding_mask=padding)
    difference = (found - reference(layer, x, {(1, 4), (2, 2)})).abs().max().item()
    assert difference < 1e-13
    conv = nn.Conv2d(2, 2, 1)  # the wrapper, with a projection and ReLU behind the sum
    block = ReZero(conv, shortcut=nn.Conv2d(2, 2, 1, bias=False), act=nn.ReLU(), start=0.3)
    x = torch.randn(2, 2, 3, 4)
    w, b, side = conv.weight[:, :, 0, 0].tolist(), conv.bias.tolist(), block.shortcut.weight[:, :, 0, 0].tolist()
    for n in range(2):
        for i in range(12):
            v = x[n].flatten(1)[:, i].tolist()
            sums = [s + 0.3 * f for s, f in zip(linear(side, [0.0, 0.0], v), linear(w, b, v), strict=True)]
            gap = block(x)[n].flatten(1)[:, i] - torch.tensor([max(s, 0.0) for s in sums])
            difference = max(difference, gap.abs().max().item())
    assert difference < 1e-13
    record("rezero", "referenced", largest_difference=difference, dtype="float64")


def test_matches_the_authors_layers(double, record, parity):
    """Encoder and decoder layers with ReLU and GELU, masks and padding: output, gradients, one optimiser step."""
    stored = parity("rezero")
    worst = {"output": 0.0, "gradient": 0.0, "optimiser_step": 0.0}
    cases = [key.removesuffix(":y") for key in stored if key.endswith(":y")]
    assert len(cases) == 4
    for case in cases:
        given = {key.removeprefix(f"{case}:"): v for key, v in stored.items() if key.startswith(f"{case}:")}
        name, _, act = case.partition(".")
        cls = ReZeroEncoderLayer if name == "encoder" else ReZeroDecoderLayer
        layer = cls(8, num_heads=2, hidden=16, act=act).eval()
        state = {key.removeprefix("w."): v for key, v in given.items() if key.startswith("w.")}
        layer.load_state_dict({k.replace("resweight", "alpha"): v for k, v in state.items()})
        x, memory = given["x"].requires_grad_(), given["m"].requires_grad_() if "m" in given else None
        mask = torch.triu(torch.full((5, 5), -torch.inf), 1)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 4] = padding[2, 3] = padding[2, 4] = True

        def run(layer=layer, x=x, memory=memory, mask=mask, padding=padding) -> Tensor:
            return layer(x, mask, padding) if memory is None else layer(x, memory, tgt_mask=mask)

        y = run()
        y.backward(given["g"])
        gradients = [(x.grad, given["dx"])] + ([(memory.grad, given["dm"])] if memory is not None else [])
        named = dict(layer.named_parameters())
        for key, value in given.items():
            if key.startswith("d."):
                gradients.append((named[key[2:].replace("resweight", "alpha")].grad, value))
        torch.optim.SGD(layer.parameters(), lr=0.01).step()
        pairs = {"output": [(y, given["y"])], "gradient": gradients, "optimiser_step": [(run(), given["next"])]}
        for key, values in pairs.items():
            worst[key] = max(worst[key], *((a - b).abs().max().item() for a, b in values))
    assert max(worst.values()) < 1e-12
    figures = {"largest_difference": max(worst.values()), "cases": len(cases), **worst}
    record("rezero", "matched", repository=REPOSITORY, commit=COMMIT, **figures)


def test_the_start_is_the_identity_and_only_alpha_learns(double):
    branch = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    block, x = ReZero(branch), torch.randn(4, 6, requires_grad=True)
    y, grad = block(x), torch.randn(4, 6)
    assert torch.equal(y, x)
    y.backward(grad)
    assert torch.equal(x.grad, grad)
    assert all(not p.grad.any() for p in branch.parameters())
    assert (block.alpha.grad - (grad * branch(x)).sum()).abs() < 1e-12
    jacobian = torch.func.jacrev(block)(x[0:1]).reshape(6, 6)
    assert torch.equal(jacobian, torch.eye(6))


@pytest.mark.parametrize("build", [ReZeroEncoderLayer, ReZeroDecoderLayer])
def test_new_transformer_layers_are_the_identity(build):
    layer, x = build(8, num_heads=2, hidden=16), torch.randn(5, 3, 8)
    memory = () if build is ReZeroEncoderLayer else (torch.randn(4, 3, 8),)
    assert torch.equal(layer(x, *memory), x)  # in training, with dropout


def test_alpha_one_and_norms_are_pytorchs_layer(double):
    """With alpha = 1 and the norm after each sum put back, this is the post-norm encoder and decoder layer."""
    for old, new in (
        (nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True), ReZeroEncoderLayer),
        (nn.TransformerDecoderLayer(8, 2, 16, activation="gelu", batch_first=True), ReZeroDecoderLayer),
    ):
        layer = new.from_module(shaken(old).eval(), start=1.0)
        assert (layer.act, layer.drop.p, layer.self_attn.num_heads, layer.training) == ("gelu", 0.1, 2, False)
        norms = [norm for name, norm in old.named_children() if name.startswith("norm")]
        gated, taken = layer._gated, iter(norms)
        layer._gated = lambda x, f, part, gated=gated, taken=taken: next(taken)(gated(x, f, part))
        x, memory = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
        inputs = (x,) if new is ReZeroEncoderLayer else (x, memory)
        assert (layer(*inputs) - old(*inputs)).abs().max() < 1e-12


def test_stands_in_pytorchs_encoder():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    report = convert(layers, ReZeroEncoderLayer, replaces=nn.TransformerEncoderLayer)
    assert [change.name for change in report.changes] == ["layers.0", "layers.1", "layers.2"]
    layers.eval()
    with torch.no_grad():  # where PyTorch's own layer would take its fused form
        assert torch.equal(layers(x, src_key_padding_mask=padding), x)
        shaken(layers)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        full = layers(x, mask=causal, is_causal=True)
        assert torch.allclose(layers(x[:, :3], mask=causal[:3, :3], is_causal=True), full[:, :3], atol=1e-5)
    assert len(residual_weights(layers)) == 3
    assert len(ReZeroEncoderLayer(8, num_heads=2, share=False).alpha) == 2
    assert len(ReZeroDecoderLayer(8, num_heads=2, share=False).alpha) == 3


def unsettle(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if hasattr(module, "alpha"):
            nn.init.uniform_(module.alpha, -0.6, 0.9)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv3_small_100", "convnext_atto", "seresnet18", "vit_tiny_patch16_224"]
)
def test_alpha_folds_into_known_networks(name):
    options = {"img_size": 64} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, **options)
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)  # ConvNeXt's own, at 1e-6 nothing could be seen
    convert(model, "rezero")
    unsettle(model)
    x = torch.randn(2, 3, 64, 64)
    folded = fold(model, x)
    with torch.no_grad():
        expected = model.eval()(x)
        assert (folded(x) - expected).abs().max() < 2e-6 * max(1.0, expected.abs().max().item())
    left = [gate for gate in folded.modules() if isinstance(gate, ReZero)]
    assert len(left) == (8 if name == "seresnet18" else 0)  # a gated sum of products is not linear in a last layer


@pytest.mark.parametrize("channels", [None, 6])
def test_alpha_folds_where_it_may(double, channels):
    def gated(*layers: nn.Module) -> ReZero:
        return ReZero(nn.Sequential(*layers), channels=channels)

    model = nn.Sequential(
        gated(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6)),
        gated(nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 6, 1), nn.Identity()),
        gated(nn.Conv2d(6, 6, 1), nn.Sigmoid()),  # nothing linear at the end
        nn.Conv2d(6, 6, 1),
        ReZero.from_channels(6, per_channel=channels is not None),
    )
    unsettle(model)
    x = torch.randn(2, 6, 5, 4)
    folded = fold(model, x)
    assert (folded(x) - model.eval()(x)).abs().max() < 1e-12
    left = [i for i, gate in enumerate(folded) if isinstance(gate, ReZero) and not (gate.alpha == 1).all()]
    assert left == ([2] if channels is None else [1, 2])  # scaling rows of a transposed kernel is not scaling channels
    assert isinstance(folded[4], nn.Identity)
    assert not isinstance(model[4], nn.Identity)


def test_alpha_folds_into_transformer_layers(double):
    for share in (True, False):
        layer = shaken(ReZeroDecoderLayer(8, num_heads=2, hidden=16, share=share))
        nn.init.uniform_(layer.alpha, -1, 1)
        x, memory = torch.randn(5, 3, 8), torch.randn(4, 3, 8)
        folded = fold(layer, (x, memory))
        assert (folded.alpha == 1).all()
        assert (folded(x, memory) - layer.eval()(x, memory)).abs().max() < 1e-12


def test_a_dead_start_is_woken_and_a_live_one_kept():
    """With gamma = 0 and alpha = 0 neither would ever get a gradient; with alpha = 1 a network stays as it is."""
    x = torch.randn(4, 3, 32, 32)
    model = timm.create_model("resnet18", num_classes=4, zero_init_last=True)
    convert(model, "rezero")
    model(x).square().sum().backward()
    gates = [gate for gate in model.modules() if isinstance(gate, ReZero)]
    assert len(gates) == 8
    assert all(gate.alpha.grad.abs() > 0 for gate in gates)
    model = timm.create_model("resnet18", num_classes=4, zero_init_last=False)
    expected = model.eval()(x)
    report = convert(model, "rezero", start=1.0)
    assert torch.equal(model(x), expected)
    assert report.parameters[1] - report.parameters[0] == 8
    vector = timm.create_model("resnet18", num_classes=4)
    assert convert(vector, "rezero", "layer1", per_channel=True).parameters[1] > report.parameters[1]


def test_networks_without_values_take_gates():
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=4)
    assert len(convert(model, "rezero").changes) == 8
    assert all(p.is_meta for p in model.parameters())
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 4)


def test_alpha_has_no_weight_decay_and_its_own_rate():
    recipe = load_recipe("deep_residual")
    model = ResidualNetwork(8, in_channels=1)
    convert(model, "rezero", rate=0.1)
    optimizer = build_optimizer(recipe, model.parameters(), model)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    found = [groups[id(gate.alpha)] for gate in model.modules() if isinstance(gate, ReZero)]
    assert len(found) == 3
    assert all(g["weight_decay"] == 0 and abs(g["lr"] - 0.005) < 1e-9 for g in found)
    assert groups[id(model.head.weight)]["weight_decay"] > 0


def standard(layers: int, *, norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def started(module: nn.Module) -> nn.Module:
    """Layers with draws of their own; ``TransformerEncoder`` copies one."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return module


@pytest.mark.parametrize("layers", [4, 12, 64])
def test_jacobian_at_the_start(double, layers):
    """The paper's measurement: at any depth all singular values of ReZero are one; with norms they spread."""
    x = torch.randn(1, 6, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        own = [ReZeroEncoderLayer(8, num_heads=2, hidden=32, batch_first=True) for _ in range(layers)]
        rezero = nn.Sequential(*own)
        values = jacobian_singular_values(rezero, x)
        assert torch.equal(values, torch.ones(48))
        assert mean_squared_singular_value(rezero, x) == 1
        post = jacobian_singular_values(started(standard(layers, norm_first=False)), x)
        pre = jacobian_singular_values(started(standard(layers, norm_first=True)), x)
        smallest = {4: 0.5, 12: 0.1, 64: 1e-3}[layers]
        assert post[-9:].max() < smallest  # the post-norm layers lose directions, one for each token at once
        assert pre.max() / pre.median() > 1.5


def test_mean_squared_singular_value(double):
    """Of plain layers x + relu(W x + b) it doubles from layer to layer; of relu(W x + b) alone it stays one."""
    plain = [mean_squared_singular_value(ReZeroMLP(256, layers=6, start=1.0), torch.randn(1, 256)) for _ in range(5)]
    assert abs(sum(plain) / 5 / 2**6 - 1) < 0.15
    assert mean_squared_singular_value(ReZeroMLP(256, layers=6), torch.randn(1, 256)) == 1
    block, x = ReZeroMLP(32, layers=4, start=0.5), torch.randn(1, 32)
    exact = mean_squared_singular_value(block, x)
    guess = mean_squared_singular_value(block, x, probes=400, generator=torch.Generator().manual_seed(1))
    assert abs(guess / exact - 1) < 0.1
    matrix = torch.randn(5, 7)
    found = jacobian_singular_values(lambda v: v @ matrix.T, torch.randn(1, 7))
    assert torch.allclose(found, torch.linalg.svdvals(matrix))


def losses(model: nn.Module, steps: int) -> list[float]:
    """Fit a fixed random rotation with Adagrad, the paper's optimiser for its fully connected networks."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(128, 64, generator=g)
    target = x.roll(1, 1)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    found = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        found.append(loss.item())
        if not math.isfinite(found[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def test_two_hundred_layers_train_with_it_and_not_without():
    with_gates = losses(ReZeroMLP(64, layers=200), 30)
    assert with_gates[-1] < 0.8 * with_gates[0]
    assert not math.isfinite(losses(ReZeroMLP(64, layers=200, start=1.0), 30)[-1])  # 2^200 does not fit


def test_networks_for_small_images_have_the_papers_sizes():
    for layers, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)):
        with torch.device("meta"):
            model = ResidualNetwork(layers)
        count = sum(p.numel() for p in model.parameters())
        assert abs(count / 1e6 - millions) < 0.01, layers
    model = ResidualNetwork(14, norm=False, in_channels=1)
    x = torch.randn(2, 1, 15, 17)
    stem = model.stem(x)
    assert len(convert(model, "rezero").changes) == 6
    kept = stem[:, :, ::2, ::2][:, :, ::2, ::2].relu()  # at the start a network is its stem, its pooling and its head
    logits = model(x)
    assert torch.allclose(logits, model.head(nn.functional.pad(kept, (0, 0, 0, 0, 24, 24)).mean((2, 3))), atol=1e-6)
    with pytest.raises(ValueError, match="21"):
        ResidualNetwork(21)
    with pytest.raises(ValueError, match=r"\(32, 16, 8\)"):
        ResidualNetwork(20, widths=(32, 16, 8))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="0"):
        ReZero(nn.Identity(), channels=0)
    with pytest.raises(ValueError, match="2"):
        ReZero(nn.Identity(), channel_dim=2)
    with pytest.raises(ValueError, match=r"-0\.5"):
        ReZero(rate=-0.5)
    with pytest.raises(ValueError, match=r"4 channels.*\(2, 5, 3\)"):
        ReZero(channels=4)(torch.zeros(2, 5, 3))
    with pytest.raises(TypeError, match="int64"):
        ReZero()(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="0"):
        mean_squared_singular_value(nn.Identity(), torch.zeros(1, 3), probes=0)
    with pytest.raises(ValueError, match="branch"):
        ReZero(act=nn.ReLU())
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 3\).*\(1, 2, 3, 3\)"):
        ReZero(nn.Conv2d(2, 4, 1))(torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="swish"):
        ReZeroEncoderLayer(8, act="swish")
    with pytest.raises(ValueError, match="8, 3"):
        ReZeroEncoderLayer(8, num_heads=3)
    with pytest.raises(ValueError, match=r"\(2, 5, 6\)"):
        ReZeroEncoderLayer(8)(torch.zeros(2, 5, 6))
    with pytest.raises(TypeError, match="Linear"):
        ReZeroEncoderLayer.from_module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="tanh"):
        ReZeroDecoderLayer.from_module(nn.TransformerDecoderLayer(8, 2, 16, activation=torch.tanh))
    with pytest.raises(ValueError, match="0"):
        ReZeroMLP(4, layers=0)
