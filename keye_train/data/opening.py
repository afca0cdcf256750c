"""Opening an index: it is believed only where it is whole, and made for this shard and this tokenizer."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from keye_train.data.energon import LayoutFinder
from keye_train.data.index import (
    ACCOUNT,
    INDEX_VERSION,
    SCHEMA,
    ShardHeader,
    parquet_source,
    tokenizer_fingerprint,
)
from keye_train.data.paths import OFFSET_BYTES, index_file, offsets_file, sizes_file
from keye_train.data.sizes_file import DamagedError, SizesFile
from keye_train.data.storage import Storage, StorageError, is_url
from keye_train.settings import StorageSettings


def open_header(
    shard: str,
    tokenizer_folder: str | Path | None,
    fingerprint: str | None = None,
    storage: StorageSettings | None = None,
) -> ShardHeader:
    """Check that the index of a shard is there, whole and made for this shard and tokenizer, and read its header.

    The shard's size is compared, not its checksum, so that opening stays cheap; ``keye-data check`` compares both.

    Args:
        shard: path or URL of the .tar.
        tokenizer_folder: the recipe's ``model.tokenizer``; None: whichever counted the text.
        fingerprint: of that tokenizer, where the caller knows it already.
        storage: ``data.storage``.

    Raises:
        ValueError: with the command that mends it.
        StorageError: a remote shard or its index cannot be reached.
    """
    (header,) = open_headers([shard], tokenizer_folder, fingerprint, storage)
    return header


def open_headers(
    shards: Sequence[str],
    tokenizer_folder: str | Path | None,
    fingerprint: str | None = None,
    storage: StorageSettings | None = None,
) -> list[ShardHeader]:
    """``open_header`` of many shards, several at a time where the storage has to be waited for."""
    if fingerprint is None and tokenizer_folder is not None:
        fingerprint = tokenizer_fingerprint(tokenizer_folder)
    files = Storage(storage)
    layouts = LayoutFinder(files)
    try:
        return files.map_quick(
            lambda shard: _open_header(shard, tokenizer_folder, fingerprint, files, layouts),
            shards,
            any(map(files.is_remote, shards)),
        )
    finally:
        files.close()


class _UnfitError(ValueError):
    """What is wrong with the index of a shard, less the way to mend it."""


def _open_header(
    shard: str, tokenizer_folder: str | Path | None, fingerprint: str | None, files: Storage, layouts: LayoutFinder
) -> ShardHeader:
    """``open_header`` in an open storage: a start does this for every shard."""
    try:
        header = _header(shard, files)
        if fingerprint not in (None, header.tokenizer):
            raise _UnfitError(
                f"index of the shard {shard} was made with another tokenizer than {tokenizer_folder}, so its token "
                "counts do not hold"
            )
        if header.layout != str(layouts(shard) or ""):
            raise _UnfitError(
                f"index of the shard {shard} is stale: .nv-meta/dataset.yaml of its folder was changed since"
            )
    except _UnfitError as error:
        flag = " --allow-network" if is_url(shard) else ""
        folder = f" --index-dir {shlex.quote(files.settings.index_dir)}" if files.settings.index_dir else ""
        tokenizer = shlex.quote(str(tokenizer_folder or "DIR"))
        command = f"keye-data index {shlex.quote(shard)} --tokenizer {tokenizer}{folder}{flag}"
        raise ValueError(f"the {error}; run: {command}") from error
    return header


def _header(shard: str, files: Storage) -> ShardHeader:
    """What the index of a shard says, if it is of the shard as it is now."""
    try:
        shard_bytes = files.size(shard)
    except FileNotFoundError as error:
        raise ValueError(f"the shard {shard} does not exist; check the path (of a recipe: data.sources)") from error
    index, offsets = index_file(shard, files.settings), offsets_file(shard, files.settings)
    try:
        offsets_bytes = files.size(offsets)
        account = _account(shard, files)
        if account is None:
            with pq.ParquetFile(parquet_source(index, files)) as file:
                schema, rows = file.schema_arrow, file.metadata.num_rows
            metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
            known = metadata.get("version") == INDEX_VERSION and schema.equals(SCHEMA)
        else:
            metadata, rows, known = account, account["rows"], True
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise _UnfitError(f"shard {shard} has no index") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise _UnfitError(f"index of the shard {shard} is damaged ({error})") from error
    if not known:
        raise _UnfitError(
            f"index of the shard {shard} has format {metadata.get('version')}, this program reads {INDEX_VERSION}"
        )
    if metadata["shard_bytes"] != str(shard_bytes) or offsets_bytes != (rows + 1) * OFFSET_BYTES:
        raise _UnfitError(
            f"index of the shard {shard} is stale: it was made when the shard had {metadata['shard_bytes']} bytes, "
            f"now it has {shard_bytes}"
        )
    return ShardHeader(
        shard,
        rows,
        shard_bytes,
        metadata["shard_sha256"],
        metadata["tokenizer"],
        metadata["layout"],
        has_sizes=account is not None,
    )


def _account(shard: str, files: Storage) -> dict[str, Any] | None:
    """What ``SHARD.tar.sizes`` says of the index; None where it is not there, or not of this index.

    Raises:
        FileNotFoundError: the shard has no index.
        StorageError: a remote file cannot be reached.
    """
    index_bytes = files.size(index_file(shard, files.settings))
    try:
        with SizesFile(sizes_file(shard, files.settings), files) as sizes:
            account = sizes.account
    except (FileNotFoundError, DamagedError):
        return None
    texts = {type(account.get(name)) for name in ACCOUNT} == {str}
    fits = account.get("version") == INDEX_VERSION and account.get("index_bytes") == index_bytes
    return account if texts and fits and isinstance(account.get("rows"), int) else None


def has_index(shard: str, storage: StorageSettings | None = None) -> bool:
    """Whether both files of an index are there; not whether they fit."""
    files = Storage(storage)
    return files.exists(index_file(shard, storage)) and files.exists(offsets_file(shard, storage))
