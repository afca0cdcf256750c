"""What samples take of both towers: text tokens from the index, media from their sizes and the resolution settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from keye_train.model.positions import grid_tokens, media_grid
from keye_train.sample import MediaInfo, MediaKind, SampleError
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
    table: pa.Table,
    resolution: ResolutionSettings,
    pair_tokens: int | None = None,
    known: dict[tuple, tuple[int, int] | str] | None = None,
) -> tuple[Sizes, dict[int, str]]:
    """Sizes of the samples of one shard.

    Args:
        table: columns text_tokens, media and error of an index.
        resolution: decides what media cost.
        pair_tokens: see ``Corpus.open``.
        known: sizes of media met before; filled with the new ones.

    Returns:
        Columns, and row -> reason for the samples that cannot be trained on.
    """
    known = {} if known is None else known
    media = table["media"].combine_chunks()
    wrong = pc.indices_nonzero(pc.is_valid(table["error"])).to_pylist()
    errors = {row: table["error"][row].as_py() for row in wrong}
    owners = pc.list_parent_indices(media).to_numpy()
    flat = media.flatten()
    examples, number = _distinct(flat)
    distinct = flat.take(pa.array(examples)).to_pylist()
    costs = [_known_cost(tuple(size.values()), known, resolution) for size in distinct]
    for bad in [place for place, cost in enumerate(costs) if isinstance(cost, str)]:
        for row in owners[number == bad].tolist():
            errors.setdefault(row, str(costs[bad]))
    table_of_costs = np.array([(0, 0) if isinstance(cost, str) else cost for cost in costs], dtype=np.int64)
    tokens, patches = table_of_costs.reshape(-1, 2)[number].T
    rows = len(table)
    if pair_tokens is None:
        total = table["text_tokens"].to_numpy().astype(np.int64) + _sum_by(owners, tokens, rows)
    else:
        total = np.full(rows, pair_tokens, dtype=np.int64)
        is_image = pc.equal(flat.field("kind"), MediaKind.image.value).to_numpy(zero_copy_only=False)
        counts = np.bincount(owners, minlength=rows)
        images = _sum_by(owners, is_image, rows)
        for row in np.flatnonzero((counts != 1) | (images != 1)).tolist():
            errors.setdefault(row, f"not an image-caption pair: {counts[row]} media, {images[row]} of them images")
    return Sizes(total, total**2, _sum_by(owners, patches, rows), _sum_by(owners, patches**2, rows)), errors


def _sum_by(owners: np.ndarray, values: np.ndarray, rows: int) -> np.ndarray:
    """Sum of the values of each owner, exact below 2^53: [rows] int64."""
    return np.bincount(owners, values, minlength=rows).astype(np.int64)


def _distinct(media: pa.StructArray) -> tuple[np.ndarray, np.ndarray]:
    """One place of each distinct size, and the number of its size for every place."""
    code = np.zeros(len(media), dtype=np.int64)
    for field in media.type:
        encoded = pc.struct_field(media, field.name).dictionary_encode()
        code = code * len(encoded.dictionary) + encoded.indices.to_numpy()
        _, code = np.unique(code, return_inverse=True)  # keeps the codes small
    _, examples, number = np.unique(code, return_index=True, return_inverse=True)
    return examples, number


def _known_cost(
    size: tuple, known: dict[tuple, tuple[int, int] | str], resolution: ResolutionSettings
) -> tuple[int, int] | str:
    """Tokens and patches of a size of media, or what is wrong with it."""
    if size not in known:
        kind, width, height, frames, fps = size
        try:
            grid = media_grid(MediaInfo(MediaKind(kind), width, height, frames, fps), resolution)
            known[size] = grid_tokens(grid), grid[0] * grid[1] * grid[2]
        except SampleError as error:
            known[size] = str(error)
    return known[size]
