"""Measured sizes of the samples of a source, block by block: what is looked at is measured, what is old is forgotten.

With a cache folder, the sizes of a shard are measured once for all processes of the machine and for every later start:
17 bytes a sample in a file that is mapped into memory, so a block of it costs a few pages.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from keye_train.data.filters import INDEX_COLUMNS, Filter, filter_columns
from keye_train.data.index import INDEX_VERSION, read_rows
from keye_train.data.measure import Sizes, measure
from keye_train.data.paths import index_file
from keye_train.data.storage import is_url
from keye_train.runs import write_text_atomic
from keye_train.settings import ResolutionSettings, StorageSettings

BLOCK_ROWS = 1024
"""Rows that are measured and forgotten together."""

KEPT_BLOCKS = 768
"""Blocks of a source that stay in memory (17 bytes a row, so 13 MB): those of three groups of the usual size."""

READERS = 8
"""Indexes read at the same time."""

KNOWN_MEDIA = 100_000
"""Different sizes of media whose cost is remembered."""

ROW = np.dtype([("patches_squared", "<i8"), ("tokens", "<i4"), ("patches", "<i4"), ("keep", "?")])

CACHE_VERSION = "2"


@dataclass(frozen=True)
class Measuring:
    """How rows of a shard become sizes."""

    resolution: ResolutionSettings
    pair_tokens: int | None = None  # see ``Corpus.open``
    filter: Filter | None = None
    cache: Path | None = None  # folder
    rows_from: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # shard -> ``ShardHeader.rows_from``
    storage: StorageSettings | None = None

    def cache_path(self, shard: str) -> Path | None:
        """File of the measured rows of a shard; everything that decides them is in its name."""
        if self.cache is None:
            return None
        described = [
            CACHE_VERSION,
            INDEX_VERSION,
            self.rows_from[shard],
            sorted(asdict(self.resolution).items()),
            self.pair_tokens,
            self.filter.text if self.filter else None,
        ]
        name = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
        return self.cache / name[:2] / f"{name}.npy"


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
        self._known: dict[tuple, tuple[int, int] | str] = {}

    def look(self, rows: np.ndarray) -> tuple[Sizes, np.ndarray, dict[int, str]]:
        """Sizes of some rows, which of them pass the filter, and place -> reason where one cannot be trained on."""
        order = np.argsort(rows, kind="stable")
        numbers, starts = np.unique(rows[order] // BLOCK_ROWS, return_index=True)
        found = np.empty(len(rows), dtype=ROW)
        errors: dict[int, str] = {}
        # In parts, so that looking at a whole corpus holds no more blocks than looking at a window.
        for part in range(0, len(numbers), KEPT_BLOCKS):
            blocks = self._load(numbers[part : part + KEPT_BLOCKS].tolist())
            for number, start, stop in zip(
                numbers[part : part + KEPT_BLOCKS].tolist(),
                starts[part : part + KEPT_BLOCKS].tolist(),
                [*starts[part + 1 : part + KEPT_BLOCKS + 1].tolist(), len(rows)],
                strict=False,
            ):
                places, block = order[start:stop], blocks[number]
                inside = rows[places] - number * BLOCK_ROWS
                found[places] = block.rows[inside]
                if block.errors:
                    errors |= {
                        int(place): block.errors[row]
                        for place, row in zip(places.tolist(), inside.tolist(), strict=True)
                        if row in block.errors
                    }
        tokens, patches = found["tokens"].astype(np.int64), found["patches"].astype(np.int64)
        sizes = Sizes(tokens, tokens**2, patches, found["patches_squared"].astype(np.int64))
        return sizes, found["keep"], errors

    def _load(self, numbers: list[int]) -> dict[int, Block]:
        """Blocks by number; the ones that are not at hand are read, each shard of theirs once."""
        missing = [number for number in numbers if number not in self._blocks]
        total = int(self._first_rows[-1])
        spans = [
            (number, shard, start, stop) for number in missing for shard, start, stop in self._spans(number, total)
        ]
        by_shard = [(shard, list(own)) for shard, own in groupby(spans, key=lambda span: span[1])]
        parts: dict[int, list[Block]] = {}
        with ThreadPoolExecutor(READERS) as pool:
            for (_, own), blocks in zip(by_shard, pool.map(lambda item: self._read(*item), by_shard), strict=True):
                for (number, *_), block in zip(own, blocks, strict=True):
                    parts.setdefault(number, []).append(block)
        for number, blocks in parts.items():
            self._blocks[number] = _joined(blocks)
        wanted = {}
        for number in numbers:
            self._blocks.move_to_end(number)
            wanted[number] = self._blocks[number]
        while len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return wanted

    def _spans(self, number: int, total: int) -> list[tuple[int, int, int]]:
        """Shards of a block, each with its rows there."""
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

    def _read(self, shard: int, spans: list[tuple[int, int, int, int]]) -> list[Block]:
        """Measure some stretches of rows of a shard."""
        name = self._shards[shard]
        path = self._measuring.cache_path(name)
        if path is not None:
            whole = _cached(path)
            if whole is None:
                rows = int(self._first_rows[shard + 1] - self._first_rows[shard])
                whole = self._measure(name, 0, rows)
                _write_cache(path, whole)
            return [_cut(whole, start, stop) for *_, start, stop in spans]
        first, behind = spans[0][2], spans[-1][3]
        remote = is_url(index_file(name, self._measuring.storage))  # fetched whole in any case
        if remote or behind - first <= 2 * sum(stop - start for *_, start, stop in spans):
            whole = self._measure(name, first, behind)
            return [_cut(whole, start - first, stop - first) for *_, start, stop in spans]
        return [self._measure(name, start, stop) for *_, start, stop in spans]

    def _measure(self, shard: str, start: int, stop: int) -> Block:
        columns = INDEX_COLUMNS if self._measuring.filter else ("text_tokens", "media", "error")
        table = pa.concat_tables([read_rows(shard, columns, start, stop, self._measuring.storage)])
        if len(self._known) > KNOWN_MEDIA:
            self._known = {}
        sizes, errors = measure(table, self._measuring.resolution, self._measuring.pair_tokens, self._known)
        rows = np.empty(stop - start, dtype=ROW)
        rows["tokens"], rows["patches"] = sizes.tokens, sizes.patches
        rows["patches_squared"], rows["keep"] = sizes.patches_squared, True
        if self._measuring.filter:
            own = filter_columns(table, sizes.tokens, sizes.patches)
            rows["keep"] = self._measuring.filter.keep(own, len(rows))
            rows["keep"][list(errors)] = True  # what cannot be read has no sizes to judge: it goes to the ledger
        return Block(rows, errors)


def _joined(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    errors: dict[int, str] = {}
    first = 0
    for block in blocks:
        errors |= {first + row: reason for row, reason in block.errors.items()}
        first += len(block.rows)
    return Block(np.concatenate([block.rows for block in blocks]), errors)


def _cut(block: Block, start: int, stop: int) -> Block:
    errors = {row - start: reason for row, reason in block.errors.items() if start <= row < stop}
    return Block(block.rows[start:stop].copy(), errors)


def _cached(path: Path) -> Block | None:
    """A measured shard as it was kept; None where it is not there, or damaged: it is made anew."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        found = json.loads(path.with_suffix(".json").read_text())
        errors = {int(row): str(reason) for row, reason in found.items()}
    except (FileNotFoundError, ValueError, EOFError, AttributeError):
        return None
    return Block(rows, errors) if rows.dtype == ROW else None


def _write_cache(path: Path, block: Block) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path.with_suffix(".json"), json.dumps(block.errors))  # also {}: no file is no account
    aside = path.with_name(f".{path.name}.{os.getpid()}.{id(block)}.tmp")
    with aside.open("wb") as file:
        np.save(file, block.rows, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)  # last: its presence means that both are there
