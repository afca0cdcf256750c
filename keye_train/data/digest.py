"""A number that stands for a set of samples, so that a step can be audited without a line for each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

DIGEST_BITS = 40
"""Of one sample. Sums over 2^22 samples of a step stay exact in int64, over any number of ranks."""


def digest_samples(samples: Iterable[tuple[str, int]]) -> int:
    """Sum of the digests of samples, each (source, row of the source).

    A sum, so that the order does not matter and ranks simply add up theirs. It finds accidents, not forgers.
    """
    return sum(_digest(source, row) for source, row in samples)


def _digest(source: str, row: int) -> int:
    digest = hashlib.blake2b(f"{source}/{row}".encode(), digest_size=DIGEST_BITS // 8).digest()
    return int.from_bytes(digest, "little")
