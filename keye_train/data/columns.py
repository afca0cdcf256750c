"""Measured sizes of the samples of a source, block by block: what is looked at is measured, what is old is forgotten.

Rows come from ``SHARD.tar.sizes``. Where that is remote or missing, with a cache folder, the sizes of a shard are
measured once for all processes of the machine and for every later start, 23 bytes a sample (see ``kept``).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from keye_train.data.storage import is_url
from keye_train.settings import ResolutionSettings, StorageSettings

BLOCK_ROWS = 128
"""Rows that are measured and forgotten together: a block of ``data.shuffle_block_rows`` as it is set by default."""

KEPT_ROWS = 1_500_000
"""Rows of a source that stay in memory at least, at 23 bytes: a group of blocks of the usual size and half the next."""

PART_ROWS = 131_072
"""Rows that are read and measured together."""

READERS = 8
"""Indexes read at the same time."""

TOGETHER = 64
"""Shards that one thread reads in one go."""

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
        self._blocks: OrderedDict[int, Block] = OrderedDict()

    def look(self, rows: np.ndarray) -> tuple[Sizes, np.ndarray, dict[int, str], np.ndarray | None]:
        """What is known of some rows: the fields of ``corpus.Looked``."""
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // BLOCK_ROWS, return_index=True)
        bounds = [*starts.tolist(), len(rows)]
        found = np.empty(len(rows), dtype=ROW)
        errors: dict[int, str] = {}
        # In parts, so that looking at a whole corpus holds no more than looking at a window.
        step = max(PART_ROWS // BLOCK_ROWS, 1)
        for part in range(0, len(numbers), step):
            own = numbers[part : part + step].tolist()
            blocks = self._load(own)
            first, behind = bounds[part], bounds[part + len(own)]
            places = order[first:behind]
            held = stacked([blocks[number].rows for number in own])
            offsets = np.cumsum([0] + [len(blocks[number].rows) for number in own])
            which = np.searchsorted(numbers[part : part + len(own)], rows[places] // BLOCK_ROWS)
            found[places] = held[offsets[which] + rows[places] % BLOCK_ROWS]
            for place, number in enumerate(own):
                if blocks[number].errors:
                    mine = order[bounds[part + place] : bounds[part + place + 1]].tolist()
                    inside = (rows[mine] % BLOCK_ROWS).tolist()
                    reasons = blocks[number].errors
                    errors |= {i: reasons[row] for i, row in zip(mine, inside, strict=True) if row in reasons}
        tokens, patches = found["tokens"].astype(np.int64), found["patches"].astype(np.int64)
        sizes = Sizes(tokens, tokens**2, patches, found["patches_squared"].astype(np.int64))
        fits = None if self._measuring.fitting is None else np.stack([found["answers"], found["media_tokens"]], axis=1)
        return sizes, found["keep"], errors, fits

    def _load(self, numbers: list[int]) -> dict[int, Block]:
        """Blocks by number; the ones that are not at hand are read, each shard of theirs once."""
        missing = [number for number in numbers if number not in self._blocks]
        if missing:
            total = int(self._first_rows[-1])
            lengths = [min(BLOCK_ROWS, total - number * BLOCK_ROWS) for number in missing]
            self._blocks.update(zip(missing, _split(self._read(missing), lengths), strict=True))
        wanted = {}
        for number in numbers:
            self._blocks.move_to_end(number)
            wanted[number] = self._blocks[number]
        while len(self._blocks) > max(KEPT_ROWS // BLOCK_ROWS, 3 * self._measuring.group_blocks // 2, 1):
            self._blocks.popitem(last=False)
        return wanted

    def _read(self, numbers: list[int]) -> Block:
        """Read blocks, ascending, and measure them together: one behind the other."""
        total = int(self._first_rows[-1])
        spans = [span for number in numbers for span in self._spans(number, total)]
        by_shard = [(shard, [span[1:] for span in own]) for shard, own in groupby(spans, key=lambda span: span[0])]
        with ThreadPoolExecutor(READERS) as pool:
            batches = [by_shard[first : first + TOGETHER] for first in range(0, len(by_shard), TOGETHER)]
            read = [part for parts in pool.map(self._read_shards, batches) for part in parts]
        found = [part for part in read if isinstance(part, Facts)]
        if found:
            measured = self._measure(Facts.joined(found))
            if len(found) == len(read):
                return measured
            parts = iter(_split(measured, [len(part) for part in found]))
            read = [next(parts) if isinstance(part, Facts) else part for part in read]
        return _joined([part for part in read if isinstance(part, Block)])

    def _spans(self, number: int, total: int) -> list[tuple[int, int, int]]:
        """Shards of a block, each with its rows there: (shard, start, stop)."""
        start, stop = number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, total)
        shard = int(np.searchsorted(self._first_rows, start, side="right")) - 1
        spans = []
        while start < stop:
            first, behind = int(self._first_rows[shard]), int(self._first_rows[shard + 1])
            end = min(stop, behind)
            if end > start:
                spans.append((shard, start - first, end - first))
            start, shard = end, shard + 1
        return spans

    def _read_shards(self, wanted: list[tuple[int, list[tuple[int, int]]]]) -> list[Block | Facts]:
        """Stretches of rows of several shards, as ``_read_shard`` gives them; those with files of sizes in one."""
        read: list[Block | Facts] = []
        for one_by_one, own in groupby(wanted, key=lambda item: self._one_by_one(self._shards[item[0]])):
            if one_by_one:
                read += [self._read_shard(*item) for item in own]
            else:
                read.append(read_sizes([(self._shards[shard], spans) for shard, spans in own], self._measuring.storage))
        return read

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
            return read_sizes([(shard, spans)], self._measuring.storage)
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
