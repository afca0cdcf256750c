"""What plans need of an index, in a file of its own beside it: ``SHARD.tar.sizes``.

A window of a plan looks at a few rows of nearly every shard of a large corpus. In the parquet file of an index that
costs its footer and a group of 4,096 rows; here a block of 128 rows is one read of one or two kilobytes. The head says
what the index is of, so that opening a corpus opens no parquet file.

Layout, little-endian: ``HEAD``; a JSON object, the account; [blocks] of ``BLOCK``; the blocks. Each is, compressed as
one LZ4 block: ``FRAME``, [n] of ``facts.ROW``, [media] of ``facts.MEDIUM``, [cuts] of ``facts.CUT``, and JSON: the
distinct tasks, and row -> why the sample cannot be read.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from keye_train.data.facts import CUT, FACT_COLUMNS, MEDIUM, ROW, Facts
from keye_train.data.storage import Storage, is_url

BLOCK_ROWS = 128
"""Rows of a block: ``data.shuffle_block_rows`` as it is set by default."""

PART_ROWS = 256 * BLOCK_ROWS
"""Rows that are looked at together while writing: fewer than the different tasks that ``Facts`` can hold."""

MAGIC = b"keyesz01"
HEAD = struct.Struct("<8sII")  # magic, bytes of the account, blocks
FRAME = struct.Struct("<III")  # media, cuts, bytes of JSON
BLOCK = struct.Struct("<QII")  # byte behind it, crc32, bytes when unpacked

HEAD_BYTES = 8192
"""Read at first: as a rule head, account and directory of a shard of up to 60,000 samples."""

MOST_BYTES = 2**28
"""A block that would be larger when unpacked is taken as damaged: 2 MB a sample."""

CODEC = "lz4_raw"
_DECODER = pa.Codec(CODEC)


class DamagedError(ValueError):
    """Not such a file, or not a whole one."""


# ------------------------------------------------------------------------------------------------------ writing


def sizes_bytes(table: pa.Table, account: Mapping[str, Any]) -> bytes:
    """The file for an index.

    Args:
        table: with ``FACT_COLUMNS``.
        account: what it says about the shard as a whole; JSON.
    """
    table = table.select(FACT_COLUMNS).combine_chunks()
    parts = (Facts.of(table.slice(start, PART_ROWS)) for start in range(0, len(table), PART_ROWS))
    frames = [_frame(facts) for part in parts for facts in part.blocks(BLOCK_ROWS)]
    packed = [pa.compress(frame, codec=CODEC, asbytes=True) for frame in frames]
    about = json.dumps(account).encode()
    first = HEAD.size + len(about) + BLOCK.size * len(frames)
    ends = accumulate(map(len, packed), initial=first)
    next(ends)
    directory = [BLOCK.pack(*own) for own in zip(ends, map(zlib.crc32, packed), map(len, frames), strict=True)]
    return b"".join([HEAD.pack(MAGIC, len(about), len(frames)), about, *directory, *packed])


def _frame(facts: Facts) -> bytes:
    more = json.dumps([facts.tasks, facts.errors]).encode()
    head = FRAME.pack(len(facts.media), len(facts.cuts), len(more))
    return b"".join([head, facts.rows.tobytes(), facts.media.tobytes(), facts.cuts.tobytes(), more])


# ------------------------------------------------------------------------------------------------------ reading


class Block(NamedTuple):
    """A block, unpacked."""

    rows: memoryview  # of ``facts.ROW``
    media: memoryview  # of ``facts.MEDIUM``
    cuts: memoryview  # of ``facts.CUT``
    more: bytes  # JSON


class SizesFile:
    """Such a file, open."""

    def __init__(self, path: str, files: Storage) -> None:
        """Args:
        path: path or URL.
        files: reaches it.

        Raises:
            FileNotFoundError: there is none.
            DamagedError: see there.
            StorageError: a remote one cannot be read.
        """
        self._path, self._files = path, files
        self._descriptor = None if is_url(path) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._read_head()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SizesFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _read_head(self) -> None:
        size = self._files.size(self._path) if self._descriptor is None else os.fstat(self._descriptor).st_size
        self._size = size
        (start,) = self._read([(0, min(size, HEAD_BYTES))])
        if len(start) < HEAD.size or not start.startswith(MAGIC):
            raise DamagedError(f"{self._path} is not a file of sizes")
        _, account_bytes, blocks = HEAD.unpack_from(start)
        self._blocks = blocks
        self._directory = HEAD.size + account_bytes
        self._first = self._directory + blocks * BLOCK.size
        if self._first > size:
            raise DamagedError(f"{self._path} ends in its head")
        if len(start) < self._first:
            start += self._read([(len(start), self._first)])[0]
        if len(start) < self._first:
            raise DamagedError(f"{self._path} ends in its head")
        self._head = start
        if (end := self._end(blocks)) != size:
            raise DamagedError(f"{self._path} has {size} bytes instead of {end}")

    @property
    def account(self) -> dict[str, Any]:
        """What was written with it.

        Raises:
            DamagedError: it is no JSON.
        """
        try:
            return dict(json.loads(self._head[HEAD.size : self._directory]))
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{self._path} has a damaged head") from error

    def blocks(self, spans: Sequence[tuple[int, int]]) -> list[Block]:
        """The blocks with the rows [start, stop) of some spans; one read a span.

        Raises:
            DamagedError: a block is not what was written, or the file has none with such rows.
            StorageError: a remote file cannot be read.
        """
        self._require(max((stop for _, stop in spans), default=0), self._blocks * BLOCK_ROWS)
        bounds = [(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)) for start, stop in spans]
        ranges = [(self._end(first), self._end(behind)) for first, behind in bounds]
        if not all(start <= stop <= self._size for start, stop in ranges):
            raise DamagedError(f"{self._path} has a damaged directory")
        read = self._read(ranges)
        found = []
        for (first, behind), (_, stop), data in zip(bounds, spans, read, strict=True):
            base = start = self._end(first)
            for number in range(first, behind):
                end, crc, size = self._block(number)
                own = data[start - base : end - base]
                if zlib.crc32(own) != crc or (block := _unpacked(own, size)) is None:
                    raise DamagedError(f"block {number} of {self._path} is damaged")
                found.append(block)
                start = end
            if behind > first:
                self._require(stop, (behind - 1) * BLOCK_ROWS + len(found[-1].rows) // ROW.itemsize)
        return found

    def _require(self, stop: int, rows: int) -> None:
        if stop > rows:
            raise DamagedError(f"{self._path} has no row {stop - 1}: it is of another index than the one beside it")

    def _end(self, blocks: int) -> int:
        """Byte behind the first so many blocks."""
        return self._block(blocks - 1)[0] if blocks else self._first

    def _block(self, number: int) -> tuple[int, int, int]:
        """Fields of BLOCK."""
        end, crc, size = BLOCK.unpack_from(self._head, self._directory + number * BLOCK.size)
        return end, crc, size

    def _read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if self._descriptor is None:
            return self._files.read_ranges(self._path, ranges)
        return [os.pread(self._descriptor, stop - start, start) for start, stop in ranges]


def _unpacked(data: bytes, size: int) -> Block | None:
    """A block from its bytes and the size that the directory says; None where these do not belong together."""
    if size > MOST_BYTES:
        return None
    try:  # as a buffer, which takes half as long as bytes
        frame = memoryview(_DECODER.decompress(data, decompressed_size=size))
        media, cuts, more = FRAME.unpack_from(frame)
        behind = size - more
        first_cut = behind - cuts * CUT.itemsize
        first_medium = first_cut - media * MEDIUM.itemsize
        block = Block(
            frame[FRAME.size : first_medium],
            frame[first_medium:first_cut],
            frame[first_cut:behind],
            bytes(frame[behind:]),
        )
        _more(block.more)
    except (OSError, ValueError, TypeError, struct.error):
        return None
    parts = FRAME.size + len(block.rows) + len(block.media) + len(block.cuts) + more
    return block if parts == size and len(block.rows) % ROW.itemsize == 0 else None


def joined(blocks: Sequence[Block]) -> tuple[Facts, np.ndarray]:
    """What some blocks tell, one behind the other, and how many rows each has, [blocks] int64; at least one block."""
    parts = [b"".join([block[place] for block in blocks]) for place in range(3)]
    rows, media, cuts = (np.frombuffer(part, kind) for part, kind in zip(parts, (ROW, MEDIUM, CUT), strict=True))
    counts = np.array([len(block.rows) for block in blocks]) // ROW.itemsize
    return _described(Facts(rows, media, cuts), counts, [block.more for block in blocks]), counts


def within(spans: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which rows of the blocks that hold some spans are theirs, [rows of the blocks] bool.

    Args:
        spans: [spans, 2] int64, rows [start, stop) of their shards, start < stop.
        counts: rows of the blocks, see ``joined``.
    """
    first, behind = spans[:, 0] // BLOCK_ROWS, -(-spans[:, 1] // BLOCK_ROWS)
    starts = np.cumsum([0, *counts])
    begins = starts[np.cumsum(behind - first) - (behind - first)] + spans[:, 0] % BLOCK_ROWS
    steps = np.zeros(starts[-1] + 1, dtype=np.int8)
    steps[begins] += 1
    steps[begins + spans[:, 1] - spans[:, 0]] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def _described(facts: Facts, counts: np.ndarray, more: Sequence[bytes]) -> Facts:
    """With the tasks and errors of blocks of so many rows, from the JSON of each."""
    distinct = list(dict.fromkeys(more))  # one, or a few, for most shards
    tasks: dict[str, int] = {}
    codes = [np.array([tasks.setdefault(task, len(tasks)) for task in _more(own)[0]], int) for own in distinct]
    rows = facts.rows
    if len(distinct) > 1:
        firsts = dict(zip(distinct, np.cumsum([0] + [len(own) for own in codes]).tolist(), strict=False))
        rows = rows.copy()
        rows["task"] = np.concatenate(codes)[np.repeat([firsts[own] for own in more], counts) + rows["task"]]
    wrong = {own for own in distinct if _more(own)[1]}
    errors: dict[int, str] = {}
    for own, behind, count in zip(more, np.cumsum(counts).tolist(), counts.tolist(), strict=True):
        if own in wrong:
            errors |= {behind - count + row: reason for row, reason in _more(own)[1].items()}
    return Facts(rows, facts.media, facts.cuts, tuple(tasks), errors)


@lru_cache(4096)  # the same for most blocks of a source
def _more(data: bytes) -> tuple[tuple[str, ...], dict[int, str]]:
    tasks, errors = json.loads(data)
    return tuple(tasks), {int(row): reason for row, reason in errors.items()}
