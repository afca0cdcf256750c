"""``keye-data index``: write the index beside each shard."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from keye_train.data.index import (
    ShardHeader,
    build_index,
    file_sha256,
    find_shards,
    open_header,
    tokenizer_fingerprint,
)

DESCRIPTION = """\
Write the index of each shard: SHARD.tar.index.parquet (key, byte range, text tokens, media sizes, task) and
SHARD.tar.idx (offsets). Media are not decoded; sizes come from their headers. The index belongs to one shard and one
tokenizer: after a change of either, index again.

Shards whose index fits are skipped, so an interrupted command can simply be run again. Samples that cannot be read get
a row with the reason; training leaves them out and names them in its ledger.
"""
EXAMPLES = """\
examples:
  keye-data index data/photos-00000.tar --tokenizer models/keye
  keye-data index 'data/**/*.tar' 'more/{a,b}-*.tar' --tokenizer models/keye --workers 8
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``index``."""
    parser = subparsers.add_parser(
        "index",
        help="write the index beside each shard",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="paths or patterns of .tar files")
    parser.add_argument(
        "--tokenizer", required=True, type=Path, metavar="DIR", help="folder of the tokenizer: model.tokenizer"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    parser.add_argument("--force", action="store_true", help="index also the shards whose index seems to fit")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Index and tell; the exit status."""
    shards = find_shards(arguments.shards)
    fingerprint = tokenizer_fingerprint(arguments.tokenizer)
    todo = shards if arguments.force else [s for s in shards if not is_fresh(s, arguments.tokenizer, fingerprint)]
    samples = 0
    with tqdm(total=len(shards), initial=len(shards) - len(todo), unit="shard", desc="index") as bar:
        for header in index_shards(todo, arguments.tokenizer, arguments.workers):
            samples += header.rows
            bar.set_postfix(samples=samples)
            bar.update()
    print(f"indexed {len(todo)} shards with {samples} samples; {len(shards) - len(todo)} were up to date")
    return 0


def is_fresh(shard: str, tokenizer: Path, fingerprint: str) -> bool:
    """Whether a shard has an index that fits its checksum and the tokenizer."""
    try:
        header = open_header(shard, tokenizer, fingerprint)
    except ValueError:
        return False
    return header.sha256 == file_sha256(shard)


def index_shards(shards: Sequence[str], tokenizer: Path, workers: int) -> Iterator[ShardHeader]:
    """Write the index of each shard, in up to ``workers`` processes; yields as they get ready.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    if workers < 2 or len(shards) < 2:
        loaded, fingerprint = load_tokenizer(tokenizer), tokenizer_fingerprint(tokenizer)
        yield from (build_index(shard, loaded, fingerprint) for shard in shards)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(shards)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(tokenizer,),
    )
    try:
        yield from (future.result() for future in as_completed([pool.submit(_index, shard) for shard in shards]))
    finally:
        pool.shutdown(cancel_futures=True)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a local folder.

    Raises:
        ValueError: there is none.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {folder}: cannot be loaded: {error}") from error


_tokenizer: tuple[PreTrainedTokenizerBase, str] | None = None  # of a worker process


def _prepare(folder: Path) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one thread
    _tokenizer = load_tokenizer(folder), tokenizer_fingerprint(folder)


def _index(shard: str) -> ShardHeader:
    assert _tokenizer is not None, "the process was not prepared"
    return build_index(shard, *_tokenizer)
