"""``keye-data requeue``: samples of a quarantine list that can be read by now, as a source of their own."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.check import open_sample
from data_tools.decode_options import add_decode_arguments, decode_limits_from
from data_tools.index_cmd import NO_TENSORS, index_shards
from data_tools.shards import write_shard
from data_tools.storage_options import add_storage_arguments, storage_from
from data_tools.text import one_line
from keye_train import runs
from keye_train.data.index import read_columns
from keye_train.data.limits import Watch, unwatched
from keye_train.data.opening import open_header
from keye_train.data.pool import ReaderPool
from keye_train.data.quarantine import read_list
from keye_train.data.reader import ShardReader
from keye_train.sample import SampleError, SampleRef
from keye_train.settings import StorageSettings

DESCRIPTION = """\
Read the samples of quarantine lists once more, after their shards were mended and indexed again. Those that can be read
now, media decoded and all, go into a new shard with its index: a source for the next run, so that what was left out is
trained on after all. A sample is found by its key in the shard of that name.

--left FILE writes those that still cannot be read as a new quarantine list, each with its reason of now; one whose key
is gone stands there as it was, so it excludes nothing in the mended shard. Exit status 1 when there are any.

Decoding is held to --decode-seconds and --decode-bytes, in a process that may be lost.
"""
EXAMPLES = """\
examples:
  keye-data ledger runs/2_multitask --quarantine bad.jsonl
  (mend the shards, keye-data index SHARDS)
  keye-data requeue bad.jsonl --out again.tar --tokenizer models/keye --left still_bad.jsonl
"""
Entry = dict[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``requeue``."""
    parser = subparsers.add_parser(
        "requeue",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lists", nargs="+", type=Path, metavar="LIST", help="files of keye-data ledger --quarantine")
    parser.add_argument("--out", required=True, type=Path, metavar="SHARD", help="the new .tar")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="folder: model.tokenizer")
    parser.add_argument("--left", type=Path, metavar="FILE", help="list of those that still cannot be read")
    add_decode_arguments(parser)
    add_storage_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read again and tell; the exit status."""
    limits, storage = decode_limits_from(arguments), storage_from(arguments)
    entries = [entry for file in arguments.lists for entry in read_list(file)]
    places = find_places(entries, arguments.tokenizer, storage)
    left: list[Entry] = [
        {**entry, "reason": "its shard has no sample of that key"} for entry, row in places if row is None
    ]
    found = [(entry, row) for entry, row in places if row is not None]
    pool = ReaderPool(SampleOpener(storage), 1, limits, NO_TENSORS, "free some")
    try:
        written = write_shard(arguments.out, _readable(pool, found, left)).samples
    finally:
        pool.close()
    if arguments.left:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in left)
        runs.write_text_atomic(arguments.left, "".join(lines))
    print(f"{written} of {len(entries)} samples can be read now, {len(left)} cannot")
    for entry in left:
        print("  " + one_line(f"{entry['shard']} {entry['key']}: {entry['reason']}"))
    if written:
        list(index_shards([str(arguments.out)], arguments.tokenizer, 0))  # each was read to the end just now
        out = shlex.quote(str(arguments.out))
        print(f"to train on them: a source `again: {{shards: [{out}]}}` in the data recipe, with a weight in a mixture")
    else:
        arguments.out.unlink()
    return 1 if left else 0


def find_places(entries: Sequence[Entry], tokenizer: Path, storage: StorageSettings) -> list[tuple[Entry, int | None]]:
    """Each sample with its checksum and row of now; as it was, and row None, where its key is no longer there.

    Raises:
        ValueError: a shard has no index, or a stale one.
    """
    by_shard: dict[str, list[Entry]] = {}
    for entry in entries:
        by_shard.setdefault(entry["shard"], []).append(entry)
    places: list[tuple[Entry, int | None]] = []
    for shard, own in by_shard.items():
        sha256 = open_header(shard, tokenizer, storage=storage).sha256
        keys: list[str] = read_columns(shard, ["key"], storage)["key"].to_pylist()
        rows = {key: row for row, key in reversed([*enumerate(keys)])}
        for entry in own:
            same = entry["sha256"] == sha256  # the shard is as it was: keys that come twice are told apart
            row = entry["row"] if same else rows.get(entry["key"])
            # The old row under the new checksum would name another sample.
            places.append((entry if row is None else {**entry, "sha256": sha256, "row": row}, row))
    return places


@dataclass(frozen=True)
class Opened:
    """A sample that was read to the last pixel, or why it cannot be."""

    members: dict[str, bytes]
    problem: str | None


class SampleOpener:
    """Reads one sample with all its media. Goes into a process that may be lost."""

    def __init__(self, storage: StorageSettings) -> None:
        self._shards = ShardReader(storage)

    def __call__(
        self,
        task: tuple[Entry, int],
        given_up: Mapping[int, str] | None = None,
        watch: Watch = unwatched,
        memory: np.ndarray | None = None,
    ) -> Opened:
        """The sample of a row, under limits."""
        entry, row = task
        try:
            if given_up:
                raise SampleError(given_up[0])
            key, members = self._shards.read(entry["shard"], row)
            with watch(0):
                open_sample(SampleRef(entry["source"], entry["shard"], key), members, decode=True)
            return Opened(members, None)
        except SampleError as error:
            return Opened({}, str(error))


def _readable(
    pool: ReaderPool[tuple[Entry, int], Opened], found: Sequence[tuple[Entry, int]], left: list[Entry]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of the samples that can be read; the others go to ``left``."""
    for entry, row in tqdm(found, unit="sample", desc="requeue"):
        opened = pool.submit((entry, row)).result()
        if opened.problem is None:
            yield f"{entry['sha256'][:12]}-{row:09d}", opened.members
        else:
            left.append({**entry, "reason": opened.problem})
