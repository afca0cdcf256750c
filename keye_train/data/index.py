"""The side-car index of a shard: one small row for each sample, so that plans are made without opening the shard.

``SHARD.tar.index.parquet`` has the columns of ``SCHEMA``; ``SHARD.tar.idx`` has the byte offsets (see ``reader``).
Sizes of media come from their headers: nothing is decoded. How many tokens the media take is not stored, because it
follows from the sizes and the recipe's resolution settings.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from keye_train.data.energon import LayoutFinder
from keye_train.data.facts import Facts
from keye_train.data.formats import parse_with_turns
from keye_train.data.limits import Watch, unwatched
from keye_train.data.paths import OFFSET_BYTES, find_shards, index_file, index_path, offsets_file, sizes_file
from keye_train.data.sizes_file import Block, DamagedError, SizesFile, joined, sizes_bytes, within
from keye_train.data.storage import Storage, StorageError, is_url
from keye_train.data.tar import RawSample, walk_shard
from keye_train.model.chat import MediaSlot, TextSize, Turn, slots_of, text_sizes
from keye_train.model.images import probe_image, probe_plain
from keye_train.model.video import probe_video
from keye_train.runs import file_sha256
from keye_train.sample import MediaInfo, MediaKind, Sample, SampleError, SampleRef
from keye_train.settings import StorageSettings

__all__ = [
    "INDEX_VERSION",
    "ROW_GROUP",
    "SCHEMA",
    "ShardHeader",
    "add_sizes",
    "build_index",
    "find_shards",
    "has_index",
    "index_path",
    "open_header",
    "open_headers",
    "read_columns",
    "read_key",
    "read_metadata",
    "read_rows",
    "read_sizes",
    "tokenizer_fingerprint",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

INDEX_VERSION = "3"
"""Goes up whenever the same shard would give other rows: a new layout, or another count of text tokens."""

BATCH_SAMPLES, BATCH_BYTES = 512, 2**27
"""Samples whose texts are counted together, and the bytes after which no more are waited for."""

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


# ------------------------------------------------------------------------------------------------------ writing


def build_index(
    shard: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    fingerprint: str,
    storage: StorageSettings | None = None,
    given_up: Mapping[int, str] = MappingProxyType({}),
    watch: Watch = unwatched,
) -> ShardHeader:
    """Write the three index files of a shard; each appears whole or not at all.

    Args:
        shard: path or URL of the .tar. A remote one is fetched once, to TMPDIR.
        tokenizer: counts the text tokens.
        fingerprint: of that tokenizer, see ``tokenizer_fingerprint``.
        storage: ``data.storage``.
        given_up: row -> why its media are not to be probed again.
        watch: ``with watch(row):`` around the work of a decoder on a sample holds it to limits.

    Raises:
        ValueError: the shard stands in a folder whose ``.nv-meta`` cannot be used.
        StorageError: a remote shard or index cannot be read or written.
    """
    shard = str(shard)
    files = Storage(storage)
    layout = LayoutFinder(files)(shard)
    with files.local_copy(shard) as local, ThreadPoolExecutor(1) as thread:
        sha256 = thread.submit(file_sha256, local)  # beside the walk: hashing leaves the interpreter free
        describe = _Describer(shard, given_up, watch)
        columns = _index_columns(walk_shard(local, layout), tokenizer, describe)
        total = local.stat().st_size
        metadata = {
            "version": INDEX_VERSION,
            "shard_bytes": str(total),
            "shard_sha256": sha256.result(),
            "tokenizer": fingerprint,
            "layout": str(layout or ""),
        }
    table = pa.table(columns, schema=SCHEMA.with_metadata(metadata))
    rows, ends = len(table), [start + size for start, size in zip(columns["offset"], columns["size"], strict=True)]
    files.write(
        offsets_file(shard, storage), np.array([*columns["offset"], *(ends[-1:] or [0])], dtype="<u8").tobytes()
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    # Behind the offsets: its presence means that both are there. The sizes, last, name the bytes of the file before.
    index = sink.getvalue().to_pybytes()
    files.write(index_file(shard, storage), index)
    account = metadata | {"rows": rows, "index_bytes": len(index)}
    files.write(sizes_file(shard, storage), sizes_bytes(table, account))
    files.close()
    bad = rows - columns["error"].count(None)
    if bad:
        log.warning("%s: %d of %d samples cannot be read; see `keye-data check %s`", shard, bad, rows, shard)
    return ShardHeader(shard, rows, total, metadata["shard_sha256"], fingerprint, metadata["layout"], True)


def add_sizes(header: ShardHeader, storage: StorageSettings | None = None) -> None:
    """Write ``SHARD.tar.sizes`` to an index that has none, as those of earlier versions; the shard is not read."""
    files = Storage(storage)
    index = files.read(index_file(header.shard, storage))
    table = pq.read_table(pa.BufferReader(index))
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    account = {name: metadata[name] for name in ACCOUNT} | {"rows": len(table), "index_bytes": len(index)}
    files.write(sizes_file(header.shard, storage), sizes_bytes(table, account))


def _index_columns(
    raws: Iterable[RawSample], tokenizer: PreTrainedTokenizerBase, describe: _Describer
) -> dict[str, list[Any]]:
    """Columns of ``SCHEMA``; texts are counted many at a time, which the tokenizer does faster."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for batch in _batches(raws):
        first = len(columns["key"])
        described = [describe(row, raw) for row, raw in enumerate(batch, first)]
        sizes = iter(text_sizes(tokenizer, [found.turns for found in described if found.error is None]))
        for raw, found in zip(batch, described, strict=True):
            size = next(sizes) if found.error is None else TextSize(0, ())
            columns["key"].append(raw.key)
            columns["offset"].append(raw.offset)
            columns["size"].append(raw.size)
            columns["text_tokens"].append(size.tokens)
            columns["media"].append(found.media)
            columns["cuts"].append([{"text_tokens": tokens, "media": media} for tokens, media in size.cuts])
            columns["task"].append(found.task)
            columns["error"].append(found.error)
    return columns


def _batches(raws: Iterable[RawSample]) -> Iterator[list[RawSample]]:
    """Up to BATCH_SAMPLES samples and about BATCH_BYTES at a time."""
    batch: list[RawSample] = []
    size_bytes = 0
    for raw in raws:
        batch.append(raw)
        size_bytes += raw.size
        if len(batch) >= BATCH_SAMPLES or size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    yield batch


@dataclass(frozen=True)
class _Described:
    """What is known of a sample before its text is counted."""

    turns: list[Turn]
    media: list[dict[str, Any]]
    task: str
    error: str | None  # why it cannot be read


class _Describer:
    """Looks into the samples of one shard."""

    def __init__(self, shard: str, given_up: Mapping[int, str], watch: Watch) -> None:
        self._shard, self._given_up, self._watch = shard, given_up, watch

    def __call__(self, row: int, raw: RawSample) -> _Described:
        """What stands in the sample of a row."""
        try:
            if (problem := self._given_up.get(row, raw.error)) is not None:
                raise SampleError(problem)
            sample, turns = parse_with_turns(SampleRef("", self._shard, raw.key), raw.members)
            slots = slots_of(turns)
            media = [_probe_plain(sample, slot) for slot in slots]
            if None in media:  # Pillow or FFmpeg has to look
                with self._watch(row):
                    media = [info or _probe(sample, slot) for info, slot in zip(media, slots, strict=True)]
            columns = [vars(info) | {"kind": info.kind.value} for info in media if info is not None]
            return _Described(turns, columns, sample.task, None)
        except SampleError as error:
            return _Described([], [], "", str(error))


def _probe_plain(sample: Sample, slot: MediaSlot) -> MediaInfo | None:
    return _named(slot, probe_plain, sample) if slot.kind == MediaKind.image else None


def _probe(sample: Sample, slot: MediaSlot) -> MediaInfo:
    """Size of an image or video from its header.

    Raises:
        SampleError: it cannot be read.
    """
    return _named(slot, probe_image if slot.kind == MediaKind.image else probe_video, sample)


def _named(slot: MediaSlot, probe: Callable[[bytes], T], sample: Sample) -> T:
    try:
        return probe(sample.media[slot.name])
    except SampleError as error:
        raise SampleError(f"{slot.name}: {error}") from error


# ------------------------------------------------------------------------------------------------------ reading


def open_header(
    shard: str,
    tokenizer_folder: str | Path,
    fingerprint: str | None = None,
    storage: StorageSettings | None = None,
) -> ShardHeader:
    """Check that the index of a shard is there, whole and made for this shard and tokenizer, and read its header.

    The shard's size is compared, not its checksum, so that opening stays cheap; ``keye-data check`` compares both.

    Args:
        shard: path or URL of the .tar.
        tokenizer_folder: the recipe's ``model.tokenizer``.
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
    tokenizer_folder: str | Path,
    fingerprint: str | None = None,
    storage: StorageSettings | None = None,
) -> list[ShardHeader]:
    """``open_header`` of many shards, several at a time where the storage has to be waited for."""
    fingerprint = fingerprint or tokenizer_fingerprint(tokenizer_folder)
    files = Storage(storage)
    layouts = LayoutFinder(files)
    try:
        return files.map_quick(lambda shard: _open_header(shard, tokenizer_folder, fingerprint, files, layouts), shards)
    finally:
        files.close()


class _UnfitError(ValueError):
    """What is wrong with the index of a shard, less the way to mend it."""


def _open_header(
    shard: str, tokenizer_folder: str | Path, fingerprint: str, files: Storage, layouts: LayoutFinder
) -> ShardHeader:
    """``open_header`` in an open storage: a start does this for every shard."""
    try:
        header = _header(shard, files)
        if header.tokenizer != fingerprint:
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
        command = f"keye-data index {shlex.quote(shard)} --tokenizer {shlex.quote(str(tokenizer_folder))}{folder}{flag}"
        raise ValueError(f"the {error}; run: {command}") from error
    return header


def _header(shard: str, files: Storage) -> ShardHeader:
    """What the index of a shard says, if it is of the shard as it is now."""
    try:
        shard_bytes = files.size(shard)
    except FileNotFoundError as error:
        raise ValueError(f"the shard {shard} does not exist; check the path in data.sources") from error
    index, offsets = index_file(shard, files.settings), offsets_file(shard, files.settings)
    try:
        offsets_bytes = files.size(offsets)
        account = _account(shard, files)
        if account is None:
            with pq.ParquetFile(_parquet_source(index, files)) as file:
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


def _parquet_source(index: str, files: Storage) -> Any:
    if not is_url(index):
        return index  # read in part
    return pa.BufferReader(files.read(index))


def read_columns(shard: str, columns: Sequence[str], storage: StorageSettings | None = None) -> pa.Table:
    """Some columns of the index of a shard that ``open_header`` has accepted."""
    return pq.read_table(_parquet_source(index_file(shard, storage), Storage(storage)), columns=list(columns))


def read_rows(
    shard: str, columns: Sequence[str], start: int, stop: int, storage: StorageSettings | None = None
) -> pa.Table:
    """Some columns of the rows ``start`` .. ``stop - 1`` of such an index.

    A local index is read in part; a remote one, a few MB, at once: its parts would take as many requests.
    """
    with pq.ParquetFile(_parquet_source(index_file(shard, storage), Storage(storage))) as file:
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
        blocks = [block for own in files.map_quick(read, wanted) for block in own]
    finally:
        files.close()
    facts, counts = joined(blocks)
    return facts.where(within(np.array([span for _, own in wanted for span in own]), counts))


def read_metadata(shard: str, storage: StorageSettings | None = None) -> dict[str, str]:
    """What the index of a shard says about the shard as a whole."""
    schema = pq.read_schema(_parquet_source(index_file(shard, storage), Storage(storage)))
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def read_key(shard: str, row: int, storage: StorageSettings | None = None) -> str:
    """Key of one sample, for messages."""
    return read_rows(shard, ["key"], row, row + 1, storage)["key"][0].as_py()
