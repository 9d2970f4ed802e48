"""The procedure: two stages in one run, told apart by its progress."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.training.decoupling.heads import (
    FeatureKind,
    LinearHead,
    NearestMeanHead,
    ScaledHead,
    TauHead,
)
from torchive.nn.classifier import Classifier
from torchive.nn.encoder import Encoder, build_encoder
from torchive.structures import Batch

HEADS = ("crt", "lws", "tau", "ncm", "joint")


class RebalancedNetwork(nn.Module):
    """Images (N, C, H, W) to logits (N, K): encoder, the first stage's classifier, and the head that re-balances it.

    While ``joint`` is set, the first classifier answers.
    """

    def __init__(self, encoder: Encoder, classifier: nn.Linear, head: nn.Module | None) -> None:
        super().__init__()
        self.encoder, self.classifier, self.head = encoder, classifier, head
        self.joint = False

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.encoder(inputs)  # (N, D)
        if self.joint or self.head is None:
            return self.classifier(features)
        return self.head(features, self.classifier)

    @torch.no_grad()
    def merge(self) -> nn.Sequential:
        """A copy with the head folded into one linear layer: the cost of the plain classifier.

        Raises:
            ValueError: NCM, which is no linear layer.
        """
        layer = copy.deepcopy(self.classifier)
        if self.head is not None:
            if not hasattr(self.head, "merged"):
                raise ValueError(f"{type(self.head).__name__} is no linear layer of the features")
            weight, bias = self.head.merged(self.classifier)  # type: ignore[operator]
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return nn.Sequential(copy.deepcopy(self.encoder), layer)


class Decoupling(nn.Module):
    """Trains a classifier in two stages; ``deployable`` is a ``torchive.nn.Classifier``.

    The first stage trains encoder and classifier on the samples as they are. From the share ``first_share`` of the run
    on, the encoder is frozen, its norms in evaluation, classes are drawn alike, and only the head learns. A recipe
    should let its schedule begin again there (``schedule.restarts``). Until the first ``before_step`` it is in its
    first stage; the deployable answers with the head once it is trained.

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME``, or a module that gives features (N, D) or (N, D, h, w).
        num_classes: K.
        in_channels: C, for a named backbone.
        head: "crt" a new classifier, "lws" a scale for each class, "tau" normalised weights, "ncm" nearest class means;
            "joint" has no second stage and is the baseline.
        tau: of the head "tau"; None learns it.
        features: what "ncm" compares: "un", "l2n" or "cl2n".
        distance: how "ncm" compares: "l2" or "cosine".
        first_share: the share of the run before the second stage; the paper has 90 of 100 epochs.
        loss: of the first stage, of (N, K) logits and (N,) classes; cross-entropy if None.
        feature_dim: D, where it cannot be found by a trial pass.

    Raises:
        ValueError: an unknown name or head, or a number out of range.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "timm/resnet18",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        head: Literal["crt", "lws", "tau", "ncm", "joint"] = "crt",
        tau: float | None = 0.7,
        features: FeatureKind = "cl2n",
        distance: Literal["l2", "cosine"] = "l2",
        first_share: float = 0.9,
        loss: nn.Module | None = None,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if not 0 < first_share < 1 or num_classes < 1:
            raise ValueError(
                f"first_share must lie in (0, 1) and num_classes be >= 1, got {first_share} and {num_classes}"
            )
        encoder = build_encoder(backbone, in_channels=in_channels, feature_dim=feature_dim)
        size = encoder.feature_dim
        classifier = nn.Linear(size, num_classes)  # before the head, so that it is the same with any
        made = {
            "crt": lambda: LinearHead(size, num_classes),
            "lws": lambda: ScaledHead(num_classes),
            "tau": lambda: TauHead(tau),
            "ncm": lambda: NearestMeanHead(size, num_classes, features=features, distance=distance),
            "joint": lambda: None,
        }[head]()
        self.model = Classifier(RebalancedNetwork(encoder, classifier, made))
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.first_share = first_share
        self.second, self.centring = False, False
        self._frozen: list[nn.Parameter] = []  # by the second stage; others were the caller's choice

    @property
    def network(self) -> RebalancedNetwork:
        """Encoder, classifier and head."""
        network = self.model.network
        assert isinstance(network, RebalancedNetwork)
        return network

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (N, K) of the deployable."""
        return self.model(inputs)

    def before_step(self, progress: float) -> None:
        """Enter the stage of this share of the run."""
        network, before = self.network, self.second
        self.second = network.head is not None and progress >= self.first_share
        self.centring = progress < (1 + self.first_share) / 2
        network.joint = not self.second
        if self.second and not before:
            parts = (network.encoder, network.classifier)
            self._frozen = [p for part in parts for p in part.parameters() if p.requires_grad]
        if self.second != before:
            for parameter in self._frozen:
                parameter.requires_grad_(not self.second)
        if self.second:
            network.encoder.eval()

    def sampling(self, progress: float) -> float:
        """The power of class sizes by which classes are drawn: 1 in the first stage, 0 in the second."""
        return 0.0 if self.network.head is not None and progress >= self.first_share else 1.0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss": scalar}`` of this stage; in the second one of the head alone, by cross-entropy."""
        network = self.network
        if not self.second or network.head is None:
            return {"loss": self.loss(network.classifier(network.encoder(batch.inputs)), batch.targets)}
        with torch.no_grad():
            features = network.encoder(batch.inputs)
        if isinstance(network.head, NearestMeanHead):
            network.head.gather(features, batch.targets, centre=self.centring)
        return {"loss": F.cross_entropy(network.head(features, network.classifier), batch.targets)}

    def deployable(self) -> nn.Module:
        """The classifier, images (N, C, H, W) to logits (N, K), with ``predict``."""
        return self.model
