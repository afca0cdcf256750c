"""Held-out samples: which of them are asked, and what they expect."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from keye_train.data.heldout import Skipped, read_drawn
from keye_train.evaluation.scoring import Target
from keye_train.sample import Sample
from keye_train.settings import DataSettings, SettingsError


@dataclass(frozen=True)
class Question:
    """One held-out sample and what it expects."""

    sample: Sample
    target: Target

    @classmethod
    def of(cls, sample: Sample) -> Question:
        """Raises SampleError where the sample does not say what it expects."""
        return cls(sample, Target.of(sample))


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


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 of what is asked: keys (results name their samples by them), media, conversations and expectations."""
    digest = hashlib.sha256()
    for sample in samples:
        content = sorted(sample.meta.items(), key=lambda item: item[0])
        media = [(name, hashlib.sha256(value).hexdigest()) for name, value in sorted(sample.media.items())]
        digest.update(repr((sample.ref.key, sample.task, sample.messages, content, media)).encode())
    return digest.hexdigest()


def content_sha256(question: Question) -> str:
    """SHA-256 of what a model is shown and what is expected of it: equal for a sample that stands twice.

    Its key, the names of its media and whatever else its JSON holds do not count.
    """
    sample = question.sample
    media = {name: hashlib.sha256(value).hexdigest() for name, value in sample.media.items()}
    return hashlib.sha256(repr((_without_names(sample.messages, media), question.target)).encode()).hexdigest()


def _without_names(part: Any, media: Mapping[str, str]) -> Any:
    """Part of a conversation with the hashes of the media in place of their names, and keys in one order."""
    if isinstance(part, dict):
        named = part.get("type")
        return sorted(
            (key, media.get(value, value) if key == named and isinstance(value, str) else _without_names(value, media))
            for key, value in part.items()
        )
    return [_without_names(one, media) for one in part] if isinstance(part, list) else part
