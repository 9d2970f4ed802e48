"""An order of samples in which those of one pair follow each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def pair_order(pair_ids: Sequence[int], seed: int) -> Callable[[int], list[int]]:
    """A function from an epoch to the order of its samples: pairs in a new order, and the samples of each.

    Args:
        pair_ids: of each sample; samples of one number show the same items.
        seed: of the order.
    """
    members: dict[int, list[int]] = {}
    for index, pair in enumerate(pair_ids):
        members.setdefault(pair, []).append(index)
    groups = list(members.values())

    def order(epoch: int) -> list[int]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        listed = [groups[k] for k in torch.randperm(len(groups), generator=draw).tolist()]
        return [group[k] for group in listed for k in torch.randperm(len(group), generator=draw).tolist()]

    return order
