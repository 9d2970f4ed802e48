"""ScheduledDropPath: paths of a cell are dropped for whole samples, the more the deeper and the later."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScheduledDropPath(nn.Module):
    """Drop a path's map for a sample, in training: (N, C, H, W) to the same shape, of the same expectation.

    The share that is kept is 1 - drop * place * progress, or without schedule 1 - drop * place throughout. The training
    loop calls ``before_step(progress)`` before each step; a loop of your own does so for every module that has it.

    Args:
        drop: share of the samples that lose the path in the last cell at the end.
        place: (cell + 1) / cells.
        scheduled: whether the share rises with ``progress``; the paper's constant form is False.

    Raises:
        ValueError: ``drop`` outside [0, 1), or ``place`` outside (0, 1].
    """

    keep: Tensor

    def __init__(self, *, drop: float, place: float = 1.0, scheduled: bool = True) -> None:
        super().__init__()
        if not 0 <= drop < 1 or not 0 < place <= 1:
            raise ValueError(f"expected drop in [0, 1) and place in (0, 1], got {drop} and {place}")
        self.drop, self.place, self.scheduled = drop, place, scheduled
        start = 1.0 if scheduled else 1 - drop * place
        self.register_buffer("keep", torch.tensor(start, dtype=torch.float32), persistent=False)

    def before_step(self, progress: float) -> None:
        """Set the share that is kept for the part of the training that is done, 0 to 1."""
        if self.scheduled:
            self.keep.fill_(1 - self.drop * self.place * min(max(progress, 0.0), 1.0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)
