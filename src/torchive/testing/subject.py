"""The module under test: how to make it, what to feed it and how to call it, by kind of contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchive.catalogue import Card
from torchive.structures import Batch
from torchive.testing.report import NotApplicableError
from torchive.testing.targets import draw_targets
from torchive.testing.tree import tensors

Shape = Sequence[int]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The global CPU generator set to a seed, and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass
class Subject:
    """One module of a kind with its test-sized arguments.

    Attributes:
        name: what the report calls it.
        kind: its contract.
        build: makes a fresh instance; takes keyword options that override its own.
        tiny: the table of the card, see ``torchive.testing``.
        card: the method's card; None for a module that is not in the archive.
        fresh: whether ``build`` constructs anew (else it copies the instance that was given).
        cache: what checks share, such as an exported program.
    """

    name: str
    kind: str
    build: Callable[..., Any]
    tiny: dict[str, Any]
    card: Card | None = None
    fresh: bool = True
    cache: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0, **options: Any) -> Any:
        """An instance with seeded weights, in training mode as constructed."""
        with seeded(seed):
            return self.build(**options)

    def evaluated(self, seed: int = 0, *, perturbed: bool = False) -> Any:
        """An instance in evaluation mode; ``perturbed`` moves every parameter off its initial value."""
        module = self.make(seed)
        if perturbed:
            perturb(module, seed)
        if isinstance(module, nn.Module):
            module.eval()
        return module

    @property
    def is_detection(self) -> bool:
        """Whether the inputs are a list of images and the targets a list of dicts."""
        return "images" in self.tiny

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the main input, batch first."""
        if self.is_detection:
            return (2, *self.tiny["images"][0])
        if "image" in self.tiny:
            return (self.tiny.get("batch", 4), *self.tiny["image"])
        if not self.tiny.get("inputs"):
            raise NotApplicableError("no inputs are declared: give `inputs`, a list of shapes")
        return tuple(self.tiny["inputs"][0])

    @property
    def channel_axis(self) -> int:
        """Index of the channel axis of the main input, 1 or the last."""
        return int(self.tiny.get("channel_axis", 1)) % len(self.shape)

    @property
    def size_axes(self) -> list[int]:
        """Axes of the main input that are neither batch nor channels nor fixed."""
        fixed = {0, self.channel_axis, *self.tiny.get("fixed", ())}
        return [axis for axis in range(len(self.shape)) if axis not in fixed]

    def resized(self, step: int = 1) -> list[tuple[int, ...]]:
        """Legal shapes of other, odd and non-square sizes; ``step`` 2 gives larger ones."""
        d, axes, shape = int(self.tiny.get("divisor", 1)), self.size_axes, list(self.shape)
        if not axes:
            raise NotApplicableError("the input has no size that may vary")
        first, second = list(shape), list(shape)
        for i, axis in enumerate(axes):
            first[axis] = shape[axis] + d * (2 * i + step) + (d == 1 and (shape[axis] + 2 * i + step) % 2 == 0)
            second[axis] = shape[axis] + d * ((len(axes) - i) * step + step - 1)
        return [tuple(first), tuple(second)]

    def inputs(self, seed: int = 0, *, shape: Shape | None = None) -> tuple[Any, ...]:
        """Arguments of ``forward``; of another main shape if given (then other inputs follow its batch)."""
        g = torch.Generator().manual_seed(seed)
        if self.is_detection:
            images = [shape[1:]] * shape[0] if shape is not None else self.tiny["images"]
            return ([self._draw(s, g) for s in images],)
        main = tuple(shape or self.shape)
        drawn: list[Any] = [self._draw(main, g)]
        if self.kind == "loss" or self.kind == "metric":
            target = draw_targets(self.tiny.get("target", {"kind": "none"}), main, g, batch=main[0])
            return (*drawn, target) if target is not None else tuple(drawn)
        drawn += [self._draw((main[0], *other[1:]), g) for other in self.tiny.get("inputs", [()])[1:]]
        return tuple(drawn)

    def batch(self, seed: int = 0) -> Batch:
        """A procedure's batch: (N, V, C, H, W) views, or (N, C, H, W) where the card has no ``views``."""
        g = torch.Generator().manual_seed(seed)
        n, views = self.shape[0], self.tiny.get("views")
        shape = (n, *self.shape[1:]) if views is None else (n, views, *self.shape[1:])
        images = self._draw(shape, g)
        targets = draw_targets(self.tiny.get("target", {"kind": "none"}), self.shape, g, batch=n)
        return Batch(images, targets, tuple(f"sample{i}" for i in range(n)))

    def targets(self, inputs: tuple[Any, ...], seed: int = 0, *, per_image: int = 2) -> Any:
        """A system's targets that fit these inputs; ``per_image`` objects where they are boxes."""
        g = torch.Generator().manual_seed(seed + 1)
        spec = self.tiny.get("target", {"kind": "none"})
        if self.is_detection:
            return draw_targets(
                {"kind": "boxes", "per_image": per_image, **spec}, [tuple(image.shape) for image in inputs[0]], g
            )
        return draw_targets(spec, tuple(inputs[0].shape), g, batch=len(inputs[0]))

    def _draw(self, shape: Shape, g: torch.Generator) -> Tensor:
        values = self.tiny.get("values", "normal" if self.kind in ("block", "backbone", "loss") else "uniform")
        draw = torch.randn if values == "normal" else torch.rand
        return draw(tuple(shape), generator=g) * self.tiny.get("scale", 1.0)

    def model(self) -> nn.Module:
        """The small model that an explanation explains, in evaluation mode."""
        from torchive.testing.construct import construct

        spec = self.tiny.get("model", {"class_path": "torchive.testing.models:SmallNetwork"})
        with seeded():
            model: nn.Module = construct(spec).eval()
        return model

    def forward(self, module: Any, inputs: tuple[Any, ...]) -> Any:
        """What the contract's main call returns."""
        if self.kind == "procedure":
            return module.deployable()(*inputs)
        if self.kind == "explanation":
            return module.explain(self.model(), inputs[0], None)
        return module(*inputs)

    def objective(self, module: Any, inputs: tuple[Any, ...], *, seed: int = 0, per_image: int = 2) -> Tensor:
        """A scalar to differentiate: the loss where the contract has one, else a seeded projection of the output."""
        with seeded(seed):
            if self.kind in ("system", "two_players"):
                return total(self.losses(module, inputs, self.targets(inputs, seed, per_image=per_image)))
            if self.kind == "procedure":
                return total(module.losses(self.batch(seed)))
            output = module(*inputs)
        if self.kind == "loss":
            return output.mean()
        g = torch.Generator().manual_seed(seed + 7)
        parts = [
            (t * torch.randn(t.shape, generator=g).to(t)).mean()
            for t in tensors(output)
            if t.is_floating_point() and t.numel()
        ]
        assert parts, "no floating tensor came out"
        return torch.stack(parts).sum()

    def losses(self, module: Any, inputs: tuple[Any, ...], targets: Any) -> dict[str, Tensor]:
        """The loss dict of a system; of all players together for a two-player network."""
        argument = inputs[0] if len(inputs) == 1 else inputs
        if self.kind != "two_players":
            return dict(module.losses(argument, targets))
        found: dict[str, Tensor] = {}
        for player in module.players():
            found |= {f"{player}.{key}": value for key, value in module.losses(argument, targets, player).items()}
        return found


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of a loss dict."""
    assert isinstance(losses, dict), f"losses must be a dict of scalars, got {type(losses).__name__}"
    assert losses, "the loss dict is empty"
    return torch.stack([value.reshape(()) for value in losses.values()]).sum()


def perturb(module: Any, seed: int = 0, scale: float = 0.05) -> None:
    """Add seeded noise to every floating parameter, so that zero-initialised parts take part."""
    if not isinstance(module, nn.Module):
        return
    g = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_((torch.randn(parameter.shape, generator=g) * scale).to(parameter))
