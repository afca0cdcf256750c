"""Which shards a recipe means, and where the index of each stands."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from braceexpand import braceexpand

from keye_train.data.energon import META, split_shards
from keye_train.data.storage import Storage, is_url
from keye_train.settings import StorageSettings

OFFSET_BYTES = 8


def index_path(shard: str | Path) -> Path:
    """Index beside a local shard."""
    return Path(f"{shard}.index.parquet")


def offsets_path(shard: str | Path) -> Path:
    """``SHARD.tar.idx``: where each sample starts and where the last one ends, little-endian uint64.

    The layout that megatron-energon reads, too.
    """
    return Path(f"{shard}.idx")


def index_file(shard: str | Path, storage: StorageSettings | None = None) -> str:
    """Path or URL of the index of any shard: beside it, or in ``data.storage.index_dir``."""
    return _placed(f"{shard}.index.parquet", storage)


def offsets_file(shard: str | Path, storage: StorageSettings | None = None) -> str:
    """Path or URL of ``SHARD.tar.idx`` of any shard, as for ``index_file``."""
    return _placed(f"{shard}.idx", storage)


def sizes_file(shard: str | Path, storage: StorageSettings | None = None) -> str:
    """Path or URL of ``SHARD.tar.sizes`` of any shard, as for ``index_file``; see ``sizes_file``."""
    return _placed(f"{shard}.sizes", storage)


def _placed(name: str, storage: StorageSettings | None) -> str:
    if storage is None or storage.index_dir is None:
        return name
    # The whole path: shards of one name in two folders have two indexes.
    protocol, _, rest = name.partition("://") if is_url(name) else ("local", "", str(Path(name).absolute()))
    return str(Path(storage.index_dir, protocol, *(part for part in rest.split("/") if part not in ("", ".", ".."))))


def find_shards(patterns: Iterable[str], storage: StorageSettings | None = None) -> list[str]:
    """Paths and URLs of the shards that patterns stand for, each once, in order.

    Args:
        patterns: with ``*``, ``?``, ``[...]``, ``{a,b}`` and ``{000..123}``; or folders with ``.nv-meta``.
        storage: ``data.storage``.

    Raises:
        ValueError: a pattern matches nothing, a shard is missing, or a URL is not allowed.
    """
    files = Storage(storage)
    found: dict[str, None] = {}
    try:
        for pattern in patterns:
            for plain in braceexpand(pattern, escape=False):
                for match in _expand(plain, files):
                    found[match] = None
        there = files.map_quick(files.exists, list(found), any(map(is_url, found)))
        for shard, exists in zip(found, there, strict=True):
            if not exists:
                raise ValueError(f"the shard {shard} does not exist; check the path (of a recipe: data.sources)")
    finally:
        files.close()
    return list(found)


def _expand(pattern: str, files: Storage) -> list[str]:
    if not glob.has_magic(pattern) and not pattern.endswith(".tar"):
        shards = split_shards(pattern, files)
        if shards is not None:
            return [match for shard in shards for match in files.expand(shard)]
        if not is_url(pattern) and Path(pattern).is_dir():
            raise ValueError(f"{pattern} is a folder without {META}/split.yaml; give its shards, e.g. {pattern}/*.tar")
    matches = files.expand(pattern)
    if not matches:
        raise ValueError(
            f"no shard matches {pattern}, seen from {Path.cwd()}; check the path (of a recipe: data.sources)"
        )
    return matches
