"""The procedure: encoder, projection head, loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.training.simclr.diagnostics import alignment, contrastive_accuracy, uniformity
from torchive.methods.training.simclr.loss import NTXentLoss
from torchive.nn.encoder import build_encoder
from torchive.nn.global_norm import GlobalBatchNorm
from torchive.nn.views import SimCLRViews
from torchive.structures import Batch


class ProjectionHead(nn.Sequential):
    """g: h (N, D) to z (N, E).

    Args:
        in_channels: D.
        head: "mlp" (linear, ReLU, linear), "linear", or "none", which passes h.
        hidden_dim: width of the middle of the "mlp"; D if None.
        embedding_dim: E; not used by "none".
        head_norm: batch norm behind each linear layer, the last one without a shift, as the authors' code has it.

    Raises:
        ValueError: an unknown head, or a size below one.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        head: Literal["mlp", "linear", "none"] = "mlp",
        hidden_dim: int | None = None,
        embedding_dim: int = 128,
        head_norm: bool = True,
    ) -> None:
        hidden = in_channels if hidden_dim is None else hidden_dim
        if head not in ("mlp", "linear", "none"):
            raise ValueError(f"head must be mlp, linear or none, got {head!r}")
        if min(in_channels, hidden, embedding_dim) < 1:
            raise ValueError(f"sizes must be >= 1, got {in_channels}, {hidden} and {embedding_dim}")
        parts: list[nn.Module] = []
        if head == "mlp":
            parts = [nn.Linear(in_channels, hidden, bias=not head_norm), nn.ReLU()]
            if head_norm:
                parts.insert(1, nn.BatchNorm1d(hidden))
            in_channels = hidden
        if head != "none":
            parts.append(nn.Linear(in_channels, embedding_dim, bias=False))
            if head_norm:
                parts.append(_Unshifted(embedding_dim))
        super().__init__(*parts)


class _Unshifted(nn.BatchNorm1d):
    """Batch norm with a scale and no shift."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bias = None  # type: ignore[assignment]


class SimCLR(nn.Module):
    """Contrastive training of an encoder on batches of two views (N, 2, C, H, W); ``deployable`` is the encoder.

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME``, a backbone, or a module that gives (N, D) or (N, D, h, w).
        in_channels: C, for a named backbone.
        head: projection head, "mlp", "linear" or "none".
        hidden_dim: width of the middle of the "mlp"; D if None.
        embedding_dim: E, length of z.
        head_norm: batch norm in the head, as the authors' code.
        temperature: tau of NT-Xent; 0.1 for many classes, 0.5 for few (CIFAR-10).
        loss: of two views' embeddings, such as ``NTLogisticLoss()``; NT-Xent if None.
        gather: whether NT-Xent sees the embeddings of all processes.
        stem: "backbone" as it is, or "small" for small images: a ResNet's first convolution 3 x 3 with stride 1, no
            max pooling.
        sync_norm: batch norms take the statistics of all processes together.
        feature_dim: D, where it cannot be found by a trial pass.

    Raises:
        ValueError: an unknown name, head or stem, or D cannot be found; in ``losses``, inputs that are not two views.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "timm/resnet18",
        *,
        in_channels: int = 3,
        head: Literal["mlp", "linear", "none"] = "mlp",
        hidden_dim: int | None = None,
        embedding_dim: int = 128,
        head_norm: bool = True,
        temperature: float = 0.1,
        loss: nn.Module | None = None,
        gather: bool = True,
        stem: Literal["backbone", "small"] = "backbone",
        sync_norm: bool = False,
        feature_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(backbone, in_channels=in_channels, stem=stem, feature_dim=feature_dim)
        self.head = ProjectionHead(
            self.encoder.feature_dim,
            head=head,
            hidden_dim=hidden_dim,
            embedding_dim=embedding_dim,
            head_norm=head_norm,
        )
        self.embedding_dim = self.encoder.feature_dim if head == "none" else embedding_dim
        self.loss = NTXentLoss(temperature=temperature, gather=gather) if loss is None else loss
        if sync_norm:
            GlobalBatchNorm.convert(self)

    @staticmethod
    def views(image_size: int, **options: Any) -> SimCLRViews:
        """The transform that makes the two views; options as ``SimCLRViews``."""
        return SimCLRViews(image_size, **options)

    def forward(self, inputs: Tensor) -> Tensor:
        """Representations h (N, D) of images (N, C, H, W)."""
        return self.encoder(inputs)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss": scalar}`` of two views (N, 2, C, H, W)."""
        first, second = self.embed(batch.inputs)
        return {"loss": self.loss(first, second)}

    def embed(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """z of the first and of the second views, (N, E) each; both go through the network as one batch of 2N."""
        if not isinstance(inputs, Tensor) or inputs.ndim != 5 or inputs.shape[1] != 2:
            got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"expected two views (N, 2, C, H, W), got {got}")
        if not len(inputs):
            nothing = inputs.new_zeros(0, self.embedding_dim) * sum(p.sum() * 0 for p in self.parameters())
            return nothing, nothing
        z = self.head(self.encoder(inputs.flatten(0, 1))).unflatten(0, (-1, 2))  # (N, 2, E)
        return z[:, 0], z[:, 1]

    def deployable(self) -> nn.Module:
        """The encoder f, images (N, C, H, W) to representations h (N, D)."""
        return self.encoder

    @torch.no_grad()
    def diagnose(self, batch: Batch) -> dict[str, float]:
        """``contrastive_accuracy``, ``alignment`` and ``uniformity`` of a batch's embeddings, in the current mode."""
        first, second = self.embed(batch.inputs)
        return {
            "contrastive_accuracy": float(contrastive_accuracy(first, second)),
            "alignment": float(alignment(first, second)),
            "uniformity": float(uniformity(first)),
        }
