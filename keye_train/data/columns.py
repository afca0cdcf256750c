"""Measured sizes of the samples of a source, block by block: what is looked at is measured, what is old is forgotten.

Rows come from ``SHARD.tar.sizes``. Where that is remote or missing, with a cache folder, the sizes of a shard are
measured once for all processes of the machine and for every later start, 23 bytes a sample (see ``kept``).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from keye_train.data.facts import Facts, stacked
from keye_train.data.filters import Filter, filter_columns
from keye_train.data.index import INDEX_VERSION, read_rows, read_sizes
from keye_train.data.kept import ROW, read_kept, write_kept
from keye_train.data.measure import Sizes, measure
from keye_train.data.overlong import Fitting, fit_sample
from keye_train.data.paths import index_file
from keye_train.data.storage import Storage, is_url
from keye_train.settings import ResolutionSettings, StorageSettings

BLOCK_ROWS = 128
"""Rows that are measured and forgotten together: a block of ``data.shuffle_block_rows`` as it is set by default."""

KEPT_ROWS = 1_500_000
"""Rows of a source that stay in memory at least, at 23 bytes: a group of blocks of the usual size and half the next."""

PART_ROWS = 131_072
"""Rows that are read and measured together."""

MOST_ANSWERS = 2**16 - 1
"""Answers of a conversation behind which it can be cut."""


@dataclass(frozen=True)
class Measuring:
    """How rows of a shard become sizes."""

    resolution: ResolutionSettings
    pair_tokens: int | None = None  # see ``Corpus.open``
    filter: Filter | None = None
    cache: Path | None = None  # folder
    rows_from: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of shards that ``cache`` keeps
    without_sizes: frozenset[str] = frozenset()  # shards whose index has no ``SHARD.tar.sizes``
    storage: StorageSettings | None = None
    fitting: Fitting | None = None  # what becomes of samples over a budget; None: they are skipped
    group_blocks: int = 0  # blocks that one window may look at, see ``data.shuffle_group_blocks``

    @cached_property
    def _described(self) -> str:
        resolution = sorted(asdict(self.resolution).items())
        expression = self.filter.text if self.filter else None
        return json.dumps([INDEX_VERSION, resolution, self.pair_tokens, expression, repr(self.fitting)])

    def cache_path(self, shard: str) -> Path | None:
        """File of the measured rows of a shard; everything that decides them is in its name. None: not kept."""
        if self.cache is None or shard not in self.rows_from:
            return None
        name = hashlib.sha256(repr((self._described, self.rows_from[shard])).encode()).hexdigest()[:32]
        return self.cache / name[:2] / f"{name}.sizes"


@dataclass(frozen=True)
class Block:
    """Some neighbouring rows, measured."""

    rows: np.ndarray  # [n] of ROW
    errors: dict[int, str]  # row of the block -> why the sample cannot be trained on


class BlockStore:
    """Sizes of a source by row."""

    def __init__(self, shards: Sequence[str], first_rows: np.ndarray, measuring: Measuring) -> None:
        self._shards, self._first_rows, self._measuring = tuple(shards), first_rows, measuring
        self._files = Storage(measuring.storage)
        self._part_blocks = max(PART_ROWS // BLOCK_ROWS, 1)
        kept = max(KEPT_ROWS // BLOCK_ROWS, 3 * measuring.group_blocks // 2, self._part_blocks)
        places = min(kept, -(-int(first_rows[-1]) // BLOCK_ROWS))
        self._rows = np.empty((places, BLOCK_ROWS), dtype=ROW)  # takes memory where it has been written to
        self._numbers = np.zeros(places, dtype=np.int64)  # of the block in each place
        self._looked = np.zeros(places, dtype=np.int64)  # turn in which it was last looked at
        self._turn = 0
        self._places: dict[int, int] = {}  # number of a block -> place
        self._errors: dict[int, dict[int, str]] = {}  # the same -> row of it -> why the sample cannot be trained on

    def __len__(self) -> int:
        """Blocks in memory."""
        return len(self._places)

    def look(self, rows: np.ndarray) -> tuple[Sizes, np.ndarray, dict[int, str], np.ndarray | None]:
        """What is known of some rows: the fields of ``corpus.Looked``."""
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // BLOCK_ROWS, return_index=True)
        bounds = np.append(starts, len(rows))
        found, held = np.empty(len(rows), dtype=ROW), _whole(self._rows)
        errors: dict[int, str] = {}
        # In parts, so that looking at a whole corpus holds no more than looking at a window.
        for part in range(0, len(numbers), self._part_blocks):
            own = numbers[part : part + self._part_blocks]
            edges = bounds[part : part + len(own) + 1]
            of_rows = np.repeat(self._load(own), np.diff(edges))
            mine = order[edges[0] : edges[-1]]
            _whole(found)[mine] = held[of_rows, rows[mine] % BLOCK_ROWS]
            for place, number in enumerate(own.tolist()) if self._errors else ():
                if reasons := self._errors.get(number):
                    mine = order[edges[place] : edges[place + 1]].tolist()
                    inside = (rows[mine] % BLOCK_ROWS).tolist()
                    errors |= {i: reasons[row] for i, row in zip(mine, inside, strict=True) if row in reasons}
        tokens, patches = found["tokens"].astype(np.int64), found["patches"].astype(np.int64)
        sizes = Sizes(tokens, tokens**2, patches, found["patches_squared"].astype(np.int64))
        fits = None if self._measuring.fitting is None else np.stack([found["answers"], found["media_tokens"]], axis=1)
        return sizes, found["keep"], errors, fits

    def _load(self, numbers: np.ndarray) -> np.ndarray:
        """Places of some blocks, ascending; those that are not at hand are read, each shard of theirs once."""
        self._turn += 1
        places = np.fromiter((self._places.get(number, -1) for number in numbers.tolist()), np.int64, len(numbers))
        self._looked[places[places >= 0]] = self._turn
        if len(missing := np.flatnonzero(places < 0)):
            fresh = numbers[missing]
            measured = self._read(fresh)
            places[missing] = own = self._room(len(missing))
            whole = len(measured.rows) // BLOCK_ROWS  # all but the last block of the source
            as_blocks = self._rows.view(np.uint8).reshape(len(self._rows), BLOCK_ROWS * ROW.itemsize)
            as_blocks[own[:whole]] = (
                measured.rows[: whole * BLOCK_ROWS].view(np.uint8).reshape(whole, as_blocks.shape[1])
            )
            rest = measured.rows[whole * BLOCK_ROWS :]
            self._rows[own[-1], : len(rest)] = rest
            self._numbers[own], self._looked[own] = fresh, self._turn
            self._places.update(zip(fresh.tolist(), own.tolist(), strict=True))
            for row, reason in measured.errors.items():
                self._errors.setdefault(int(fresh[row // BLOCK_ROWS]), {})[row % BLOCK_ROWS] = reason
        return places

    def _room(self, count: int) -> np.ndarray:
        """Free places; where there are too few, blocks that have not been looked at for longest are forgotten."""
        held = len(self._places)
        if held + count <= len(self._rows):
            return np.arange(held, held + count)
        oldest = np.argpartition(self._looked, count - 1)[:count]
        for number in self._numbers[oldest[oldest < held]].tolist():
            del self._places[number]
            self._errors.pop(number, None)
        return oldest

    def _read(self, numbers: np.ndarray) -> Block:
        """Read blocks, ascending, and measure them together: one behind the other."""
        shards, spans = self._spans(numbers)
        edges = [*np.flatnonzero(np.diff(shards, prepend=-1)).tolist(), len(shards)]
        wanted = [(int(shards[start]), spans[start:stop].tolist()) for start, stop in pairwise(edges)]
        read: list[Block | Facts] = []
        for one_by_one, own in groupby(wanted, key=lambda item: self._one_by_one(self._shards[item[0]])):
            if one_by_one:
                read += self._read_shards(list(own))
            else:
                read.append(read_sizes([(self._shards[shard], of_shard) for shard, of_shard in own], self._files))
        found = [part for part in read if isinstance(part, Facts)]
        if found:
            measured = self._measure(Facts.joined(found))
            if len(found) == len(read):
                return measured
            parts = iter(_split(measured, [len(part) for part in found]))
            read = [next(parts) if isinstance(part, Facts) else part for part in read]
        return _joined([part for part in read if isinstance(part, Block)])

    def _spans(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where blocks stand: shards [S] int64, and the rows [start, stop) of them, [S, 2] int64, as long as can be."""
        starts = numbers * BLOCK_ROWS
        stops = np.minimum(starts + BLOCK_ROWS, self._first_rows[-1])
        first = np.searchsorted(self._first_rows, starts, side="right") - 1
        last = np.searchsorted(self._first_rows, stops - 1, side="right") - 1
        counts = last - first + 1  # of shards that a block runs through
        shards = np.repeat(first, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.maximum(np.repeat(starts, counts), self._first_rows[shards])
        stops = np.minimum(np.repeat(stops, counts), self._first_rows[shards + 1])
        starts, stops, shards = (values[stops > starts] for values in (starts, stops, shards))  # some shards are empty
        begins = np.append(True, (shards[1:] != shards[:-1]) | (starts[1:] != stops[:-1]))  # a span, not amid one
        ends = np.append(begins[1:], True)
        bounds = np.stack([starts[begins], stops[ends]], axis=1)
        return shards[begins], bounds - self._first_rows[shards[begins], None]

    def _read_shards(self, wanted: Sequence[tuple[int, list[tuple[int, int]]]]) -> list[Block | Facts]:
        """``_read_shard`` of several."""
        try:
            return self._files.map(lambda item: self._read_shard(*item), wanted)
        finally:
            self._files.close()

    def _one_by_one(self, shard: str) -> bool:
        """Whether a shard is read by itself: its sizes are kept, or have to come from the parquet file."""
        return shard in self._measuring.without_sizes or shard in self._measuring.rows_from

    def _read_shard(self, shard: int, spans: list[tuple[int, int]]) -> Block | Facts:
        """Some stretches of rows of a shard, one behind the other: measured, where they are kept, or as they are."""
        name = self._shards[shard]
        path = self._measuring.cache_path(name)
        if path is not None:
            total = int(self._first_rows[shard + 1] - self._first_rows[shard])
            found = read_kept(path, spans, total)
            if found is None:
                whole = self._measure(self._facts(name, [(0, total)]))
                write_kept(path, whole.rows, whole.errors)
                found = [whole.rows[start:stop] for start, stop in spans], whole.errors
            rows, account = found
            starts = np.cumsum([0] + [len(part) for part in rows]).tolist()
            errors = {
                first + row - start: reason
                for row, reason in account.items()
                for first, (start, stop) in zip(starts, spans, strict=False)
                if start <= row < stop
            }
            return Block(np.concatenate(rows), errors)
        return self._facts(name, spans)

    def _facts(self, shard: str, spans: list[tuple[int, int]]) -> Facts:
        if shard not in self._measuring.without_sizes:
            return read_sizes([(shard, spans)], Storage(self._measuring.storage))
        columns = ["text_tokens", "media", "error"]
        columns += ["size", "task"] if self._measuring.filter else []
        columns += ["cuts"] if self._measuring.fitting else []
        return _parquet_facts(shard, spans, columns, self._measuring.storage)

    def _measure(self, facts: Facts) -> Block:
        """Measured rows of an index."""
        sizes, errors = measure(facts, self._measuring.resolution, self._measuring.pair_tokens)
        rows = np.empty(len(facts), dtype=ROW)
        rows["tokens"], rows["patches"] = sizes.tokens, sizes.patches
        rows["patches_squared"], rows["keep"] = sizes.patches_squared, True
        rows["answers"] = rows["media_tokens"] = 0
        if self._measuring.filter:
            own = filter_columns(facts, sizes.tokens, sizes.patches)
            rows["keep"] = self._measuring.filter.keep(own, len(rows))
            rows["keep"][list(errors)] = True  # what cannot be read has no sizes to judge: it goes to the ledger
        self._fit(facts, rows, errors)
        return Block(rows, errors)

    def _fit(self, facts: Facts, rows: np.ndarray, errors: dict[int, str]) -> None:
        """Make rows over a budget fit, where the policy has a way; the others stay as they are."""
        fitting = self._measuring.fitting
        if fitting is None:
            return
        over = rows["keep"] & ~fitting.budget.fits(rows["tokens"], rows["patches"])
        over[list(errors)] = False
        facts = facts.where(over)
        for row, place in enumerate(np.flatnonzero(over).tolist()):
            media, text, cuts = facts.media_of(row), int(facts.rows["text_tokens"][row]), facts.cuts_of(row)
            if (pair_tokens := self._measuring.pair_tokens) is not None:
                text, cuts = pair_tokens, []
            pair = pair_tokens is not None
            found = fit_sample(text, cuts[:MOST_ANSWERS], media, self._measuring.resolution, fitting, pair)
            if found is not None:
                rows[place] = (found.patches_squared, found.tokens, found.patches, *found.fit[::-1], True)


def _parquet_facts(
    shard: str, spans: Sequence[tuple[int, int]], columns: Sequence[str], storage: StorageSettings | None = None
) -> Facts:
    """What plans need of some rows, from the parquet file of an index.

    Args:
        shard: ``open_header`` has accepted its index.
        spans: of rows [start, stop), ascending; at least one.
        columns: those of ``FACT_COLUMNS`` that are needed.
        storage: ``data.storage``.
    """
    first, behind = spans[0][0], spans[-1][1]
    remote = is_url(index_file(shard, storage))  # fetched whole in any case
    if remote or behind - first <= 2 * sum(stop - start for start, stop in spans):
        table = read_rows(shard, columns, first, behind, storage)
        return Facts.of(pa.concat_tables([table.slice(start - first, stop - start) for start, stop in spans]))
    return Facts.of(pa.concat_tables([read_rows(shard, columns, start, stop, storage) for start, stop in spans]))


def _whole(rows: np.ndarray) -> np.ndarray:
    """Rows of ROW, to be copied in one piece: numpy's own way copies field by field, ten times slower."""
    return rows.view(f"V{ROW.itemsize}")


def _joined(blocks: Sequence[Block]) -> Block:
    errors: dict[int, str] = {}
    first = 0
    for block in blocks:
        errors |= {first + row: reason for row, reason in block.errors.items()}
        first += len(block.rows)
    return Block(stacked([block.rows for block in blocks]), errors)


def _split(block: Block, lengths: Sequence[int]) -> list[Block]:
    """The parts of these lengths; each has a copy of its rows, so that it does not hold the whole."""
    bounds = np.cumsum([0, *lengths]).tolist()
    parts = [Block(block.rows[start:stop].copy(), {}) for start, stop in pairwise(bounds)]
    for row, reason in block.errors.items():
        part = bisect_right(bounds, row) - 1
        parts[part].errors[row - bounds[part]] = reason
    return parts
