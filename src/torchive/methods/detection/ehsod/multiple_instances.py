"""What the proposals of an image say together of its classes: learning from images without boxes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6


class ImageHead(nn.Module):
    """Features (R, hidden) of proposals to shares (R, K) of their images' class scores.

    Bilen and Vedaldi, "Weakly Supervised Deep Detection Networks", CVPR 2016, arXiv:1511.02853: which class a proposal
    shows, times which of its image's proposals shows the class. Summed over an image's proposals the shares lie in 0
    to 1.
    """

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Linear(hidden, num_classes)
        self.detect = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor, image: Tensor, images: int) -> Tensor:
        """``image`` (R,) is the number of each proposal's image, below ``images``."""
        return self.classify(x).softmax(1) * softmax_within(self.detect(x), image, images)


def softmax_within(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """Softmax of each column of ``x`` (R, K) over the rows of one group; ``group`` (R,) is below ``groups``."""
    index = group[:, None].expand_as(x)
    top = x.new_full((groups, x.shape[1]), -torch.inf).scatter_reduce(0, index, x.detach(), "amax")
    power = (x - top.gather(0, index)).exp()
    total = x.new_zeros(groups, x.shape[1]).scatter_add(0, index, power)
    return power / total.gather(0, index)


def image_scores(shares: Tensor, image: Tensor, images: int) -> Tensor:
    """Class scores (images, K) of the images: the sums of their proposals' shares (R, K)."""
    return shares.new_zeros(images, shares.shape[1]).index_add(0, image, shares)


def image_score_loss(scores: Tensor, present: Tensor) -> Tensor:
    """Binary cross-entropy of scores (N, K) in 0 to 1 against the classes that are present, mean over both."""
    sure = scores.float().clamp(EPS, 1 - EPS)  # autocast refuses cross-entropy of probabilities
    truth = present.to(sure)
    return -(truth * sure.log() + (1 - truth) * (1 - sure).log()).mean()


def best_boxes(shares: Tensor, boxes: Tensor, image: Tensor, present: Tensor) -> list[dict[str, Tensor]]:
    """For each image the box of the largest share for each of its classes, as a target.

    Boxes with a side below one pixel, such as those that were moved out of their image and cut, are nobody's; where
    no other is left the image's target is empty.

    Args:
        shares: (R, K), ``boxes`` (R, 4) in pixels, ``image`` (R,) of the proposals.
        present: (N, K).
    """
    found, wide = [], ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    for k, shown in enumerate(present):
        rows, labels = torch.nonzero((image == k) & wide)[:, 0], torch.nonzero(shown)[:, 0]
        labels = labels[: 0 if not len(rows) else None]
        best = shares[rows][:, labels].argmax(0) if len(rows) else rows
        found.append({"boxes": boxes[rows][best], "labels": labels + 1})
    return found
