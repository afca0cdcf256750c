"""The side-car index of a shard: one small row for each sample, so that plans are made without opening the shard.

``SHARD.tar.index.parquet`` has the columns of ``SCHEMA``; ``SHARD.tar.idx`` has the byte offsets (see ``reader``).
Sizes of media come from their headers: nothing is decoded. How many tokens the media take is not stored, because it
follows from the sizes and the recipe's resolution settings.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from transformers import PreTrainedTokenizerBase

from keye_train.data.formats import parse_sample
from keye_train.data.reader import OFFSET_BYTES, RawSample, offsets_path, walk_shard
from keye_train.model.chat import media_slots, text_token_count
from keye_train.model.images import probe_image
from keye_train.model.video import probe_video
from keye_train.sample import MediaInfo, MediaKind, Sample, SampleError, SampleRef

log = logging.getLogger(__name__)

INDEX_VERSION = "1"
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
        ("task", pa.string()),
        ("error", pa.string()),  # why the sample cannot be read; null where it can
    ]
)


def index_path(shard: str | Path) -> Path:
    """Where the index of a shard stands."""
    return Path(f"{shard}.index.parquet")


@dataclass(frozen=True)
class ShardHeader:
    """What an index says about its shard as a whole."""

    shard: str  # path of the .tar
    rows: int
    shard_bytes: int
    sha256: str  # of the shard
    tokenizer: str  # fingerprint of the tokenizer that counted the text


def tokenizer_fingerprint(folder: str | Path) -> str:
    """sha256 of the ``tokenizer.json`` in ``folder``.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: give the folder of a Hugging Face fast tokenizer")
    return file_sha256(path)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_shards(patterns: Iterable[str]) -> list[str]:
    """Paths of the shards that patterns with ``*``, ``?``, ``[...]`` and ``{a,b}`` stand for, each once, in order.

    Raises:
        ValueError: a pattern matches nothing, a shard is missing, or a URL is given.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if "://" in pattern:
            raise ValueError(f"{pattern}: shards are read from local paths; copy or mount them and give the path")
        for plain in braceexpand(pattern, escape=False):
            matches = [plain]
            if glob.has_magic(plain):
                matches = sorted(glob.glob(plain, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute ones)
            if not matches:
                raise ValueError(f"no shard matches {plain}; check the path in data.sources (from {Path.cwd()})")
            for match in matches:
                if not Path(match).is_file():
                    raise ValueError(f"the shard {match} does not exist; check the path in data.sources")
                found[match] = None
    return list(found)


# ------------------------------------------------------------------------------------------------------ writing


def build_index(shard: str | Path, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> ShardHeader:
    """Write the two index files of a local shard; they appear whole or not at all.

    Args:
        shard: path of the .tar.
        tokenizer: counts the text tokens.
        fingerprint: of that tokenizer, see ``tokenizer_fingerprint``.
    """
    shard = Path(shard)
    sha256 = file_sha256(shard)
    total = shard.stat().st_size
    raws: list[tuple[int, int]] = []
    rows: list[dict[str, Any]] = []
    for raw in walk_shard(shard):
        rows.append(index_row(raw, tokenizer, str(shard)))
        raws.append((raw.offset, raw.offset + raw.size))
    offsets = np.array([start for start, _ in raws] + [raws[-1][1] if raws else 0], dtype="<u8")
    metadata = {
        "version": INDEX_VERSION,
        "shard_bytes": str(total),
        "shard_sha256": sha256,
        "tokenizer": fingerprint,
    }
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(metadata))
    _replace(offsets_path(shard), offsets.tobytes())
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    _replace(index_path(shard), sink.getvalue().to_pybytes())  # last: its presence means that both are there
    bad = sum(row["error"] is not None for row in rows)
    if bad:
        log.warning("%s: %d of %d samples cannot be read; see `keye-data check %s`", shard, bad, len(rows), shard)
    return ShardHeader(str(shard), len(rows), total, sha256, fingerprint)


def index_row(raw: RawSample, tokenizer: PreTrainedTokenizerBase, shard: str) -> dict[str, Any]:
    """Row of ``SCHEMA`` for one sample, readable or not."""
    row: dict[str, Any] = {
        "key": raw.key,
        "offset": raw.offset,
        "size": raw.size,
        "text_tokens": 0,
        "media": [],
        "task": "",
        "error": raw.error,
    }
    if raw.error is not None:
        return row
    try:
        sample = parse_sample(SampleRef("", shard, raw.key), raw.members)
        row["media"] = [vars(info) | {"kind": info.kind.value} for info in probe_media(sample)]
        row["text_tokens"] = text_token_count(tokenizer, sample.messages)
        row["task"] = sample.task
    except SampleError as error:
        row["error"] = str(error)
        row["media"] = []
    return row


def probe_media(sample: Sample) -> list[MediaInfo]:
    """Sizes of the media in the order in which the conversation mentions them, from their headers.

    Raises:
        SampleError: a header cannot be read.
    """
    infos = []
    for slot in media_slots(sample.messages):
        probe = probe_image if slot.kind == MediaKind.image else probe_video
        try:
            infos.append(probe(sample.media[slot.name]))
        except SampleError as error:
            raise SampleError(f"{slot.name}: {error}") from error
    return infos


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


# ------------------------------------------------------------------------------------------------------ reading


def open_header(shard: str, tokenizer_folder: str | Path, fingerprint: str | None = None) -> ShardHeader:
    """Check that the index of a shard is there, whole and made for this shard and tokenizer, and read its header.

    The shard's size is compared, not its checksum, so that opening stays cheap; ``keye-data check`` compares both.

    Args:
        shard: path of the .tar.
        tokenizer_folder: the recipe's ``model.tokenizer``.
        fingerprint: of that tokenizer, where the caller knows it already.

    Raises:
        ValueError: with the command that mends it.
    """
    mend = f"run: keye-data index {shlex.quote(shard)} --tokenizer {shlex.quote(str(tokenizer_folder))}"
    fingerprint = fingerprint or tokenizer_fingerprint(tokenizer_folder)
    try:
        shard_bytes = Path(shard).stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"the shard {shard} does not exist; check the path in data.sources") from error
    if not index_path(shard).exists() or not offsets_path(shard).exists():
        raise ValueError(f"the shard {shard} has no index; {mend}")
    try:
        file = pq.ParquetFile(index_path(shard))
        schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"the index of the shard {shard} is damaged ({error}); {mend}") from error
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if metadata.get("version") != INDEX_VERSION or not schema.equals(SCHEMA):
        raise ValueError(
            f"the index of the shard {shard} has format {metadata.get('version')}, this program reads "
            f"{INDEX_VERSION}; {mend}"
        )
    offsets_whole = offsets_path(shard).stat().st_size == (rows + 1) * OFFSET_BYTES
    if metadata["shard_bytes"] != str(shard_bytes) or not offsets_whole:
        raise ValueError(
            f"the index of the shard {shard} is stale: it was made when the shard had {metadata['shard_bytes']} bytes, "
            f"now it has {shard_bytes}; {mend}"
        )
    if metadata["tokenizer"] != fingerprint:
        raise ValueError(
            f"the index of the shard {shard} was made with another tokenizer than {tokenizer_folder}, so its token "
            f"counts do not hold; {mend}"
        )
    return ShardHeader(shard, rows, shard_bytes, metadata["shard_sha256"], fingerprint)


def read_columns(shard: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of the index of a shard that ``open_header`` has accepted."""
    return pq.read_table(index_path(shard), columns=list(columns))


def read_rows(shard: str, columns: Sequence[str], start: int, stop: int) -> pa.Table:
    """Some columns of the rows ``start`` .. ``stop - 1`` of such an index, reading little besides."""
    with pq.ParquetFile(index_path(shard)) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        bounds = np.cumsum([0, *sizes])
        first, last = int(np.searchsorted(bounds, start, side="right")) - 1, int(np.searchsorted(bounds, stop))
        table = file.read_row_groups(list(range(first, last)), columns=list(columns), use_threads=False)
    return table.slice(start - int(bounds[first]), stop - start)


def read_key(shard: str, row: int) -> str:
    """Key of one sample, for messages."""
    return read_rows(shard, ["key"], row, row + 1)["key"][0].as_py()
