"""Ternary vectors as two bits an entry, and their products by counting bits. Plain NumPy on the processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
_BLOCK = 1 << 15  # words that are worked on at a time, so that they stay in the cache


def popcount(words: NDArray[Any]) -> NDArray[np.uint8]:
    """How many bits of each unsigned 64-bit word are set."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    return count_by_halves(words)


def count_by_halves(words: NDArray[Any]) -> NDArray[np.uint8]:
    """As ``popcount``, by adding neighbouring fields; for NumPy before version 2."""
    n = np.asarray(words, np.uint64)
    n = n - ((n >> np.uint64(1)) & np.uint64(0x5555555555555555))
    n = (n & np.uint64(0x3333333333333333)) + ((n >> np.uint64(2)) & np.uint64(0x3333333333333333))
    n = (n + (n >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((n * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def as_words(octets: NDArray[np.uint8]) -> Words:
    """(..., B) octets to (..., ceil(B / 8)) words, zeros behind."""
    missing = -octets.shape[-1] % 8
    if missing:
        octets = np.concatenate([octets, np.zeros((*octets.shape[:-1], missing), np.uint8)], -1)
    return np.ascontiguousarray(octets).view(np.uint64)


def pack(values: Tensor) -> tuple[Words, Words]:
    """(..., L) of -1, 0 and 1 to its masks and signs, (..., ceil(L / 64)) words each.

    Raises:
        ValueError: another value.
    """
    if not bool((values == values.sign()).all()):
        raise ValueError(f"expected values in -1, 0 and 1, got {float(values.min())} to {float(values.max())}")
    array = values.detach().cpu().numpy()
    return as_words(np.packbits(array != 0, axis=-1)), as_words(np.packbits(array > 0, axis=-1))


def ternary_dot(left: tuple[Words, Words], right: tuple[Words, Words]) -> NDArray[np.int64]:
    """Products of packed vectors, (..., W) with (..., W) to (...): the masked Hamming distance of the paper."""
    both = left[0] & right[0]
    differ = (left[1] ^ right[1]) & both
    return popcount(both).sum(-1, dtype=np.int64) - 2 * popcount(differ).sum(-1, dtype=np.int64)


def ternary_products(rows: tuple[Words, Words], filters: tuple[Words, Words]) -> NDArray[np.int32]:
    """All products of packed rows (P, W) and filters (O, W): (P, O)."""
    (row_masks, row_signs), (masks, signs) = rows, filters
    count, width = row_masks.shape
    masks, signs = np.ascontiguousarray(masks.T), np.ascontiguousarray(signs.T)  # (W, O)
    total = np.zeros((count, masks.shape[1]), np.int32)
    step = max(_BLOCK // max(masks.shape[1], 1), 1)
    for start in range(0, count, step):
        part = total[start : start + step]
        both, differ = np.empty(part.shape, np.uint64), np.empty(part.shape, np.uint64)
        for w in range(width):
            np.bitwise_and(row_masks[start : start + step, w, None], masks[w], out=both)
            np.bitwise_xor(row_signs[start : start + step, w, None], signs[w], out=differ)
            np.bitwise_and(differ, both, out=differ)
            part += popcount(both)
            far = popcount(differ)
            part -= far
            part -= far
    return total


def hamming_product(left: Words, right: Words, length: int) -> NDArray[np.int64]:
    """Products of packed binary vectors of -1 and 1: ``length - 2 hamming``, where all masks are ones."""
    return length - 2 * popcount(left ^ right).sum(-1, dtype=np.int64)


def as_map(array: NDArray[Any], like: Tensor) -> Tensor:
    """(N, *S, C) to a tensor (N, C, *S) of the type, device and memory layout of another."""
    y = torch.from_numpy(array).to(like.device, like.dtype).movedim(-1, 1)
    return y.contiguous() if like.is_contiguous() else y
