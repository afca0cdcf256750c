"""Writing the index of a shard: every sample is looked into once, its media from their headers alone.

Nothing is decoded, and how many tokens the media take is not stored: it follows from their sizes and the recipe's
resolution settings.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from keye_train.data.energon import LayoutFinder
from keye_train.data.formats import parse_with_turns
from keye_train.data.index import ACCOUNT, INDEX_VERSION, ROW_GROUP, ShardHeader
from keye_train.data.index_columns import IndexColumns
from keye_train.data.limits import Watch, unwatched
from keye_train.data.paths import index_file, offsets_file, sizes_file
from keye_train.data.sizes_file import sizes_bytes
from keye_train.data.storage import Storage, StorageError
from keye_train.data.tar import RawSample, walk_shard
from keye_train.model.chat import MediaSlot, Turn, text_sizes
from keye_train.model.images import probe_image, probe_plain
from keye_train.model.video import probe_video
from keye_train.runs import file_sha256
from keye_train.sample import MediaInfo, MediaKind, Sample, SampleError, SampleRef
from keye_train.settings import StorageSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

BATCH_SAMPLES, BATCH_BYTES = 128, 2**27
"""Samples whose texts are counted together, and the bytes after which no more are waited for. More samples would only
keep more objects alive for the collector of garbage to walk through."""


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
        StorageError: an index cannot be written, or a remote shard cannot be read.
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
    table = columns.table(metadata)
    rows = len(table)
    _write(files, offsets_file(shard, storage), columns.offsets().tobytes())
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP)
    # Behind the offsets: its presence means that both are there. The sizes, last, name the bytes of the file before.
    index = sink.getvalue().to_pybytes()
    _write(files, index_file(shard, storage), index)
    account = metadata | {"rows": rows, "index_bytes": len(index)}
    _write(files, sizes_file(shard, storage), sizes_bytes(table, account))
    files.close()
    if columns.bad:
        advice = f"keye-data check {shlex.quote(shard)}"
        log.warning("%s: %d of %d samples cannot be read; see `%s`", shard, columns.bad, rows, advice)
    return ShardHeader(shard, rows, total, metadata["shard_sha256"], fingerprint, metadata["layout"], True)


def add_sizes(header: ShardHeader, storage: StorageSettings | None = None) -> None:
    """Write ``SHARD.tar.sizes`` to an index that has none, as those of earlier versions; the shard is not read."""
    files = Storage(storage)
    index = files.read(index_file(header.shard, storage))
    table = pq.read_table(pa.BufferReader(index))
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    account = {name: metadata[name] for name in ACCOUNT} | {"rows": len(table), "index_bytes": len(index)}
    _write(files, sizes_file(header.shard, storage), sizes_bytes(table, account))


def _write(files: Storage, path: str, data: bytes) -> None:
    try:
        files.write(path, data)
    except OSError as error:
        raise StorageError(
            f"the index cannot be written: {error}; where the folder of a shard is read-only, give another one with "
            "keye-data index --index-dir and data.storage.index_dir"
        ) from error


def _index_columns(raws: Iterable[RawSample], tokenizer: PreTrainedTokenizerBase, describe: _Describer) -> IndexColumns:
    """What stands in the samples; texts are counted many at a time, which the tokenizer does faster."""
    columns = IndexColumns()
    for batch in _batches(raws):
        described = [describe(row, raw) for row, raw in enumerate(batch, len(columns))]
        sizes = text_sizes(tokenizer, [found.turns for found in described])
        for raw, found, size in zip(batch, described, sizes, strict=True):
            columns.add(raw.key, raw.offset, raw.size, found.task, found.error)
            columns.add_contents(size.tokens, size.cuts, found.media)
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


class _Described(NamedTuple):
    """What is known of a sample before its text is counted."""

    turns: Sequence[Turn]
    media: Sequence[MediaInfo]
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
            sample, turns, slots = parse_with_turns(SampleRef("", self._shard, raw.key), raw.members)
            plain = [_probe_plain(sample, slot) for slot in slots]
            media = [info for info in plain if info is not None]
            if len(media) < len(plain):  # Pillow or FFmpeg has to look
                with self._watch(row):
                    media = [info or _probe(sample, slot) for info, slot in zip(plain, slots, strict=True)]
            return _Described(turns, media, sample.task, None)
        except SampleError as error:
            return _Described((), (), "", str(error))


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
