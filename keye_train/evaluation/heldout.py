"""Held-out samples: which of them are asked, and what they expect."""

from __future__ import annotations

import hashlib
import logging
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from keye_train.data.formats import parse_sample
from keye_train.data.index import find_shards, has_index, read_columns
from keye_train.data.reader import ShardReader
from keye_train.evaluation.scoring import Target
from keye_train.sample import Sample, SampleError, SampleRef
from keye_train.settings import DataSettings, SettingsError, SourceSettings, StorageSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One held-out sample and what it expects."""

    sample: Sample
    target: Target

    @classmethod
    def of(cls, sample: Sample) -> Question:
        """Raises SampleError where the sample does not say what it expects."""
        return cls(sample, Target.of(sample))


@dataclass(frozen=True)
class Skipped:
    """A held-out sample that is not asked."""

    shard: str
    key: str
    reason: str


@dataclass
class Heldout:
    """The samples of one task."""

    task: str
    questions: list[Question] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def read_tasks(data: DataSettings, samples_per_task: int, seed: int, behind: int = 0) -> dict[str, Heldout]:
    """Draw at most ``samples_per_task`` samples of each task of ``data.heldout``.

    The draw depends on the seed, the task's name and the rows of its shards alone, so every model is asked the same.
    Samples that cannot be read stand in ``skipped``.

    Args:
        behind: this many samples of the draw are passed over: a call for the first n and one for those behind n have
            no sample in common.

    Raises:
        SettingsError: a shard or its index is missing, or a task has no sample that can be read.
    """
    tasks = {}
    for task, source in data.heldout.items():
        heldout = Heldout(task)
        for read in read_drawn(source, samples_per_task, seed, task, Question.of, data.storage, behind):
            if isinstance(read, Skipped):
                heldout.skipped.append(read)
            else:
                heldout.questions.append(read)
        if not heldout.questions:
            passed = f" behind the first {behind} of the draw" if behind else ""
            raise SettingsError(f"data.heldout.{task}: none of its samples{passed} can be asked; check {source.shards}")
        tasks[task] = heldout
    return tasks


def read_drawn(
    source: SourceSettings,
    count: int,
    seed: int,
    name: str,
    make: Callable[[Sample], T],
    storage: StorageSettings | None = None,
    behind: int = 0,
) -> Iterator[T | Skipped]:
    """Draw ``count`` samples of a source without replacement behind the first ``behind``, or all that are left where it
    has fewer; see ``read_rows``."""
    rows = shard_rows(source, storage)
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    drawn = (rows[number] for number in sorted(draw.permutation(len(rows))[behind : behind + count].tolist()))
    yield from read_rows(drawn, name, make, storage)


def shard_rows(source: SourceSettings, storage: StorageSettings | None = None) -> list[tuple[str, int]]:
    """(shard, row) of all samples of a source, from its indexes.

    Raises:
        SettingsError: a shard or its index is missing.
    """
    shards = _indexed_shards(source, storage)
    return [(shard, row) for shard in shards for row in range(len(read_columns(shard, ["key"], storage)))]


def read_rows(
    rows: Iterable[tuple[str, int]], name: str, make: Callable[[Sample], T], storage: StorageSettings | None = None
) -> Iterator[T | Skipped]:
    """The samples of some rows, one at a time and in order.

    Args:
        rows: (shard, row).
        name: of the task.
        make: turns a sample into what is yielded; its SampleErrors count as the sample's.
        storage: how remote shards are read.
    """
    reader = ShardReader(storage)
    try:
        for shard, row in rows:
            ref = SampleRef(name, shard, f"row {row}")
            try:
                key, members = reader.read(shard, row)
                ref = SampleRef(name, shard, key)
                made: T | Skipped = make(parse_sample(ref, members))
            except SampleError as error:
                made = leave_out(name, ref, error)
            yield made
    finally:
        reader.close()


def leave_out(task: str, ref: SampleRef, error: SampleError) -> Skipped:
    """Log that a sample is not asked, and why."""
    logger.warning("%s: %s of %s is left out: %s", task, ref.key, ref.shard, error)
    return Skipped(ref.shard, ref.key, str(error))


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 of what the samples are: media, conversations and expectations, not where they lie."""
    digest = hashlib.sha256()
    for sample in samples:
        content = sorted(sample.meta.items(), key=lambda item: item[0])
        media = [(name, hashlib.sha256(value).hexdigest()) for name, value in sorted(sample.media.items())]
        digest.update(repr((sample.ref.key, sample.task, sample.messages, content, media)).encode())
    return digest.hexdigest()


def _indexed_shards(source: SourceSettings, storage: StorageSettings | None) -> list[str]:
    try:
        shards = find_shards(source.shards, storage)
    except ValueError as error:
        raise SettingsError(f"held-out data: {error}") from error
    for shard in shards:
        if not has_index(shard, storage):
            raise SettingsError(
                f"the held-out shard {shard} has no index; run: keye-data index {shlex.quote(shard)} --tokenizer FOLDER"
            )
    return shards
