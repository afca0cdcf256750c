"""Headers of many shards: opened at the same time, and kept in the cache folder so that the next start opens none.

A list of shards whose index files have the same sizes and times as before has the same headers; the sizes of the shards
themselves are compared, too. Anything else is opened and checked anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keye_train.data.index import INDEX_VERSION, ShardHeader, index_path, open_header
from keye_train.data.reader import offsets_path
from keye_train.runs import write_text_atomic

OPENERS = 16
"""Indexes opened at the same time: opening waits for the disk or the network."""


def open_headers(
    shards: Sequence[str], tokenizer: str | Path, fingerprint: str, cache: Path | None = None
) -> list[ShardHeader]:
    """Headers of some shards, in order.

    Args:
        shards: paths of the .tar files.
        tokenizer, fingerprint: see ``open_header``.
        cache: folder for the headers; None: none are kept.

    Raises:
        ValueError: see ``open_header``.
    """
    path = None if cache is None else _path(shards, fingerprint, cache)
    if path is not None and path.exists():
        kept = json.loads(path.read_text())
        return [
            ShardHeader(shard, rows, shard_bytes, sha256, fingerprint)
            for shard, (rows, shard_bytes, sha256) in zip(shards, kept, strict=True)
        ]
    with ThreadPoolExecutor(OPENERS) as pool:
        headers = list(pool.map(lambda shard: open_header(shard, tokenizer, fingerprint), shards))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps([(header.rows, header.shard_bytes, header.sha256) for header in headers]))
    return headers


def _path(shards: Sequence[str], fingerprint: str, cache: Path) -> Path | None:
    """File for these shards as they are now; None where one of their files is not there to be asked."""
    digest = hashlib.sha256(f"{INDEX_VERSION} {fingerprint}".encode())
    try:
        for shard in shards:
            files = [file.stat() for file in (Path(shard), index_path(shard), offsets_path(shard))]
            digest.update(repr((shard, [(file.st_size, file.st_mtime_ns) for file in files])).encode())
    except OSError:
        return None
    return cache / "headers" / f"{digest.hexdigest()[:32]}.json"
