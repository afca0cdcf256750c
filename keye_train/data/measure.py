"""What samples take of both towers: text tokens from the index, media from their sizes and the resolution settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from keye_train.data.facts import KINDS, Facts
from keye_train.data.grids import media_sizes
from keye_train.sample import MediaKind
from keye_train.settings import ResolutionSettings


@dataclass(frozen=True)
class Sizes:
    """What samples, or whole packs, take of both towers, as parallel columns.

    Whole numbers: their sums are exact, so every machine plans the same.
    """

    tokens: np.ndarray  # [N] int64 language tokens
    tokens_squared: np.ndarray  # [N] int64: sum over samples of their tokens squared
    patches: np.ndarray  # [N] int64 vision patches
    patches_squared: np.ndarray  # [N] int64: sum over images and videos of their patches squared

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Sizes:
        """Apply a function to every column."""
        columns = (self.tokens, self.tokens_squared, self.patches, self.patches_squared)
        return Sizes(*(function(column) for column in columns))

    def take(self, rows: np.ndarray) -> Sizes:
        """The same columns for some rows."""
        return self.map(lambda column: column[rows])

    @classmethod
    def concatenate(cls, parts: Sequence[Sizes]) -> Sizes:
        """Columns one after another."""
        names = ("tokens", "tokens_squared", "patches", "patches_squared")
        empty = [np.zeros(0, dtype=np.int64)]
        return cls(*(np.concatenate(empty + [getattr(part, name) for part in parts]) for name in names))


def measure(
    facts: Facts, resolution: ResolutionSettings, pair_tokens: int | None = None
) -> tuple[Sizes, dict[int, str]]:
    """Sizes of some samples.

    Args:
        facts: of their rows in an index.
        resolution: decides what media cost.
        pair_tokens: see ``Corpus.open``.

    Returns:
        Columns, and row -> reason for the samples that cannot be trained on.
    """
    rows, counts = len(facts), facts.rows["media"].astype(np.int64)
    owners = np.repeat(np.arange(rows), counts)
    tokens, patches, wrong = media_sizes(facts.media, resolution)
    errors = dict(facts.errors)
    for place, reason in wrong.items():
        errors.setdefault(int(owners[place]), reason)
    if pair_tokens is None:
        total = facts.rows["text_tokens"] + _sum_by(owners, tokens, rows)
    else:
        total = np.full(rows, pair_tokens, dtype=np.int64)
        images = _sum_by(owners, facts.media["kind"] == KINDS.index(MediaKind.image), rows)
        for row in np.flatnonzero((counts != 1) | (images != 1)).tolist():
            errors.setdefault(row, f"not an image-caption pair: {counts[row]} media, {images[row]} of them images")
    return Sizes(total, total**2, _sum_by(owners, patches, rows), _sum_by(owners, patches**2, rows)), errors


def _sum_by(owners: np.ndarray, values: np.ndarray, rows: int) -> np.ndarray:
    """Sum of the values of each owner, exact below 2^53: [rows] int64."""
    return np.bincount(owners, values, minlength=rows).astype(np.int64)
