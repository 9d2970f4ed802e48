"""Sample sets in memory and the smallest models that honour each contract."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.data.faults import Fault
from torchive.engine.recipe import Recipe, resolve_recipe
from torchive.structures import Batch, Detections, Sample


class ToySet:
    """Grey images of 16 pixels with a bright square; where it is, and how large, is the target."""

    left_out: tuple[Fault, ...] = ()
    channels = 1
    licence, origin = "CC0-1.0", "made by the test"

    def __init__(self, task: str, count: int = 48, seed: int = 0) -> None:
        self.name, self.task = f"toy-{task}", task
        self.classes = {"classification": ("small", "large"), "segmentation": ("dark", "bright")}.get(task, ("square",))
        self.ids = tuple(f"{seed}/{i:03d}" for i in range(count))
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 60, (count, 1, 16, 16), generator=generator, dtype=torch.uint8)
        self.sides = torch.where(torch.rand(count, generator=generator) < 0.5, 4, 9)
        self.corners = (torch.rand(count, 2, generator=generator) * (16 - self.sides)[:, None]).long()
        self.masks = torch.zeros(count, 16, 16, dtype=torch.uint8)
        for mask, (y, x), side in zip(self.masks, self.corners.tolist(), self.sides.tolist(), strict=True):
            mask[y : y + side, x : x + side] = 1
        self.images += self.masks[:, None] * 180

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        (y, x), side, mask = self.corners[index].tolist(), int(self.sides[index]), self.masks[index]
        target: Any = int(side > 6)
        if self.task == "segmentation":
            target = mask.long()
        elif self.task == "detection":
            boxes = torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32)
            target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64), "masks": mask[None]}
        return Sample(self.images[index], target, self.ids[index])


def toy_samples(task: str) -> dict[str, ToySet]:
    """Training and validation samples of a task."""
    known = "classification" if task == "selfsupervised" else task
    return {"train": ToySet(known), "val": ToySet(known, 21, seed=1)}


MODELS: dict[str, dict[str, Any]] = {
    "classification": {
        "class_path": "torchive.nn.Classifier",
        "init_args": {"network": {"class_path": "tests.engine.toys.TinyNet"}},
    },
    "detection": {"class_path": "tests.engine.toys.ToyDetector"},
    "segmentation": {
        "class_path": "torchive.nn.Segmenter",
        "init_args": {"network": {"class_path": "tests.engine.toys.TinyDense"}},
    },
    "selfsupervised": {"class_path": "tests.engine.toys.ToyContrast"},
    "two players": {"class_path": "tests.engine.toys.ToyGame"},
}

#: A task and a model of each contract that the loop trains.
KINDS: list[tuple[str, str | None]] = [
    ("classification", None),
    ("detection", None),
    ("segmentation", None),
    ("selfsupervised", None),
    ("classification", "two players"),
]


def toy_recipe(task: str = "classification", model: str | None = None, **sections: dict[str, Any]) -> Recipe:
    """A recipe of a few steps on a toy set."""
    values: dict[str, Any] = {
        "name": "toy",
        "task": task,
        "model": MODELS[model or task],
        "data": {"source": "toy", "image_size": 16, "batch_size": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "train": {"steps": 12, "evaluate_every": 5, "checkpoint_every": 5, "log_every": 4},
    }
    for key, section in sections.items():
        values[key] = {**values.get(key, {}), **section}
    return resolve_recipe(values)


class TinyNet(nn.Module):
    """(N, C, H, W) to (N, K), with batch norm and dropout, so that buffers and draws matter."""

    def __init__(self, *, num_classes: int = 2, in_channels: int = 1, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(width, num_classes)

    def maps(self, x: Tensor) -> Tensor:
        """(N, width, H, W)"""
        return self.second(self.norm(self.first(x)).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.maps(x).mean((2, 3))))


class TinyDense(nn.Module):
    """(N, C, H, W) to (N, K, H, W)."""

    def __init__(self, *, num_classes: int = 2, in_channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class ToyDetector(nn.Module):
    """One box per image, from a list of images."""

    task = "detection"

    def __init__(self, *, num_classes: int = 1, in_channels: int = 1) -> None:
        super().__init__()
        self.body = nn.Linear(16 * 16 * in_channels, 4)
        self.score = nn.Linear(16 * 16 * in_channels, num_classes)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = torch.stack([F.adaptive_avg_pool2d(i, 16) for i in inputs]).flatten(1)
        return self.body(x).sigmoid(), self.score(x)

    def losses(self, inputs: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        boxes, scores = self(inputs)
        wanted = torch.stack([t["boxes"][0] for t in targets]) / 16
        return {"boxes": F.smooth_l1_loss(boxes, wanted), "scores": F.softplus(-scores).mean()}

    def predict(self, inputs: list[Tensor]) -> list[Detections]:
        boxes, scores = self(inputs)
        found = []
        for image, box, score in zip(inputs, boxes, scores, strict=True):
            size = box.new_tensor([image.shape[2], image.shape[1]]).repeat(2)
            corners = torch.cat([box.view(2, 2).amin(0), box.view(2, 2).amax(0)]) * size
            found.append(
                Detections(corners[None], torch.ones(1, dtype=torch.int64, device=box.device), score[:1].sigmoid())
            )
        return found


class ToyContrast(nn.Module):
    """A procedure: two noisy views of an image come close; a counter shows that ``after_step`` is called."""

    steps: Tensor

    def __init__(self, *, in_channels: int = 1) -> None:
        super().__init__()
        self.encoder = TinyNet(num_classes=8, in_channels=in_channels)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def views(self, image_size: int | None, *, noise: float = 0.05) -> TwoViews:
        return TwoViews(noise)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        n = len(batch)
        z = F.normalize(self.encoder(batch.inputs.flatten(0, 1)), dim=1).view(n, 2, -1)
        logits = z[:, 0] @ z[:, 1].T / 0.5
        return {"loss": F.cross_entropy(logits, torch.arange(n, device=logits.device))}

    def after_step(self) -> None:
        self.steps += 1

    def deployable(self) -> nn.Module:
        return self.encoder


class TwoViews:
    """(C, 24, 24) to two crops (2, C, 16, 16) with noise."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __call__(self, image: Tensor) -> Tensor:
        corners = torch.randint(0, image.shape[-1] - 15, (2, 2)).tolist()
        parts = [image[:, y : y + 16, x : x + 16] for y, x in corners]
        return torch.stack([(p + self.noise * torch.randn_like(p)).clamp(0, 1) for p in parts])


class ToyGame(nn.Module):
    """Two players: a decoder that redraws the image, and a critic that tells the two apart."""

    def __init__(self, *, in_channels: int = 1, num_classes: int = 2) -> None:
        super().__init__()
        self.maker = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.critic = TinyNet(num_classes=1, in_channels=in_channels)

    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        return {"maker": self.maker.parameters(), "critic": self.critic.parameters()}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.maker(inputs)

    def losses(self, inputs: Tensor, targets: Any, player: str) -> dict[str, Tensor]:
        made = self(inputs)
        if player == "maker":
            return {"fool": F.softplus(-self.critic(made)).mean(), "near": F.l1_loss(made, inputs)}
        return {"tell": (F.softplus(-self.critic(inputs)) + F.softplus(self.critic(made.detach()))).mean()}

    def predict(self, inputs: Tensor) -> list[Any]:
        from torchive.structures import Classification

        return [Classification(torch.cat([s.sigmoid(), 1 - s.sigmoid()])) for s in self.critic(inputs)]


class Bursting(nn.Module):
    """A classifier whose loss is infinite from its fourth step on."""

    task = "classification"

    def __init__(self, *, num_classes: int = 2, in_channels: int = 1) -> None:
        super().__init__()
        self.network = TinyNet(num_classes=num_classes, in_channels=in_channels)
        self.count = 0

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.count += 1
        return {"loss": F.cross_entropy(self(inputs), targets) / (0.0 if self.count > 3 else 1.0)}

    def predict(self, inputs: Tensor) -> list[Any]:
        from torchive.structures import Classification

        return [Classification(s) for s in self(inputs).softmax(1)]


def train_toy(out: str, steps: int, workers: int = 0) -> None:
    """One toy run as a program: exits with 130 where it was interrupted."""
    from torchive.engine.train import train

    torch.set_num_threads(1)
    recipe = toy_recipe(data={"workers": workers}, train={"steps": steps, "checkpoint_every": 4, "evaluate_every": 10})
    result = train(recipe, Path(out), samples=toy_samples("classification"), progress=False)
    sys.exit(130 if result.interrupted else 0)
