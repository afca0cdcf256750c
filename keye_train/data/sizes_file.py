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
from typing import Any

import numpy as np
import pyarrow as pa

from keye_train.data.facts import CUT, FACT_COLUMNS, MEDIUM, ROW, Facts
from keye_train.data.storage import Storage, is_url

BLOCK_ROWS = 128
"""Rows of a block: ``data.shuffle_block_rows`` as it is set by default."""

MAGIC = b"keyesz01"
HEAD = struct.Struct("<8sII")  # magic, bytes of the account, blocks
FRAME = struct.Struct("<III")  # media, cuts, bytes of JSON
BLOCK = np.dtype([("end", "<u8"), ("crc", "<u4"), ("bytes", "<u4")])  # byte behind it, crc32, bytes when unpacked

HEAD_BYTES = 8192
"""Read at first: as a rule head, account and directory of a shard of up to 60,000 samples."""

MOST_BYTES = 2**28
"""A block that would be larger when unpacked is taken as damaged: 2 MB a sample."""

CODEC = "lz4_raw"


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
    frames = [_frame(Facts.of(table.slice(start, BLOCK_ROWS))) for start in range(0, len(table), BLOCK_ROWS)]
    packed = [pa.compress(frame, codec=CODEC, asbytes=True) for frame in frames]
    about = json.dumps(account).encode()
    directory = np.zeros(len(frames), dtype=BLOCK)
    first = HEAD.size + len(about) + directory.nbytes
    directory["end"] = first + np.cumsum([len(block) for block in packed], dtype=np.uint64)
    directory["crc"] = [zlib.crc32(block) for block in packed]
    directory["bytes"] = [len(frame) for frame in frames]
    return b"".join([HEAD.pack(MAGIC, len(about), len(frames)), about, directory.tobytes(), *packed])


def _frame(facts: Facts) -> bytes:
    more = json.dumps([facts.tasks, facts.errors]).encode()
    head = FRAME.pack(len(facts.media), len(facts.cuts), len(more))
    return b"".join([head, facts.rows.tobytes(), facts.media.tobytes(), facts.cuts.tobytes(), more])


# ------------------------------------------------------------------------------------------------------ reading


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
        (start,) = self._read([(0, min(size, HEAD_BYTES))])
        if len(start) < HEAD.size or not start.startswith(MAGIC):
            raise DamagedError(f"{self._path} is not a file of sizes")
        _, account_bytes, blocks = HEAD.unpack_from(start)
        self._first = HEAD.size + account_bytes + blocks * BLOCK.itemsize
        if self._first > size:
            raise DamagedError(f"{self._path} ends in its head")
        if len(start) < self._first:
            start += self._read([(len(start), self._first)])[0]
        self._account = start[HEAD.size : HEAD.size + account_bytes]
        self._blocks = np.frombuffer(start, dtype=BLOCK, count=blocks, offset=HEAD.size + account_bytes)
        if self._end(blocks) != size:
            raise DamagedError(f"{self._path} has {size} bytes instead of {self._end(blocks)}")

    @property
    def account(self) -> dict[str, Any]:
        """What was written with it.

        Raises:
            DamagedError: it is no JSON.
        """
        try:
            return dict(json.loads(self._account))
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{self._path} has a damaged head") from error

    def blocks(self, spans: Sequence[tuple[int, int]]) -> tuple[list[Facts], list[np.ndarray]]:
        """Whole blocks with the rows [start, stop) of some spans, one read a span, and masks of these rows.

        Raises:
            DamagedError: a block is not what was written.
            StorageError: a remote file cannot be read.
        """
        bounds = [(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)) for start, stop in spans]
        read = self._read([(self._end(first), self._end(behind)) for first, behind in bounds])
        parts, keep = [], []
        for (start, stop), (first, behind), data in zip(spans, bounds, read, strict=True):
            base = self._end(first)
            own = [
                self._block(block, data[self._end(block) - base : self._end(block + 1) - base])
                for block in range(first, behind)
            ]
            parts += own
            mask = np.zeros(sum(map(len, own)), dtype=bool)
            mask[start - first * BLOCK_ROWS : stop - first * BLOCK_ROWS] = True
            keep.append(mask)
        return parts, keep

    def _block(self, number: int, data: bytes) -> Facts:
        """One block from its bytes."""
        _, crc, size = self._blocks[number].item()
        if zlib.crc32(data) != crc or size > MOST_BYTES:
            raise DamagedError(f"block {number} of {self._path} is damaged")
        frame = pa.decompress(data, decompressed_size=size, codec=CODEC, asbytes=True)
        media, cuts, more = FRAME.unpack_from(frame)
        behind = size - more
        first_cut = behind - cuts * CUT.itemsize
        first_medium = first_cut - media * MEDIUM.itemsize
        rows = (first_medium - FRAME.size) // ROW.itemsize
        return Facts(
            np.frombuffer(frame, ROW, rows, FRAME.size),
            np.frombuffer(frame, MEDIUM, media, first_medium),
            np.frombuffer(frame, CUT, cuts, first_cut),
            *_more(frame[behind:]),
        )

    def _end(self, blocks: int) -> int:
        """Byte behind the first so many blocks."""
        return int(self._blocks["end"][blocks - 1]) if blocks else self._first

    def _read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if self._descriptor is None:
            return self._files.read_ranges(self._path, ranges)
        return [os.pread(self._descriptor, stop - start, start) for start, stop in ranges]


@lru_cache(4096)  # the same for most blocks of a source
def _more(data: bytes) -> tuple[tuple[str, ...], dict[int, str]]:
    tasks, errors = json.loads(data)
    return tuple(tasks), {int(row): reason for row, reason in errors.items()}
