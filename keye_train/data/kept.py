"""Measured rows of a shard in one file of the cache folder, read in part.

Layout, little-endian: ``MAGIC``, rows n, bytes e of the account; n times ``ROW``; the account: JSON, row -> why the
sample cannot be trained on. One file, so sizes never stand without their account.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROW = np.dtype(
    [
        ("patches_squared", "<i8"),
        ("tokens", "<i4"),
        ("patches", "<i4"),
        ("media_tokens", "<i4"),  # see ``sample.Fit``
        ("answers", "<u2"),
        ("keep", "?"),
    ]
)

MAGIC = b"keyesz04"
"""Its number goes up whenever the same index and settings give other rows."""
HEAD = struct.Struct("<8sqq")


def write_kept(path: Path, rows: np.ndarray, errors: dict[int, str]) -> None:
    """Write the rows of a shard, [n] of ROW; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    account = json.dumps(errors).encode()
    aside = path.with_name(f".{path.name}.{os.getpid()}.{id(rows)}.tmp")
    with aside.open("wb") as file:
        file.write(HEAD.pack(MAGIC, len(rows), len(account)))
        file.write(rows.tobytes())
        file.write(account)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def read_kept(
    path: Path, spans: Sequence[tuple[int, int]], total: int
) -> tuple[list[np.ndarray], dict[int, str]] | None:
    """Some stretches [start, stop) of rows, each [stop - start] of ROW, and the whole account.

    None where the file is not there, or is damaged or not of ``total`` rows: it is made anew.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        head = os.pread(file, HEAD.size, 0)
        if len(head) < HEAD.size:
            return None
        magic, count, account_bytes = HEAD.unpack(head)
        behind = HEAD.size + count * ROW.itemsize
        if magic != MAGIC or count != total or os.fstat(file).st_size != behind + account_bytes:
            return None
        parts = []
        for start, stop in spans:
            data = os.pread(file, (stop - start) * ROW.itemsize, HEAD.size + start * ROW.itemsize)
            parts.append(np.frombuffer(data, dtype=ROW))
        account = {} if account_bytes == 2 else json.loads(os.pread(file, account_bytes, behind))
        return parts, {int(row): str(reason) for row, reason in account.items()}
    except (ValueError, AttributeError):
        return None
    finally:
        os.close(file)
