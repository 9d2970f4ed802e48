"""Any backbone as a classifier that attends to its own maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.classification.learn_to_pay_attention.attention import (
    CompatibilityAttention,
    GridAttention,
    Normalisation,
)
from torchive.methods.classification.learn_to_pay_attention.resnet import ResNetMaps
from torchive.methods.classification.learn_to_pay_attention.vgg import VGGMaps
from torchive.nn.network import build_features
from torchive.structures import Classification

_PAPER: dict[str, type[nn.Module]] = {"vgg": VGGMaps, "resnet": ResNetMaps}


class AttentionClassifier(nn.Module):
    """Images (N, C, H, W) to (N, K) scores, from attended sums of ``levels`` maps, as a classification system.

    The last map of the backbone gives the global features g; the maps before it are attended to. With "pc" and a
    softmax nothing that computes g gets a gradient.

    Args:
        backbone: "vgg" or "resnet", the paper's; ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``.
        num_classes: K.
        in_channels: C, for a named backbone.
        levels: S, how many maps are attended to, the last ones before the global one; 0 classifies g itself, which is
            the baseline.
        feature_dim: length of g.
        score: "dp", "pc", or "grid" for an additive gate.
        normalisation: "softmax" over positions, or "sigmoid".
        project: what is projected where a map has not as many channels as g: the "local" features to g's, or g, once
            for each map, to theirs ("global"), which leaves a smaller classifier.
        decision: "concat", one linear layer on all sums; "indep", the mean of the probabilities of a layer for each; or
            "sum", the sum of their scores, as in the release.
        head_norm: whether each sum goes through batch norm and ReLU first, as in the release.
        drop: share of the sums that is dropped before the linear layers in training; 0.5 in the release.
        loss: of (N, K) scores and (N,) classes; cross-entropy if None.
        options: further arguments of a named backbone, such as ``widths``.

    Raises:
        ValueError: a number below its least, more levels than maps, an unknown option or backbone.
    """

    task = "classification"

    def __init__(
        self,
        backbone: str | nn.Module = "vgg",
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        levels: int = 3,
        feature_dim: int = 512,
        score: Literal["dp", "pc", "grid"] = "pc",
        normalisation: Normalisation = "softmax",
        project: Literal["local", "global"] = "local",
        decision: Literal["concat", "indep", "sum"] = "concat",
        head_norm: bool = False,
        drop: float = 0.0,
        loss: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for key, value, allowed in (
            ("score", score, ("dp", "pc", "grid")),
            ("project", project, ("local", "global")),
            ("decision", decision, ("concat", "indep", "sum")),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
        if min(num_classes, feature_dim) < 1 or not 0 <= drop < 1:
            raise ValueError(
                f"expected num_classes, feature_dim >= 1 and drop in [0, 1), got {num_classes}, {feature_dim}, {drop}"
            )
        if isinstance(backbone, str) and backbone in _PAPER:
            self.backbone: nn.Module = _PAPER[backbone](in_channels=in_channels, **(options or {}))
        else:
            self.backbone = build_features(backbone, in_channels=in_channels, **(options or {}))
        *maps, last = (level.channels for level in self.backbone.levels)  # type: ignore[union-attr]
        if not 0 <= levels <= len(maps):
            raise ValueError(f"levels must lie in 0 to {len(maps)}, the backbone's maps before the last; got {levels}")
        self.levels, self.decision = levels, decision
        self.whole = nn.Linear(last, feature_dim)
        self.projections, self.attentions, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        attended = []
        for channels in maps[len(maps) - levels :]:
            local = feature_dim if project == "local" or channels == feature_dim else channels
            self.projections.append(_projection(channels, feature_dim, project))
            self.attentions.append(
                GridAttention(local, local, normalisation=normalisation)
                if score == "grid"
                else CompatibilityAttention(local, score=score, normalisation=normalisation)
            )
            attended.append(local)
        sums = attended or [feature_dim]
        self.norms.extend(nn.Sequential(nn.BatchNorm1d(c), nn.ReLU()) if head_norm else nn.Identity() for c in sums)
        self.dropout = nn.Dropout(drop)
        self.heads = nn.ModuleList(nn.Linear(c, num_classes) for c in ([sum(sums)] if decision == "concat" else sums))
        self.project = project
        self.loss = nn.CrossEntropyLoss() if loss is None else loss

    def forward(self, inputs: Tensor) -> Tensor:
        return self._decide(self._sums(self._scored(inputs)))  # (N, K)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, of (N, C, H, W) images and (N,) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> Sequence[Classification]:
        """Softmax scores, one ``Classification`` per image."""
        return [Classification(scores) for scores in self(inputs).float().softmax(1)]

    def features(self, inputs: Tensor) -> Tensor:
        """The attended sums of all levels, (N, D), as a representation for other tasks."""
        return torch.cat(self._sums(self._scored(inputs)), 1)

    def with_maps(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores (N, K) and the compatibilities c of each level, finest first, (N, 1, h, w), before normalisation."""
        scored = self._scored(inputs)
        return self._decide(self._sums(scored)), [c for _, c in scored if c is not None]

    def _scored(self, inputs: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Local features and their compatibilities for each level; without levels the global features and None."""
        *maps, last = self.backbone(inputs)
        whole = self.whole(last.flatten(2).mean(2))  # (N, feature_dim)
        if not self.levels:
            return [(whole, None)]
        found: list[tuple[Tensor, Tensor | None]] = []
        for local, projection, attention in zip(maps[-self.levels :], self.projections, self.attentions, strict=True):
            g = whole
            if self.project == "local":
                local = projection(local)
            else:
                g = projection(whole)
            found.append((local, attention.compatibility(local, g)))  # type: ignore[operator]
        return found

    def _sums(self, scored: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        if not self.levels:
            return [scored[0][0]]
        pairs = zip(self.attentions, scored, strict=True)
        return [attention.pooled(local, c) for attention, (local, c) in pairs]  # type: ignore[operator]

    def _decide(self, sums: list[Tensor]) -> Tensor:
        sums = [self.dropout(norm(g)) for norm, g in zip(self.norms, sums, strict=True)]
        if self.decision == "concat":
            return self.heads[0](torch.cat(sums, 1))
        scores = torch.stack([head(g) for head, g in zip(self.heads, sums, strict=True)])  # (S, N, K)
        if self.decision == "sum":
            return scores.sum(0)
        return scores.log_softmax(2).logsumexp(0) - torch.tensor(float(len(sums))).log().to(scores)


def _projection(channels: int, feature_dim: int, project: str) -> nn.Module:
    if channels == feature_dim:
        return nn.Identity()
    if project == "local":
        return nn.Conv2d(channels, feature_dim, 1, bias=False)
    return nn.Linear(feature_dim, channels)
