"""The mask stages and the way that features flow from one to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchive.nn.mask_head import MaskHead, of_label


class MaskCascade(nn.Module):
    """Pooled features (R, C, s, s) to mask logits (R, K, 2 s, 2 s) of T stages.

    With ``mask_flow`` stage t adds a 1x1 convolution (with ReLU) of the features that stage t - 1 computes on the same
    regions (section 3.2); without it every stage stands alone.

    Args:
        channels: C.
        num_classes: K.
        stages: T.
        mask_flow: whether features go from stage to stage.
    """

    def __init__(self, channels: int, num_classes: int, *, stages: int = 3, mask_flow: bool = True) -> None:
        super().__init__()
        self.heads = nn.ModuleList(MaskHead(channels, num_classes, width=channels) for _ in range(stages))
        self.flows = nn.ModuleList()
        if mask_flow:
            self.flows.extend(nn.Conv2d(channels, channels, 1) for _ in range(stages - 1))

    def forward(self, pooled: Tensor, stage: int) -> Tensor:
        """Logits of one stage; the stages before it run on the same regions, their logits are not made."""
        logits: Tensor = self.heads[stage].mask_predictor(self._features(pooled, stage, stage)[0])  # type: ignore[operator]
        return logits

    def probabilities(self, pooled: Tensor, labels: Tensor, *, last: bool = False) -> Tensor:
        """The mask (R, 2 s, 2 s) of each region's label (R,), in [0, 1]: the mean of all stages, or of the last one."""
        final = len(self.heads) - 1
        first = final if last else 0
        features = self._features(pooled, first, final)
        masks = [
            of_label(head.mask_predictor(x), labels).sigmoid()  # type: ignore[operator]
            for head, x in zip(self.heads[first:], features, strict=True)
        ]
        return torch.stack(masks).mean(0)

    def _features(self, pooled: Tensor, first: int, last: int) -> list[Tensor]:
        """Features (R, C, s, s) before the transposed convolution of the stages ``first`` to ``last``."""
        if not self.flows:
            return [head.mask_head(pooled) for head in self.heads[first : last + 1]]  # type: ignore[operator]
        features = [self.heads[0].mask_head(pooled)]  # type: ignore[operator]
        for flow, head in zip(self.flows[:last], self.heads[1 : last + 1], strict=True):
            features.append(head.mask_head(pooled + flow(features[-1]).relu()))  # type: ignore[operator]
        return features[first:]
