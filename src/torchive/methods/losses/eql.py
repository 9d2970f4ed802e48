r"""Equalization loss: samples of other classes no longer push down the scores of rare classes.

Paper    Tan, Wang, Li, Li, Ouyang, Yin, Yan, "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020,
         arXiv:2003.05176.
Formula  sigmoid: L = -1/R sum_r sum_j w_rj log p^_rj,  p^ = p where y = 1, else 1 - p
         w_rj = 1 - E(r) T(f_j) (1 - y_rj)
         softmax: L = -1/N sum_n log p_ny,  p_j = exp(z_j) / sum_k w_k exp(z_k),  w_k = 1 - beta_k T(f_k) (1 - y_k)
         T(f) = 1 where f < lambda, else 0;  E(r) = 1 for proposals of an object, 0 for background
         tail ratio TR(lambda) = sum_j T(f_j) N_j / sum_j N_j
Symbols  R proposals, N samples, K classes without background, z logits, p = sigmoid(z), y truth, f_j the share of
         images that hold class j, N_j how many do, beta_k ~ Bernoulli(gamma), drawn for each sample and class. No
         gradient passes through w.
Differs  where no lambda is given, it is the largest one whose tail ratio is at most a tenth, the upper end of what the
         paper advises. In evaluation nothing is drawn: the softmax form is then plain cross-entropy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from torchive.nn.exchanged_heads import SigmoidRoIHeads, exchange_region_loss
from torchive.nn.sigmoid_classes import SigmoidPredictor, SigmoidRegionLoss

#: The paper's settings: LVIS v0.5 and, as reported for the softmax form, CIFAR-100-LT and ImageNet-LT.
PRESETS: dict[str, dict[str, Any]] = {
    "lvis": {"variant": "sigmoid", "threshold": 1.77e-3},
    "cifar100-lt": {"variant": "softmax", "threshold": 3e-3, "gamma": 0.95},
    "imagenet-lt": {"variant": "softmax", "threshold": 4.3e-4, "gamma": 0.9},
}


def tail_ratio(class_counts: Sequence[int], threshold: float, total: int | None = None) -> float:
    """TR(lambda): the share of the samples that are of classes rarer than the threshold."""
    whole = max(sum(class_counts) if total is None else total, 1)
    return sum(n for n in class_counts if n / whole < threshold) / max(sum(class_counts), 1)


def tail_threshold(class_counts: Sequence[int], tail_share: float = 0.1, total: int | None = None) -> float:
    """The largest frequency of a class that serves as threshold with a tail ratio of at most ``tail_share``.

    All classes below it are rare; where all are alike, none is.
    """
    whole = max(sum(class_counts) if total is None else total, 1)
    return max(n / whole for n in class_counts if tail_ratio(class_counts, n / whole, total) <= tail_share)


def image_counts(annotations: Mapping[str, Any] | str | Path) -> tuple[list[int], int]:
    """How many images hold each category, by ascending category id, and how many images there are.

    Args:
        annotations: a COCO or LVIS annotation file, or its content; several instances in one image count once.

    Raises:
        ValueError: a file without images, categories or annotations.
    """
    content = annotations
    if not isinstance(content, Mapping):
        content = json.loads(Path(content).read_text(encoding="utf-8"))
    missing = [key for key in ("images", "categories", "annotations") if key not in content]
    if missing:
        raise ValueError(f"expected images, categories and annotations, and there is no {missing[0]}")
    holding: dict[int, set[int]] = {category["id"]: set() for category in content["categories"]}
    for annotation in content["annotations"]:
        holding[annotation["category_id"]].add(annotation["image_id"])
    return [len(holding[key]) for key in sorted(holding)], len(content["images"])


def detection_scores(logits: Tensor) -> Tensor:
    """(R, K) sigmoid logits as (R, K + 1) scores, the last column zero, for decoders that expect a background."""
    scores = logits.sigmoid()
    return torch.cat([scores, scores.new_zeros(len(scores), 1)], 1)


def equalize(
    model: nn.Module,
    class_counts: Sequence[int] | tuple[Sequence[int], int],
    *,
    threshold: float | None = None,
    tail_share: float = 0.1,
    total: int | None = None,
    prior: float = 0.001,
    score_threshold: float = 1e-4,
    max_detections: int = 300,
) -> nn.Module:
    """Give torchvision's Faster or Mask R-CNN the detection form of the loss, in place, and return the model.

    The second stage's last layers are new: K sigmoids without a background, at the paper's start. All else keeps its
    weights and names, and ``model(images, targets)`` its losses' names; a prediction has the sigmoids for scores.

    Args:
        model: with K + 1 classes, the background among them.
        class_counts: of the K classes; how many images hold each; or what ``image_counts`` gives, with the ``total``.
        threshold, tail_share, total: as of ``EqualizationLoss``; a threshold needs the number of images.
        prior: score of every class at the start.
        score_threshold, max_detections: of predictions.

    Raises:
        TypeError: another model, or layers. ValueError: counts of another number of classes, a threshold without the
            number of images, or a model whose loss was exchanged already.
    """
    if not isinstance(model, FasterRCNN):
        raise TypeError(f"expected torchvision's FasterRCNN, got {type(model).__name__}")
    stage, predictor = model.roi_heads, model.roi_heads.box_predictor
    if not isinstance(predictor, FastRCNNPredictor):
        raise TypeError(f"expected torchvision's FastRCNNPredictor in the second stage, got {type(predictor).__name__}")
    old = predictor.cls_score
    class_counts, total = _with_total(class_counts, total)
    if threshold is not None and total is None:
        raise ValueError(f"a threshold of {threshold} is a share of the images: expected their number, total")
    classes = old.out_features - 1
    if len(class_counts) != classes:
        raise ValueError(f"expected {classes} class counts, without the background, got {len(class_counts)}")
    loss = EqualizationLoss(
        class_counts=class_counts, threshold=threshold, tail_share=tail_share, total=total, reduction="none"
    )
    exchange_region_loss(stage, SigmoidRegionLoss(loss).to(old.weight.device), SigmoidRoIHeads)
    stage.box_predictor = SigmoidPredictor(old.in_features, classes, prior=prior).to(old.weight)
    stage.score_thresh, stage.detections_per_img = score_threshold, max_detections
    return model


def _with_total(
    class_counts: Sequence[int] | tuple[Sequence[int], int], total: int | None
) -> tuple[Sequence[int], int | None]:
    """Counts and a total; those that ``image_counts`` gives come in one, and a total that is said goes before its."""
    if isinstance(class_counts, tuple) and len(class_counts) == 2 and isinstance(class_counts[0], Sequence):
        counts, whole = class_counts
        return counts, int(whole) if total is None else total
    return class_counts, total


class EqualizationLoss(nn.Module):
    """(N, K) logits and their truth to a scalar, or to one value for each row with "none".

    Args:
        class_counts: samples of each class, or images that hold it (``image_counts``); recipes fill it in, those of
            detectors with objects.
        variant: "sigmoid" takes classes (N,) from 0 to K, K for background, or truths (N, K) in 0 or 1, a row of zeros
            for background. "softmax" takes classes (N,) from 0 to K - 1.
        threshold: lambda, the frequency below which a class is rare; None finds it by ``tail_share``.
        tail_share: see ``tail_threshold``.
        total: samples or images that the counts are a share of; their sum if None, which is not the number of images
            where an image holds several classes.
        gamma: the chance with which the softmax form ignores a rare class for a sample of another one.
        reduction: "mean" over rows, "sum" or "none".

    Raises:
        ValueError: an unknown ``variant`` or ``reduction``, a number out of range, no classes; in ``forward``, shapes
            that do not fit.
        TypeError: logits that are not floating, or truths of the wrong kind.
    """

    def __init__(
        self,
        *,
        class_counts: Sequence[int],
        variant: Literal["sigmoid", "softmax"] = "sigmoid",
        threshold: float | None = None,
        tail_share: float = 0.1,
        total: int | None = None,
        gamma: float = 0.95,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        if variant not in ("sigmoid", "softmax"):
            raise ValueError(f"variant must be sigmoid or softmax, got {variant!r}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        if not len(class_counts) or min(class_counts) < 0:
            raise ValueError(f"class_counts must hold a number >= 0 for each class, got {list(class_counts)}")
        if not 0 <= gamma <= 1 or not 0 <= tail_share <= 1 or (threshold is not None and threshold < 0):
            raise ValueError(
                "gamma and tail_share must lie in [0, 1] and threshold be >= 0, "
                f"got {gamma}, {tail_share} and {threshold}"
            )
        self.variant, self.gamma, self.reduction = variant, gamma, reduction
        whole = sum(class_counts) if total is None else total
        self.threshold = tail_threshold(class_counts, tail_share, total) if threshold is None else threshold
        frequency = torch.as_tensor(class_counts, dtype=torch.float32) / max(whole, 1)
        self.frequency: Tensor
        self.rare: Tensor
        self.register_buffer("frequency", frequency)  # (K,)
        self.register_buffer("rare", torch.tensor([n / max(whole, 1) < self.threshold for n in class_counts]))

    @classmethod
    def preset(
        cls,
        name: str,
        class_counts: Sequence[int] | tuple[Sequence[int], int],
        *,
        total: int | None = None,
        **options: Any,
    ) -> EqualizationLoss:
        """The paper's settings for "lvis", "cifar100-lt" or "imagenet-lt".

        Args:
            name: of the settings.
            class_counts: of images that hold each class, or what ``image_counts`` gives; samples of each class for the
                other two.
            total: number of images, which "lvis" needs: an image holds several classes, so that the counts' sum is
                not it.
            options: as of ``EqualizationLoss``, before the settings.

        Raises:
            ValueError: another name, or "lvis" without a total.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
        counts, total = _with_total(class_counts, total)
        if name == "lvis" and total is None:
            raise ValueError("the threshold of lvis is a share of the images: expected their number, total")
        return cls(class_counts=counts, total=total, **{**PRESETS[name], **options})

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        if prediction.ndim != 2 or prediction.shape[1] != len(self.rare) or len(target) != len(prediction):
            raise ValueError(
                f"expected (N, {len(self.rare)}) and N truths, got {tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        if not prediction.is_floating_point():
            raise TypeError(f"expected floating logits, got {prediction.dtype}")
        logits = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        each = self._softmax(logits, target) if self.variant == "softmax" else self._sigmoid(logits, target)
        if self.reduction == "none":
            return each
        return each.sum() if self.reduction == "sum" else each.sum() / max(len(each), 1)

    def _sigmoid(self, logits: Tensor, target: Tensor) -> Tensor:
        classes, size = target.ndim == 1 and not target.is_floating_point(), logits.shape[1]
        if classes:
            target = target.long()
            truth = logits.new_zeros(len(target), size + 1).scatter_(1, target[:, None], 1)[:, :-1]
        else:
            truth = target.to(logits.dtype)
        if truth.shape != logits.shape:
            raise ValueError(f"expected classes (N,) or truths {tuple(logits.shape)}, got {tuple(target.shape)}")
        there = target < size if classes else truth.any(1)  # E(r)
        weight = torch.outer(there.to(logits.dtype), -self.rare.to(logits.dtype)).add_(1)  # 1 - E(r) T(f_j)
        if classes:
            weight.scatter_(1, target.clamp(max=size - 1)[:, None], 1)  # of background no weight is below one
        else:
            weight.masked_fill_(truth != 0, 1)
        return F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="none").sum(1)  # (N,)

    def _softmax(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point() or target.ndim != 1:
            raise TypeError(f"the softmax form expects integer classes (N,), got {target.dtype} {tuple(target.shape)}")
        target = target.long()
        if self.training and self.gamma > 0:
            drawn = torch.rand(logits.shape, device=logits.device) < self.gamma  # beta
            own = F.one_hot(target, logits.shape[1]).bool()
            logits = logits.masked_fill(drawn & self.rare & ~own, -torch.inf)  # z + log w
        return F.cross_entropy(logits, target, reduction="none")

    def extra_repr(self) -> str:
        return (
            f"variant={self.variant}, threshold={self.threshold:.3g}, rare={int(self.rare.sum())}, gamma={self.gamma}"
        )
