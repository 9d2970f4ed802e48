"""The compatibility matrix: every block in networks of six families, converted, trained for 20 steps and exported.

A cell says how many places changed, what it weighs, that the loss falls, and the gap of the ONNX file; or why the pair
makes no sense, in the words of the conversion that refused. ``torchive matrix --write`` records it.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchive.catalogue import get_card, list_methods
from torchive.catalogue.matrix import MATRIX, render_matrix
from torchive.engine.build import build_optimizer
from torchive.engine.checkpoint import write_atomically
from torchive.engine.conversion import ConversionError
from torchive.engine.convert import convert
from torchive.engine.export import ExportError, OnnxModel, gap_to_torch, write_onnx
from torchive.engine.recipe import ClassSpec, DataSpec, Recipe

STEPS, BATCH, SIZE = 20, 4, 64
GAP = 1e-3  # of the outputs of an ONNX file; above it the network's own rounding is told
#: For its optimiser, the default of every recipe.
_RECIPE = Recipe("classification", ClassSpec("torch.nn.Identity"), DataSpec("none"))


@dataclass(frozen=True)
class Cell:
    """One method in one network.

    Attributes:
        state: "works"; "unsteady", where it trains and exports, but 20 steps did not lower the loss; "no sense", where
            the conversion refuses; or "fails".
        why: of the latter three.
        places: changed modules. parameters: before and after. loss: of the first and the last step.
        gap: the largest absolute difference of the ONNX file's outputs at another batch size than it was written with.
        rounding: how far the network itself is from its float64 form on the same images, told above ``GAP``;
            a part that jumps at a threshold carries rounding on as whole steps, in the file as in PyTorch.
        keeps: whether the network computes the same after the conversion, to 1e-5 of its largest output, so that
            trained weights survive it; tried with factors and biases as training leaves them, none of them at zero.
    """

    state: str
    why: str = ""
    places: int = 0
    parameters: tuple[int, int] = (0, 0)
    loss: tuple[float, float] = field(default=(0.0, 0.0))
    gap: float = 0.0
    rounding: float = 0.0
    keeps: bool = False

    def as_dict(self) -> dict[str, Any]:
        """What is recorded: the fields that say something."""
        values = {key: value for key, value in asdict(self).items() if value not in ("", 0, (0, 0), (0.0, 0.0), False)}
        return dict(json.loads(json.dumps(values)))


#: Heading -> where the network comes from; a name without a library is made below.
NETWORKS = {
    "ResNet-18": "timm/resnet18",
    "MobileNetV3": "timm/mobilenetv3_small_100",
    "EfficientNet-Lite0": "timm/efficientnet_lite0",
    "ConvNeXt-atto": "timm/convnext_atto",
    "Faster R-CNN backbone": "detector",
    "U-Net": "unet",
}


def make_network(heading: str) -> nn.Module:
    """A network of the matrix with random weights.

    Raises:
        ValueError: no such heading.
    """
    if heading not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {heading!r}")
    library, _, name = NETWORKS[heading].rpartition("/")
    model: nn.Module
    if library:
        import timm

        model = timm.create_model(name, num_classes=4)
    elif name == "detector":
        from torchvision.models.detection import fasterrcnn_resnet50_fpn

        model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone
    else:
        from torchive.nn.unet import UNet

        model = UNet(num_classes=2, widths=(8, 16, 32, 64), deep_supervision=False)
    return model


def blocks() -> list[str]:
    """The built methods that enter networks of images."""
    return [name for name in list_methods(state="built") if get_card(name).host.get("layout") == "NCHW"]


def measure_cell(method: str, network: str) -> Cell:
    """Convert, train on one batch with fixed random targets, export.

    Raises:
        ValueError: no such network. KeyError: no such method.
    """
    get_card(method)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = make_network(network)
        before = sum(p.numel() for p in model.parameters())
        images = torch.rand(BATCH, 3, SIZE, SIZE)
        trained = _as_if_trained(model)
        try:
            changed = convert(model, method)
        except ConversionError as error:
            return Cell("no sense", str(error).partition(": ")[2] or str(error))
        after = sum(p.numel() for p in model.parameters())
        known: dict[str, Any] = {"places": len(changed.changes), "parameters": (before, after)}
        known["keeps"] = _keeps(trained, method, images)
        try:
            losses = _train(model)
            gap, rounding = _export(model)
        except (ExportError, RuntimeError, ValueError) as error:
            return Cell("fails", " ".join(str(error).split())[:200], **known)
    known["loss"] = tuple(float(f"{value:.4g}") for value in losses)
    known |= {"gap": float(f"{gap:.2g}"), "rounding": float(f"{rounding:.2g}")}
    if not torch.isfinite(torch.tensor(losses)).all():
        return Cell("fails", f"the loss goes from {losses[0]:.4g} to {losses[1]:.4g}", **known)
    if losses[1] >= losses[0]:
        return Cell("unsteady", f"the loss goes from {losses[0]:.4g} to {losses[1]:.4g} in 20 steps", **known)
    return Cell("works", **known)


def _as_if_trained(model: nn.Module) -> nn.Module:
    """A copy without factors and biases that start at nothing, which would hide what a part does."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                ends = (-1.0, 1.0) if name.endswith("bias") else (0.5, 1.5)
                value.copy_(torch.linspace(*ends, len(value)))
    return model


def _keeps(model: nn.Module, method: str, images: Tensor) -> bool:
    """Whether a network, which is converted here, computes the same afterwards, to 1e-5 of its largest output."""
    with torch.random.fork_rng(devices=[]):
        before = _evaluated(model, images)
        convert(model, method)
        after = _evaluated(model, images)
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())
        for a, b in zip(before, after, strict=True)
    )


def _train(model: nn.Module) -> tuple[float, float]:
    """First and last loss of 20 steps towards fixed random outputs."""
    model.train()
    images = torch.rand(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        targets = [torch.randn_like(output) for output in _tensors(model(images))]
    optimizer = build_optimizer(_RECIPE, model.parameters(), model)
    first = loss = torch.tensor(float("nan"))
    for step in range(STEPS):
        optimizer.zero_grad()
        outputs = _tensors(model(images))
        loss = sum((nn.functional.mse_loss(o, t) for o, t in zip(outputs, targets, strict=True)), torch.zeros(()))
        loss.backward()
        optimizer.step()
        first = loss if step == 0 else first
    return float(first), float(loss)


def _evaluated(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(model.eval()(images))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _export(model: nn.Module) -> tuple[float, float]:
    """The file's largest gap and, where that is above ``GAP``, the network's own distance from its float64 form."""
    model.eval()
    images = torch.rand(3, 3, SIZE, SIZE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        structure = write_onnx(model, images[:2], path, dynamic=(0,))
        gap = gap_to_torch(model, OnnxModel(path, structure), images)
    if gap <= GAP:
        return gap, 0.0
    exact = _evaluated(copy.deepcopy(model).double(), images.double())
    pairs = zip(_evaluated(model, images), exact, strict=True)
    return gap, max(float((a.double() - b).abs().max()) for a, b in pairs)


def measure_matrix(methods: Sequence[str] = (), networks: Sequence[str] = ()) -> Iterator[tuple[str, str, Cell]]:
    """(method, network, cell), one after the other; of all built blocks and all networks by default."""
    names = [get_card(name).name for name in methods] or blocks()
    for name in names:
        for network in networks or NETWORKS:
            yield name, network, measure_cell(name, network)


def record_matrix(cells: Mapping[str, Mapping[str, Cell]], path: Path = MATRIX) -> str:
    """Lay cells over the recorded ones, drop methods that are no blocks any more, and return the table."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for method, row in cells.items():
        known[method] = {**known.get(method, {}), **{network: cell.as_dict() for network, cell in row.items()}}
    kept = {method: known[method] for method in sorted(known) if method in blocks()}
    write_atomically(path, (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode())
    return render_matrix(kept)
