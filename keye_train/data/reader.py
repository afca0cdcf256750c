"""Samples out of shards by their rows, for training: byte ranges, merged, fetched and cut apart again.

Local shards are read by pread. Remote ones are read by ranges, several at once, or from a whole copy in the cache of
this node. Where the bytes come from changes nothing in what is read.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keye_train.data.cache import ShardCache
from keye_train.data.energon import EnergonLayout, LayoutFinder
from keye_train.data.paths import OFFSET_BYTES, offsets_file, offsets_path
from keye_train.data.storage import Storage, StorageError, is_url
from keye_train.data.tar import RawSample, read_sample, walk_shard
from keye_train.sample import SampleError
from keye_train.settings import StorageSettings

__all__ = ["OFFSET_BYTES", "RawSample", "ShardReader", "merge_ranges", "offsets_path", "walk_shard"]

OPEN_SHARDS = 64
"""Shards that a reader keeps open: two file descriptors each, or 8 bytes a sample for a remote one."""

MERGED_BYTES = 64 * 2**20
"""A merged read does not grow beyond this; a single sample may be larger."""

Range = tuple[int, int]  # bytes [start, end)
Members = dict[str, bytes]


def merge_ranges(ranges: Iterable[Range], gap: int, limit: int = MERGED_BYTES) -> list[Range]:
    """Few ranges that cover all of ``ranges``, in order; each given range lies within one of them.

    Args:
        ranges: in any order; they may overlap.
        gap: bytes between two ranges that may be read for nothing.
        limit: a range that is joined from several is at most so long, unless they overlap.
    """
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged:
            first, last = merged[-1]
            joined = max(last, end)
            if start < last or (start - last <= gap and joined - first <= limit):
                merged[-1] = (first, joined)
                continue
        merged.append((start, end))
    return merged


@dataclass(frozen=True)
class _Open:
    """An open shard."""

    layout: EnergonLayout | None
    tar: int | None  # file descriptor of a local one
    index: int | bytes  # ``.tar.idx``: file descriptor, or its bytes


class ShardReader:
    """Reads samples by shard and row, through ``SHARD.tar.idx``.

    Holds file descriptors and connections; make one for each process.
    """

    def __init__(self, storage: StorageSettings | None = None) -> None:
        self._storage = Storage(storage)
        self._cache = ShardCache(self._storage) if self._storage.settings.cache_dir is not None else None
        self._layouts = LayoutFinder(self._storage)
        self._open: OrderedDict[str, _Open] = OrderedDict()  # last used at the end

    def read(self, shard: str, row: int) -> tuple[str, Members]:
        """Key and members of the sample ``row`` of a shard.

        Raises:
            SampleError: the bytes are not those of a whole, harmless sample.
            FileNotFoundError, StorageError: the shard went away since the run began, or cannot be reached.
        """
        (found,) = self.read_many([(shard, row)])
        if isinstance(found, SampleError):
            raise found
        return found

    def read_many(self, places: Sequence[tuple[str, int]]) -> list[tuple[str, Members] | SampleError]:
        """Key and members of several samples in the given order, or what is wrong with one.

        Samples of one shard that lie close to each other are fetched with one read (``data.storage.merge_gap_bytes``).

        Args:
            places: (shard, row) of each.

        Raises:
            FileNotFoundError, StorageError: a shard went away since the run began, or cannot be reached. No sample is
                left out because of that.
        """
        by_shard: dict[str, list[int]] = {}
        for number, (shard, _) in enumerate(places):
            by_shard.setdefault(shard, []).append(number)
        found: dict[int, tuple[str, Members] | SampleError] = {}
        for shard, numbers in by_shard.items():
            opened = self._opened(shard)
            bounds = [_bounds(opened.index, places[number][1], shard) for number in numbers]
            for number, data in zip(numbers, self._fetch(shard, opened, bounds), strict=True):
                try:
                    sample = read_sample(data, opened.layout)
                    found[number] = (sample.key, sample.members)
                except SampleError as error:
                    found[number] = error
        return [found[number] for number in range(len(places))]

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            self._close_oldest()
        self._storage.close()

    def _fetch(self, shard: str, opened: _Open, bounds: list[Range]) -> list[bytes]:
        """Bytes of each range, from fewer reads."""
        merged = merge_ranges(bounds, self._storage.settings.merge_gap_bytes)
        copy = None
        if opened.tar is not None:
            blocks = [_pread(opened.tar, shard, *block) for block in merged]
        elif self._cache is not None and (copy := self._cache.open(shard)) is not None:
            try:
                blocks = [_pread(copy, shard, *block) for block in merged]
            finally:
                os.close(copy)
        else:
            blocks = self._storage.read_ranges(shard, merged)
        pieces = []
        for start, end in bounds:
            number = next(n for n, (first, last) in enumerate(merged) if first <= start and end <= last)
            offset = merged[number][0]
            pieces.append(blocks[number][start - offset : end - offset])
        return pieces

    def _opened(self, shard: str) -> _Open:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= OPEN_SHARDS:
            self._close_oldest()
        layout = self._layouts(shard)
        index_file = offsets_file(shard, self._storage.settings)
        if is_url(shard):
            opened = _Open(layout, None, self._storage.read(index_file))
        else:
            tar = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
            try:
                opened = _Open(layout, tar, os.open(index_file, os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                os.close(tar)
                raise
        self._open[shard] = opened
        return opened

    def _close_oldest(self) -> None:
        _, opened = self._open.popitem(last=False)
        for descriptor in (opened.tar, opened.index):
            if isinstance(descriptor, int):
                os.close(descriptor)


def _bounds(index: int | bytes, row: int, shard: str) -> Range:
    """Where a sample starts and ends."""
    start, length = row * OFFSET_BYTES, 2 * OFFSET_BYTES
    pair = os.pread(index, length, start) if isinstance(index, int) else index[start : start + length]
    assert len(pair) == length, f"{shard} has no row {row}"
    first, last = struct.unpack("<QQ", pair)
    return first, last


def _pread(descriptor: int, shard: str, start: int, end: int) -> bytes:
    """A whole range; one call may deliver less than it was asked for."""
    data = os.pread(descriptor, end - start, start)
    while len(data) < end - start:
        more = os.pread(descriptor, end - start - len(data), start + len(data))
        if not more:
            raise StorageError(
                f"{shard} ends at byte {start + len(data)}, before a sample of its index: it was cut off after it was "
                "indexed; bring it back, or index it again (keye-data index)"
            )
        data += more
    return data
