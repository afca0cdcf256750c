"""The side-car index of a shard: one small row for each sample, so that plans are made without opening the shard.

``SHARD.tar.index.parquet`` has the columns of ``SCHEMA``; ``SHARD.tar.idx`` has the byte offsets (see ``reader``);
``SHARD.tar.sizes`` repeats what plans need (``sizes_file``). ``indexing`` writes all three, ``opening`` checks that
they belong to the shard and the tokenizer; here is what stands in them and how rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from keye_train.data.facts import Facts
from keye_train.data.paths import index_file, sizes_file
from keye_train.data.sizes_file import Block, DamagedError, SizesFile, joined, within
from keye_train.data.storage import Storage, is_url
from keye_train.runs import file_sha256
from keye_train.settings import StorageSettings

INDEX_VERSION = "3"
"""Goes up whenever the same shard would give other rows: a new layout, or another count of text tokens."""

ROW_GROUP = 4096
"""Rows of an index that are read at once: a plan over a large corpus reads some rows of many shards."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # byte of the sample's first header in the tar
        ("size", pa.int64()),  # bytes of the sample's members in the tar
        ("text_tokens", pa.int32()),  # of the whole conversation without the pad tokens of its media
        (
            "media",  # in the order in which the conversation mentions them
            pa.list_(
                pa.struct(
                    [
                        ("kind", pa.string()),
                        ("width", pa.int32()),
                        ("height", pa.int32()),
                        ("frames", pa.int32()),
                        ("fps", pa.float64()),
                    ]
                )
            ),
        ),
        # Where the conversation can be cut: up to the end of each answer, but not of one that ends it all
        ("cuts", pa.list_(pa.struct([("text_tokens", pa.int32()), ("media", pa.int32())]))),
        ("task", pa.string()),
        ("error", pa.string()),  # why the sample cannot be read; null where it can
    ]
)


ACCOUNT = ("version", "shard_bytes", "shard_sha256", "tokenizer", "layout")
"""What an index says about its shard as a whole, all of it texts."""


@dataclass(frozen=True)
class ShardHeader:
    """What an index says about its shard as a whole."""

    shard: str  # path or URL of the .tar
    rows: int
    shard_bytes: int
    sha256: str  # of the shard
    tokenizer: str  # fingerprint of the tokenizer that counted the text
    layout: str = ""  # of the prepared folder that the shard stands in, see ``energon``
    has_sizes: bool = False  # ``SHARD.tar.sizes`` of this index is there

    @property
    def rows_from(self) -> tuple[str, ...]:
        """What decides the rows of the index, wherever the shard lies."""
        return self.sha256, self.tokenizer, self.layout


def tokenizer_fingerprint(folder: str | Path) -> str:
    """sha256 of the ``tokenizer.json`` in ``folder``.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json: give the folder of a Hugging Face fast tokenizer (model.tokenizer of a "
            "recipe, --tokenizer of a command; that of data=demo comes with its data, by keye-data demo)"
        )
    return file_sha256(path)


def parquet_source(index: str, files: Storage) -> Any:
    """What pyarrow reads an index from: the path of a local one, read in part, or the bytes of a remote one."""
    if not is_url(index):
        return index
    return pa.BufferReader(files.read(index))


def read_columns(shard: str, columns: Sequence[str], storage: StorageSettings | None = None) -> pa.Table:
    """Some columns of the index of a shard that ``opening.open_header`` has accepted."""
    return pq.read_table(parquet_source(index_file(shard, storage), Storage(storage)), columns=list(columns))


def read_rows(
    shard: str, columns: Sequence[str], start: int, stop: int, storage: StorageSettings | None = None
) -> pa.Table:
    """Some columns of the rows ``start`` .. ``stop - 1`` of such an index.

    A local index is read in part; a remote one, a few MB, at once: its parts would take as many requests.
    """
    with pq.ParquetFile(parquet_source(index_file(shard, storage), Storage(storage))) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        bounds = np.cumsum([0, *sizes])
        first, last = int(np.searchsorted(bounds, start, side="right")) - 1, int(np.searchsorted(bounds, stop))
        table = file.read_row_groups(list(range(first, last)), columns=list(columns), use_threads=False)
    return table.slice(start - int(bounds[first]), stop - start)


def read_sizes(wanted: Sequence[tuple[str, Sequence[tuple[int, int]]]], files: Storage) -> Facts:
    """What plans need of some rows of several shards, one behind the other, from their files of sizes.

    Args:
        wanted: shards that have one, see ``ShardHeader``; each with spans of rows [start, stop), ascending.
        files: reaches them, several at a time where they are not at hand.

    Raises:
        ValueError: such a file is damaged or gone.
        StorageError: a remote one cannot be read.
    """

    def read(item: tuple[str, Sequence[tuple[int, int]]]) -> list[Block]:
        shard, spans = item
        path = sizes_file(shard, files.settings)
        try:
            with SizesFile(path, files) as sizes:
                return sizes.blocks(spans)
        except (FileNotFoundError, DamagedError) as error:
            mend = f"delete {path} and run keye-data index on {shard}, which writes it anew"
            raise ValueError(f"{error}: {mend}") from error

    try:
        remote = any(files.is_remote(shard) for shard, _ in wanted)
        blocks = [block for own in files.map_quick(read, wanted, remote) for block in own]
    finally:
        files.close()
    facts, counts = joined(blocks)
    return facts.where(within(np.array([span for _, own in wanted for span in own]), counts))


def read_metadata(shard: str, storage: StorageSettings | None = None) -> dict[str, str]:
    """What the index of a shard says about the shard as a whole."""
    schema = pq.read_schema(parquet_source(index_file(shard, storage), Storage(storage)))
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def read_key(shard: str, row: int, storage: StorageSettings | None = None) -> str:
    """Key of one sample, for messages."""
    return read_rows(shard, ["key"], row, row + 1, storage)["key"][0].as_py()
