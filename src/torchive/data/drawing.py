"""Random draws that depend on a key and not on the order of calls."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def key_seed(*key: object) -> int:
    """A 63-bit seed from a key of numbers and strings, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def kept_generators() -> Iterator[None]:
    """Give the global CPU generators of torch, Python and NumPy back as they were."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


def seed_generators(seed: int) -> None:
    """Seed the global CPU generators of torch, Python and NumPy; devices are left alone."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(length)``, a function of seed and epoch alone."""
    generator = torch.Generator().manual_seed(key_seed("order", seed, epoch))
    return torch.randperm(length, generator=generator).tolist()
