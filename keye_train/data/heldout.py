"""Held-out samples: drawn, read and packed, for scores after training and for losses during it."""

from __future__ import annotations

import logging
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from keye_train.data.formats import parse_sample
from keye_train.data.index import read_columns
from keye_train.data.opening import has_index
from keye_train.data.packing import Budget
from keye_train.data.paths import find_shards
from keye_train.data.reader import ShardReader
from keye_train.sample import Sample, SampleError, SampleRef
from keye_train.settings import SettingsError, SourceSettings, StorageSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Skipped:
    """A held-out sample that is not asked."""

    shard: str
    key: str
    reason: str


def read_drawn(
    source: SourceSettings,
    count: int,
    seed: int,
    name: str,
    make: Callable[[Sample], T],
    storage: StorageSettings | None = None,
    behind: int = 0,
) -> Iterator[T | Skipped]:
    """Draw ``count`` samples of a source without replacement behind the first ``behind``, or all that are left where it
    has fewer; see ``read_rows``."""
    yield from read_rows(drawn_rows(source, count, seed, name, storage, behind), name, make, storage)


def drawn_rows(
    source: SourceSettings, count: int, seed: int, name: str, storage: StorageSettings | None = None, behind: int = 0
) -> list[tuple[str, int]]:
    """(shard, row) of ``count`` samples of a source, drawn behind the first ``behind``. Depends on seed, name and the
    rows of its shards alone.

    Raises:
        SettingsError: a shard or its index is missing.
    """
    rows = shard_rows(source, storage)
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return [rows[number] for number in sorted(draw.permutation(len(rows))[behind : behind + count].tolist())]


def shard_rows(source: SourceSettings, storage: StorageSettings | None = None) -> list[tuple[str, int]]:
    """(shard, row) of all samples of a source, from its indexes.

    Raises:
        SettingsError: a shard or its index is missing.
    """
    shards = _indexed_shards(source, storage)
    return [(shard, row) for shard in shards for row in range(len(read_columns(shard, ["key"], storage)))]


def read_rows(
    rows: Iterable[tuple[str, int]], name: str, make: Callable[[Sample], T], storage: StorageSettings | None = None
) -> Iterator[T | Skipped]:
    """The samples of some rows, one at a time and in order.

    Args:
        rows: (shard, row).
        name: of the task.
        make: turns a sample into what is yielded; its SampleErrors count as the sample's.
        storage: how remote shards are read.
    """
    reader = ShardReader(storage)
    try:
        for shard, row in rows:
            ref = SampleRef(name, shard, f"row {row}")
            try:
                key, members = reader.read(shard, row)
                ref = SampleRef(name, shard, key)
                made: T | Skipped = make(parse_sample(ref, members))
            except SampleError as error:
                made = leave_out(name, ref, error)
            yield made
    finally:
        reader.close()


def leave_out(task: str, ref: SampleRef, error: SampleError) -> Skipped:
    """Log that a sample is not asked, and why."""
    logger.warning("%s: %s of %s is left out: %s", task, ref.key, ref.shard, error)
    return Skipped(ref.shard, ref.key, str(error))


def fill_packs(samples: Sequence[T], sizes: Sequence[tuple[int, int]], budget: Budget) -> Iterator[list[T]]:
    """Neighbouring samples that share a pack, within both budgets; a larger sample gets a pack of its own.

    Args:
        samples: in order.
        sizes: tokens and patches of each.
        budget: of a pack.
    """
    pack: list[T] = []
    tokens = patches = 0
    for sample, (own_tokens, own_patches) in zip(samples, sizes, strict=True):
        if pack and (tokens + own_tokens > budget.max_tokens or patches + own_patches > budget.max_patches):
            yield pack
            pack, tokens, patches = [], 0, 0
        pack.append(sample)
        tokens, patches = tokens + own_tokens, patches + own_patches
    if pack:
        yield pack


def _indexed_shards(source: SourceSettings, storage: StorageSettings | None) -> list[str]:
    try:
        shards = find_shards(source.shards, storage)
    except ValueError as error:
        raise SettingsError(f"held-out data: {error}") from error
    for shard in shards:
        if not has_index(shard, storage):
            raise SettingsError(
                f"the held-out shard {shard} has no index; run: keye-data index {shlex.quote(shard)} --tokenizer FOLDER"
            )
    return shards
