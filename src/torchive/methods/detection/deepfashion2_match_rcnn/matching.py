"""The matching network: a vector of each item, how well two of them agree, and retrieval."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

#: What the matching network may read: features of which branches, one after the other.
FEATURES: dict[str, tuple[str, ...]] = {
    "class": ("class",),
    "pose": ("pose",),
    "mask": ("mask",),
    "pose+class": ("pose", "class"),
    "mask+class": ("mask", "class"),
}
_CHUNK = 2**25  # scores that stand in memory at a time


class MatchingNetwork(nn.Module):
    """Features (R, C, s, s) of items to vectors (R, E), and pairs of vectors to two logits, different and same.

    3x3 convolutions with ReLU, the mean over positions, a linear layer; of a pair the squared difference of each
    element and a linear layer, so that the order of the two does not matter (section 4.1).

    Args:
        in_channels: C.
        width: of the convolutions.
        depth: their number.
        embedding_dim: E.
    """

    def __init__(self, in_channels: int, *, width: int = 256, depth: int = 4, embedding_dim: int = 256) -> None:
        super().__init__()
        layers = [
            Conv2dNormActivation(width if k else in_channels, width, 3, norm_layer=None, inplace=False)
            for k in range(depth)
        ]
        self.convs = nn.Sequential(*layers)
        self.embedding = nn.Linear(width, embedding_dim)
        self.decision = nn.Linear(embedding_dim, 2)
        # PyTorch's own start halves the features in each layer: their squared differences would begin near zero
        for layer in self.convs.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(self.embedding.weight, nonlinearity="linear")
        nn.init.zeros_(self.embedding.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Vectors (R, E)."""
        vectors: Tensor = self.embedding(self.convs(features).mean((2, 3)))
        return vectors

    def pair_logits(self, first: Tensor, second: Tensor) -> Tensor:
        """Logits (M, 2), different and same, of vectors (M, E) and (M, E)."""
        logits: Tensor = self.decision((first - second).square())
        return logits

    def match(self, query: Tensor, gallery: Tensor) -> Tensor:
        """The probability (Q, G) that vectors (Q, E) and (G, E) are of one item.

        The softmax of two logits is the sigmoid of their difference, which is a weighted sum of squares: three matrix
        products in place of Q G differences. Both sides are moved by one mean first, which changes no difference and
        keeps the squares small.
        """
        return self._margin(query, gallery).sigmoid()

    def retrieve(self, query: Tensor, gallery: Tensor, *, k: int = 20) -> tuple[Tensor, Tensor]:
        """The k best of vectors (G, E) for each of vectors (Q, E): probabilities and rows, both (Q, min(k, G))."""
        k = min(k, len(gallery))
        step = max(_CHUNK // max(len(gallery), 1), 1)
        found = [self._margin(part, gallery).topk(k, 1) for part in query.split(step)]
        values = torch.cat([value for value, _ in found]).sigmoid()
        return values, torch.cat([row for _, row in found])

    def _margin(self, query: Tensor, gallery: Tensor) -> Tensor:
        if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
            raise ValueError(f"expected vectors (Q, E) and (G, E), got {tuple(query.shape)} and {tuple(gallery.shape)}")
        kind = torch.promote_types(query.dtype, torch.float32)
        weight = (self.decision.weight[1] - self.decision.weight[0]).to(kind)
        bias = (self.decision.bias[1] - self.decision.bias[0]).to(kind)
        middle = torch.cat([query, gallery]).to(kind).mean(0) if len(query) + len(gallery) else 0
        a, b = query.to(kind) - middle, gallery.to(kind) - middle
        return torch.addmm((a.square() @ weight)[:, None] + (b.square() @ weight) + bias, a * weight, b.T, alpha=-2)


def branches_of(matching: str | None, *, landmarks: bool, masks: bool) -> tuple[str, ...]:
    """The branches whose features items are matched by, none for None; ``landmarks`` and ``masks``: which there are.

    Raises:
        ValueError: an unknown name, or a branch that is switched off.
    """
    if matching is None:
        return ()
    if matching not in FEATURES:
        raise ValueError(f"matching must be one of {', '.join(FEATURES)} or None, got {matching!r}")
    for name, there in (("pose", landmarks), ("mask", masks)):
        if name in FEATURES[matching] and not there:
            raise ValueError(f"matching={matching!r} reads the {name} branch, which is switched off")
    return FEATURES[matching]
