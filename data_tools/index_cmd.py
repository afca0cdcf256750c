"""``keye-data index``: write the index beside each shard."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from types import MappingProxyType

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_tools.decode_options import LIMITS, add_decode_arguments, decode_limits_from
from data_tools.storage_options import add_storage_arguments, storage_from
from keye_train.data.energon import LayoutFinder
from keye_train.data.index import ShardHeader, tokenizer_fingerprint
from keye_train.data.indexing import add_sizes, build_index
from keye_train.data.limits import DecodeLimits, Watch, unwatched
from keye_train.data.opening import open_header
from keye_train.data.paths import find_shards, index_file
from keye_train.data.pool import ReaderPool
from keye_train.data.storage import Storage, StorageError
from keye_train.runs import file_sha256
from keye_train.settings import StorageSettings

NO_TENSORS = 4096
"""Bytes of shared memory for processes that send none: a page, which is the least."""

DESCRIPTION = """\
Write the index of each shard: SHARD.tar.index.parquet (key, byte range, text tokens, media sizes, task),
SHARD.tar.sizes (what plans need of it, for quick starts) and SHARD.tar.idx (offsets), beside the shard or under
--index-dir. Media are not decoded; sizes come from their headers.
The index belongs to one shard and one tokenizer: after a change of either, index again.

Shards whose index fits are skipped, so an interrupted command can simply be run again: an index that is newer than its
shard and has its size is taken as fitting, any other one is compared with the checksum of the shard (--force indexes
again). An index of an earlier version that fits gets its file of sizes from its parquet file.

Samples that cannot be read get a row with the reason; training leaves them out and names them in its ledger.

Where more than a plain header has to be read, a sample is held to --decode-seconds and --decode-bytes; one that takes
more, or that crashes its decoder, is such a sample.

Shards of a folder prepared for megatron-energon whose .nv-meta/dataset.yaml cannot be used are left out, all others
are indexed; then the command ends with what is wrong with each such file.

Shards behind URLs are fetched once each, to TMPDIR. Credentials come from the environment.
"""
EXAMPLES = """\
examples:
  keye-data index data/photos-00000.tar --tokenizer models/keye
  keye-data index 'data/**/*.tar' 'more/{a,b}-*.tar' --tokenizer models/keye --workers 8
  keye-data index 's3://bucket/laion/{00000..00999}.tar' --allow-network --index-dir indexes --tokenizer models/keye
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``index``."""
    parser = subparsers.add_parser(
        "index",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="paths or patterns of .tar files")
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="DIR", help="folder of the tokenizer: model.tokenizer"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes, each with a shard of its own; as many as this command may use processors (%(default)s); 0: "
        "this one, without limits",
    )
    add_decode_arguments(parser)
    parser.add_argument("--force", action="store_true", help="index also the shards whose index seems to fit")
    add_storage_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Index and tell; the exit status."""
    if arguments.workers < 0:
        raise ValueError("--workers is at least 0")
    limits, storage = decode_limits_from(arguments), storage_from(arguments)
    shards = find_shards(arguments.shards, storage)
    web = next((shard for shard in shards if shard.startswith(("http://", "https://"))), None)
    if web is not None and storage.index_dir is None:
        raise ValueError(f"{web}: a web server takes no index; give a folder for indexes with --index-dir")
    fingerprint = tokenizer_fingerprint(arguments.tokenizer)
    files = Storage(storage)
    broken = broken_folders(shards, files)
    left_out = {shard for own in broken.values() for shard in own}
    shards = [shard for shard in shards if shard not in left_out]
    sizes = dict(zip(shards, files.map(files.size, shards), strict=True))
    fresh = [False] * len(shards)
    if not arguments.force:
        fresh = files.map(lambda shard: is_fresh(shard, arguments.tokenizer, fingerprint, storage), shards)
    files.close()
    # The largest first, so that no process is left alone with one at the end.
    todo = sorted((s for s, done in zip(shards, fresh, strict=True) if not done), key=lambda s: -sizes[s])
    done_bytes = sum(sizes.values()) - sum(sizes[shard] for shard in todo)
    headers = index_shards(todo, arguments.tokenizer, arguments.workers, storage, limits)
    samples, seconds = _follow(headers, len(todo), sum(sizes.values()), done_bytes)
    speed = ""
    if todo:
        speed = f" ({samples / seconds:,.0f} samples/s, {sum(sizes[s] for s in todo) / seconds / 1e6:,.0f} MB/s)"
    print(f"indexed {len(todo)} shards with {samples} samples; {len(shards) - len(todo)} were up to date{speed}")
    if broken:
        reasons = "; ".join(f"{reason} ({_named(own)})" for reason, own in broken.items())
        raise ValueError(f"shards of prepared folders were left out: {reasons}; mend the files and run this again")
    return 0


def _named(shards: Sequence[str]) -> str:
    return ", ".join(shards[:3]) + (f" and {len(shards) - 3} more" if len(shards) > 3 else "")


def _follow(headers: Iterator[ShardHeader], shards: int, total_bytes: int, done_bytes: int) -> tuple[int, float]:
    """Show the progress; samples that were indexed, and the seconds by the clock that it took."""
    samples, began, seconds = 0, time.perf_counter(), 0.0
    with tqdm(total=total_bytes, initial=done_bytes, unit="B", unit_scale=True, desc="index") as bar:
        for number, header in enumerate(headers, start=1):
            samples, seconds = samples + header.rows, time.perf_counter() - began
            speed = {"samples/s": f"{samples / seconds:,.0f}"}
            bar.set_postfix(shards=f"{number}/{shards}", samples=samples, **speed, refresh=False)
            bar.update(header.shard_bytes)
    return samples, seconds


def broken_folders(shards: Sequence[str], files: Storage) -> dict[str, list[str]]:
    """What is wrong with ``.nv-meta`` of prepared folders -> the shards that it concerns; see ``LayoutFinder``."""
    layouts = LayoutFinder(files)
    found: dict[str, list[str]] = {}

    def problem(shard: str) -> str | None:
        try:
            layouts(shard)
        except ValueError as error:
            return " ".join(str(error).split())  # YAML's own messages have several lines
        return None

    by_folder: dict[str, list[str]] = {}
    for shard in shards:
        by_folder.setdefault(shard.rpartition("/")[0], []).append(shard)
    reasons = files.map(problem, [own[0] for own in by_folder.values()])
    for reason, own in zip(reasons, by_folder.values(), strict=True):
        if reason is not None:
            found.setdefault(reason, []).extend(own)
    return found


def is_fresh(shard: str, tokenizer: Path, fingerprint: str, storage: StorageSettings | None = None) -> bool:
    """Whether a shard has an index that fits the tokenizer, and its size and time of change or else its checksum.

    One that fits and has no ``SHARD.tar.sizes`` gets it here.

    Raises:
        StorageError: a remote shard or index cannot be reached.
    """
    header = _header(shard, tokenizer, fingerprint, storage)
    if header is None:
        return False
    files = Storage(storage)
    changed, indexed = files.modified(shard), files.modified(index_file(shard, storage))
    fresh = changed is not None and indexed is not None and changed < indexed
    if not fresh:
        with files.local_copy(shard) as local:
            fresh = header.sha256 == file_sha256(local)
    if fresh and not header.has_sizes:
        add_sizes(header, storage)
    return fresh


def _header(shard: str, tokenizer: Path, fingerprint: str, storage: StorageSettings | None) -> ShardHeader | None:
    """What an index says that fits the tokenizer and the size of its shard."""
    try:
        return open_header(shard, tokenizer, fingerprint, storage)
    except StorageError:
        raise
    except ValueError:
        return None


def index_shards(
    shards: Sequence[str],
    tokenizer: Path,
    workers: int,
    storage: StorageSettings | None = None,
    limits: DecodeLimits = LIMITS,
) -> Iterator[ShardHeader]:
    """Write the index of each shard, in up to ``workers`` processes; yields as they get ready.

    A sample that hangs its decoder, takes too much memory or crashes costs its process, which is replaced; it is marked
    as unreadable, and its shard is begun anew. With ``workers`` 0 this process does the work, without limits.

    Raises:
        ValueError: the tokenizer cannot be loaded, or see ``build_index``.
        StorageError: see ``build_index``.
    """
    if not shards:
        return
    index = ShardIndexer(load_tokenizer(tokenizer), tokenizer_fingerprint(tokenizer), storage)
    if not workers:
        yield from map(index, shards)
        return
    pool = ReaderPool(index, min(workers, len(shards)), limits, NO_TENSORS, "lower --workers")
    try:
        yield from (future.result() for future in as_completed([pool.submit(shard) for shard in shards]))
    finally:
        pool.close()


class ShardIndexer:
    """Indexes one shard after another. Goes into the processes of a pool."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fingerprint: str, storage: StorageSettings | None) -> None:
        self._tokenizer, self._fingerprint, self._storage = tokenizer, fingerprint, storage

    def __call__(
        self,
        shard: str,
        given_up: Mapping[int, str] = MappingProxyType({}),
        watch: Watch = unwatched,
        memory: np.ndarray | None = None,
    ) -> ShardHeader:
        """Write the index of a shard; see ``build_index``. There are no tensors to make in ``memory``."""
        return build_index(shard, self._tokenizer, self._fingerprint, self._storage, given_up, watch)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a local folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {folder}: cannot be loaded: {error}") from error
