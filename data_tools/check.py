"""``keye-data check``: open every sample and say what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_tools.decode_options import add_decode_arguments, decode_limits_from
from data_tools.index_cmd import NO_TENSORS
from data_tools.storage_options import add_storage_arguments, storage_from
from data_tools.text import one_line
from keye_train.data.energon import LayoutFinder
from keye_train.data.formats import parse_sample
from keye_train.data.index import read_columns, read_metadata
from keye_train.data.limits import Watch, unwatched
from keye_train.data.opening import has_index
from keye_train.data.paths import find_shards
from keye_train.data.pool import ReaderPool
from keye_train.data.reader import ShardReader
from keye_train.data.storage import Storage
from keye_train.data.tar import walk_shard
from keye_train.model.chat import media_slots
from keye_train.model.images import decode_image
from keye_train.model.video import decode_video
from keye_train.runs import file_sha256
from keye_train.sample import MediaKind, SampleError, SampleRef
from keye_train.settings import ResolutionSettings, StorageSettings

DESCRIPTION = """\
Verify shards: the checksum in the index, that every byte range in the index holds the sample it names, and that every
sample can be read; what the index marks as unreadable is named, too. With --decode its media are decoded as training
would do it, which finds media that are broken behind a sound header, and takes much longer; a sample that takes more
than --decode-seconds or --decode-bytes, or that crashes its decoder, is such a problem.

Prints one line for each problem: shard, key, reason. Exit status 1 when there is any.
"""
EXAMPLES = """\
examples:
  keye-data check 'data/*.tar'
  keye-data check data/video-00000.tar --decode
"""


@dataclass(frozen=True)
class Problem:
    """Something wrong with a shard (key "") or one of its samples."""

    shard: str
    key: str
    reason: str


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``check``."""
    parser = subparsers.add_parser(
        "check",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="paths or patterns of .tar files")
    parser.add_argument("--decode", action="store_true", help="decode all images and videos")
    add_decode_arguments(parser)
    add_storage_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check and tell; the exit status."""
    limits, storage = decode_limits_from(arguments), storage_from(arguments)
    shards = find_shards(arguments.shards, storage)
    decoders = ReaderPool(SampleDecoder(), 1, limits, NO_TENSORS, "free some") if arguments.decode else None
    problems = 0
    try:
        for shard in tqdm(shards, unit="shard", desc="check"):
            for problem in check_shard(shard, arguments.decode, storage, decoders):
                problems += 1
                tqdm.write("\t".join(map(one_line, (problem.shard, problem.key, problem.reason))))
    finally:
        if decoders is not None:
            decoders.close()
    print(f"{len(shards)} shards, {problems} problems")
    return 1 if problems else 0


Opening = tuple[SampleRef, dict[str, bytes]]


class SampleDecoder:
    """Decodes samples to the last pixel. Goes into a process that may be lost."""

    def __call__(
        self,
        task: Opening,
        given_up: Mapping[int, str] | None = None,
        watch: Watch = unwatched,
        memory: np.ndarray | None = None,
    ) -> str | None:
        """What is wrong with a sample, under limits; None: nothing."""
        if given_up:
            return given_up[0]
        try:
            with watch(0):
                open_sample(*task, decode=True)
        except SampleError as error:
            return str(error)
        return None


def check_shard(
    shard: str,
    decode: bool = False,
    storage: StorageSettings | None = None,
    decoders: ReaderPool[Opening, str | None] | None = None,
) -> Iterator[Problem]:
    """Everything that is wrong with a shard and its index. A remote shard is fetched once, to TMPDIR.

    Args:
        shard: path or URL.
        decode: decode all media, in this process and without limits where there are no ``decoders``.
        storage: how to reach it.
        decoders: processes of ``SampleDecoder``.
    """
    files = Storage(storage)
    layout = LayoutFinder(files)(shard)
    with files.local_copy(shard) as local:
        indexed = _indexed(shard, str(local), storage)
        if isinstance(indexed, str):
            yield Problem(shard, "", indexed)
        reader = ShardReader(storage)
        found = []
        for row, raw in enumerate(walk_shard(local, layout)):
            found.append(raw.key)
            marked = None
            try:
                if raw.error is not None:
                    raise SampleError(raw.error)
                members = raw.members
                if isinstance(indexed, list) and row < len(indexed) and indexed[row][0] == raw.key:
                    marked = indexed[row][1]
                    _, members = reader.read(shard, row)
                    if members != raw.members:
                        yield Problem(shard, raw.key, "the offsets in .tar.idx point elsewhere: index the shard again")
                ref = SampleRef("", shard, raw.key)
                if not decode or decoders is None:
                    open_sample(ref, members, decode)
                elif (reason := decoders.submit((ref, members)).result()) is not None:
                    raise SampleError(reason)
                if marked is not None:  # of media that only decoding would find broken
                    raise SampleError(marked)
            except SampleError as error:
                yield Problem(shard, raw.key, str(error))
        reader.close()
    files.close()
    if isinstance(indexed, list) and [key for key, _ in indexed] != found:
        yield Problem(shard, "", "the index lists other samples than the shard holds: index the shard again")


def _indexed(shard: str, local: str, storage: StorageSettings | None) -> list[tuple[str, str | None]] | str:
    """Key of each row of the index and why it cannot be read, or what is wrong with the index as a whole."""
    if not has_index(shard, storage):
        return "no index: run keye-data index"
    try:
        metadata = read_metadata(shard, storage)
        columns = read_columns(shard, ["key", "error"], storage)
    except (pa.ArrowInvalid, OSError) as error:
        return f"the index is damaged: {error}"
    if metadata.get("shard_sha256") != file_sha256(local):
        return "the checksum differs from the index: the shard was changed or damaged after it was indexed"
    return list(zip(columns["key"].to_pylist(), columns["error"].to_pylist(), strict=True))


def open_sample(ref: SampleRef, members: dict[str, bytes], decode: bool) -> None:
    """Read a sample, with ``decode`` to the last pixel of its media.

    Raises:
        SampleError: what is wrong with it.
    """
    sample = parse_sample(ref, members)
    if not decode:
        return
    for slot in media_slots(sample.messages):
        decoder = decode_image if slot.kind == MediaKind.image else decode_video
        try:
            decoder(sample.media[slot.name], ResolutionSettings())
        except SampleError as error:
            raise SampleError(f"{slot.name}: {error}") from error
