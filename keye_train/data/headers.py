"""Headers of many shards, kept in the cache folder so that the next start opens none of their indexes.

A list of shards whose files (the shard and those of its index) have the same sizes and times, or ETags, as before has
the same headers. Anything else is opened and checked anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from keye_train.data.energon import LayoutFinder
from keye_train.data.index import INDEX_VERSION, ShardHeader
from keye_train.data.opening import open_headers
from keye_train.data.paths import index_file, offsets_file, sizes_file
from keye_train.data.storage import Storage
from keye_train.runs import write_text_atomic
from keye_train.settings import StorageSettings


def kept_headers(
    shards: Sequence[str],
    tokenizer: str | Path,
    fingerprint: str,
    storage: StorageSettings | None = None,
    cache: Path | None = None,
) -> list[ShardHeader]:
    """Headers of some shards, in order.

    Args:
        shards: paths or URLs of the .tar files.
        tokenizer, fingerprint, storage: see ``opening.open_headers``.
        cache: folder for the headers; None: none are kept.

    Raises:
        ValueError, StorageError: see ``opening.open_header``.
    """
    path = None if cache is None else _path(shards, fingerprint, storage, cache)
    kept = None if path is None else _read(path, shards)
    if kept is not None:
        return kept
    headers = open_headers(shards, tokenizer, fingerprint, storage)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps([astuple(header)[1:] for header in headers]))
    return headers


def _read(path: Path, shards: Sequence[str]) -> list[ShardHeader] | None:
    """Headers as they were kept; None where they are not there, or damaged: they are opened anew."""
    try:
        kept = json.loads(path.read_text())
        return [ShardHeader(shard, *values) for shard, values in zip(shards, kept, strict=True)]
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _path(shards: Sequence[str], fingerprint: str, storage: StorageSettings | None, cache: Path) -> Path | None:
    """File for these shards as they are now; None where one of their files is missing or tells no version."""
    files = Storage(storage)
    layouts = LayoutFinder(files)

    def state(shard: str) -> list[tuple[int, str]]:
        own = [files.stat(file) for file in (shard, index_file(shard, storage), offsets_file(shard, storage))]
        try:
            return [*own, files.stat(sizes_file(shard, storage))]
        except FileNotFoundError:  # an index of an earlier version
            return own

    try:
        states = files.map_quick(state, shards, any(map(files.is_remote, shards)))
    except FileNotFoundError:
        return None
    finally:
        files.close()
    if not all(version for own in states for _, version in own):
        return None
    described = [(shard, own, str(layouts(shard) or "")) for shard, own in zip(shards, states, strict=True)]
    digest = hashlib.sha256(repr((INDEX_VERSION, fingerprint, described)).encode()).hexdigest()
    return cache / "headers" / f"{digest[:32]}.json"
