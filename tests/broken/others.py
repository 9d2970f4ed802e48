"""Sound and broken losses, systems, two-player networks, procedures, explanations, metrics and searches."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from broken import Case, case
from torchive.structures import Batch, Classification, Segmentation

K = 4


class SoundLoss(nn.Module):
    """Cross-entropy with a learned temperature."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        each = self.each(prediction.float() / self.temperature, target)
        if self.reduction == "none":
            return each
        return each.sum() if self.reduction == "sum" else self.mean(each)

    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        logits = prediction.log_softmax(1)
        return -logits.gather(1, target[:, None])[:, 0]

    def mean(self, each: Tensor) -> Tensor:
        return each.sum() / max(len(each), 1)


class PlainLoss(SoundLoss):
    """Cross-entropy in the type of its input, without the cast."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        each = self.each(prediction / self.temperature, target)
        if self.reduction == "none":
            return each
        return each.sum() if self.reduction == "sum" else self.mean(each)


class LiesAboutItsReduction(PlainLoss):
    def mean(self, each: Tensor) -> Tensor:
        return each.sum() / max(len(each), 1) / 2


class DividesByNothing(PlainLoss):
    def mean(self, each: Tensor) -> Tensor:
        return each.mean()


class IsBelowZero(PlainLoss):
    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().each(prediction, target) - 3


class WeighsByPosition(PlainLoss):
    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        return super().each(prediction, target) * torch.arange(1, len(target) + 1, device=target.device)


class Overflows(PlainLoss):
    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        e = prediction.exp()
        return -(e.gather(1, target[:, None])[:, 0] / e.sum(1)).log()


class NeedsTwoClasses(PlainLoss):
    def mean(self, each: Tensor) -> Tensor:
        return super().mean(each)

    def each(self, prediction: Tensor, target: Tensor) -> Tensor:
        spread = target.to(prediction.dtype).std(correction=0) if len(target) else prediction.new_ones(())
        return super().each(prediction, target) / spread.clamp(max=1.0).pow(1e-3)


class WritesIntoItsTarget(PlainLoss):
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        value = super().forward(prediction, target.clone())
        if self.training:
            target.fill_(0)
        return value


class SoundSystem(nn.Module):
    """A classifier in three verbs."""

    task = "classification"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, K)

    def forward(self, inputs: Tensor) -> Any:
        if inputs.ndim != 4:
            raise ValueError(f"expected 4 axes, got {inputs.ndim}")
        return self.head(torch.tanh(self.conv(inputs)).mean((2, 3)))

    def losses(self, inputs: Tensor, targets: Tensor) -> Any:
        return {"loss": F.cross_entropy(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> list[Any]:
        return [Classification(s) for s in self(inputs).softmax(1)]


class PredictsLogits(SoundSystem):
    def predict(self, inputs: Tensor) -> list[Any]:
        return [Classification(s) for s in self(inputs)]


class ReturnsABareLoss(SoundSystem):
    def losses(self, inputs: Tensor, targets: Tensor) -> Any:
        return super().losses(inputs, targets)["loss"]


class TrainsOnlyItsHead(SoundSystem):
    def losses(self, inputs: Tensor, targets: Tensor) -> Any:
        with torch.no_grad():
            features = torch.tanh(self.conv(inputs)).mean((2, 3))
        return {"loss": F.cross_entropy(self.head(features), targets)}


class SoundSegmenter(nn.Module):
    """A segmentation system that survives images without a single labelled pixel."""

    task = "segmentation"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, K, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.ndim != 4:
            raise ValueError(f"expected 4 axes, got {inputs.ndim}")
        return self.head(torch.tanh(self.conv(inputs)))

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self(inputs), targets, ignore_index=255, reduction="sum")
        return {"loss": loss / (targets != 255).sum().clamp(min=1)}

    def predict(self, inputs: Tensor) -> list[Segmentation]:
        return [Segmentation(s.argmax(0), s) for s in self(inputs).softmax(1)]


class IsNaNOnEmptyTruth(SoundSegmenter):
    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self(inputs), targets, ignore_index=255)}


class SoundPlayers(nn.Module):
    """A generator and a critic."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.generator(x))

    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        return {"generator": self.generator.parameters(), "critic": self.critic.parameters()}

    def losses(self, inputs: Tensor, targets: Any, player: str) -> dict[str, Tensor]:
        if player == "generator":
            return {"fool": F.softplus(-self.critic(self(inputs))).mean()}
        return {"tell": F.softplus(self.critic(self(inputs).detach())).mean() + F.softplus(-self.critic(inputs)).mean()}


class SharesAPlayer(SoundPlayers):
    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        return {"generator": self.parameters(), "critic": self.critic.parameters()}


class SoundProcedure(nn.Module):
    """Two views of an image should get one embedding, and different images different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 8)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        a, b = (F.normalize(self.head(self.network(view)), dim=1) for view in batch.inputs.unbind(1))
        return {"loss": F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a), device=a.device))}

    def deployable(self) -> nn.Module:
        return self.network


class DeploysAnUntrainedCopy(SoundProcedure):
    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.kept.requires_grad_(False)

    def deployable(self) -> nn.Module:
        return self.kept


class SoundExplanation:
    """The input's gradient, its largest value over channels."""

    def explain(self, model: nn.Module, inputs: Tensor, target: Any) -> Tensor:
        with torch.enable_grad():
            x = inputs.detach().clone().requires_grad_()
            scores = model(x)
            index = scores.argmax(1) if target is None else torch.as_tensor(target, device=x.device).expand(len(x))
            value = scores.gather(1, index[:, None]).sum()
            return self.gradient(value, x, model).abs().amax(1, keepdim=True)

    def gradient(self, value: Tensor, x: Tensor, model: nn.Module) -> Tensor:
        return torch.autograd.grad(value, x)[0]


class WritesIntoGradients(SoundExplanation):
    def gradient(self, value: Tensor, x: Tensor, model: nn.Module) -> Tensor:
        value.backward()
        assert x.grad is not None
        return x.grad


class WeighsOnTheCpu(SoundExplanation):
    def gradient(self, value: Tensor, x: Tensor, model: nn.Module) -> Tensor:
        return super().gradient(value, x, model) * torch.ones(x.shape)


class LeavesAHook(SoundExplanation):
    def gradient(self, value: Tensor, x: Tensor, model: nn.Module) -> Tensor:
        model.register_forward_hook(lambda *_: None)
        return super().gradient(value, x, model)


class ExplainsAtHalfSize(SoundExplanation):
    def explain(self, model: nn.Module, inputs: Tensor, target: Any) -> Tensor:
        return super().explain(model, inputs, target)[..., ::2, ::2]


class SoundMetric(Metric):
    """Share of right classes."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.right += (prediction.argmax(1) == target).sum()
        self.seen += target.numel()

    def compute(self) -> Tensor:
        return self.right / self.seen


class MergesWrongly(SoundMetric):
    def __init__(self) -> None:
        super().__init__()
        self._reductions["seen"] = _larger


class RemembersAfterReset(SoundMetric):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        super().update(prediction, target)
        self.total += 1

    def compute(self) -> Tensor:
        return super().compute() + (self.total > 1) * 1.0


def _larger(values: Tensor) -> Tensor:
    return values.amax(0)


class SoundSearch:
    """Random search with a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def ask(self) -> int:
        return self.random.randrange(1000)

    def tell(self, architecture: int, score: float) -> None:
        pass


class IgnoresItsSeed(SoundSearch):
    def ask(self) -> int:
        return random.SystemRandom().randrange(10**9)


LOSS = {"inputs": [(8, K)], "target": {"kind": "classes", "num_classes": K}}
IMAGES = {"inputs": [(2, 3, 9, 13)], "target": {"kind": "classes", "num_classes": K}, "smallest": [1, 3, 1, 1]}
MASKS = {**IMAGES, "target": {"kind": "masks", "num_classes": K, "ignore_index": 255}, "learn": {"ratio": 0.99}}
VIEWS = {"image": [3, 9, 13], "batch": 4, "views": 2}
PLAY = {"inputs": [(2, 3, 9, 13)]}
SOUND: tuple[Case, ...] = (
    case(PlainLoss, "loss", "", **LOSS),
    case(SoundSystem, "system", "", **IMAGES, learn={"ratio": 0.99}),
    case(SoundSegmenter, "system", "", **MASKS),
    case(SoundPlayers, "two_players", "", **PLAY),
    case(SoundProcedure, "procedure", "", **VIEWS),
    case(SoundExplanation, "explanation", "", **PLAY),
    case(SoundMetric, "metric", "", **LOSS),
    case(SoundSearch, "search", ""),
)
BROKEN: tuple[Case, ...] = (
    case(LiesAboutItsReduction, "loss", "reductions", **LOSS),
    case(DividesByNothing, "loss", "empty_targets", **LOSS),
    case(IsBelowZero, "loss", "non_negative", **LOSS),
    case(WeighsByPosition, "loss", "order_invariant", **LOSS),
    case(Overflows, "loss", "extreme_predictions", **LOSS),
    case(NeedsTwoClasses, "loss", "empty_targets", **LOSS),
    case(WritesIntoItsTarget, "loss", "input_unchanged", **LOSS),
    case(PredictsLogits, "system", "predict_contract", **IMAGES, learn={"ratio": 0.99}),
    case(TrainsOnlyItsHead, "system", "parameter_gradients", **IMAGES, learn={"ratio": 0.99}),
    case(IsNaNOnEmptyTruth, "system", "empty_targets", **MASKS),
    case(SharesAPlayer, "two_players", "players", **PLAY),
    case(DeploysAnUntrainedCopy, "procedure", "deployable", **VIEWS),
    case(WritesIntoGradients, "explanation", "model_untouched", **PLAY),
    case(WeighsOnTheCpu, "explanation", "other_device", **PLAY),
    case(LeavesAHook, "explanation", "model_untouched", **PLAY),
    case(ExplainsAtHalfSize, "explanation", "explains", **PLAY),
    case(MergesWrongly, "metric", "merges", **LOSS),
    case(RemembersAfterReset, "metric", "resets", **LOSS),
    case(IgnoresItsSeed, "search", "seeded_search resumes"),
)
