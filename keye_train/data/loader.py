"""From planned packs to tensors: reader processes that work ahead of the training step.

The main process walks through the plan and hands out packs in order; readers fetch, decode and lay out one whole pack
at a time and return it through shared memory. Packs come back in the order of the plan at any number of readers.
"""

from __future__ import annotations

import logging
import math
import shlex
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from keye_train.data.collate import LoadedPack, collate_pairs, collate_samples
from keye_train.data.formats import parse_sample
from keye_train.data.index import read_key
from keye_train.data.plan import Dropped, GlobalBatch, Pack, Plan, PlanState, assign
from keye_train.data.reader import ShardReader
from keye_train.data.sample import SampleError, SampleRef
from keye_train.model.processing import EncodedPair, EncodedSample, KeyeProcessor
from keye_train.settings import Objective, TrainSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepData:
    """What one rank reads in one optimizer step."""

    step: int  # from 0
    packs: list[LoadedPack]  # one for each micro-step
    dropped: list[tuple[SampleRef, str]]  # drawn and given up by the plan, with the reason; rank 0 only
    plan_state_after: PlanState  # where a run goes on that has done this step


@dataclass(frozen=True)
class ReadTask:
    """One sample to read."""

    source: str
    shard: str
    row: int  # of the shard
    tokens: int  # as planned
    patches: int


class PackDataset(Dataset[LoadedPack]):
    """Reads one pack. Lives in the reader processes, so it knows shards by path only, never the corpus."""

    def __init__(self, processor: KeyeProcessor, objective: Objective, max_tokens: int) -> None:
        self.processor = processor
        self.objective = objective
        self.max_tokens = max_tokens
        self._reader = ShardReader()

    def __getitem__(self, tasks: tuple[ReadTask, ...]) -> LoadedPack:
        """Read the samples of a pack; those that cannot be read are named in ``skipped``.

        Raises:
            ValueError: a sample has another size than its index says.
        """
        read: list[Any] = []
        skipped: list[tuple[SampleRef, str]] = []
        for task in tasks:
            try:
                read.append(self._encode(task))
            except SampleError as error:
                ref = SampleRef(task.source, task.shard, read_key(task.shard, task.row))
                skipped.append((ref, str(error)))
        model = self.processor.model
        pairs = self.objective == Objective.contrastive
        inputs = collate_pairs(read, model) if pairs else collate_samples(read, model)
        return LoadedPack(
            inputs=inputs,
            refs=tuple(sample.ref for sample in read),
            tasks=tuple(sample.task for sample in read),
            skipped=tuple(skipped),
            tokens=sum(sample.text_ids.numel() if pairs else sample.input_ids.numel() for sample in read),
            patches=sum(len(sample.pixel_patches) for sample in read),
            fill=sum(task.tokens for task in tasks) / self.max_tokens,
        )

    def _encode(self, task: ReadTask) -> EncodedSample | EncodedPair:
        key, members = self._reader.read(task.shard, task.row)
        sample = parse_sample(SampleRef(task.source, task.shard, key), members)
        encoded: EncodedSample | EncodedPair
        if self.objective == Objective.contrastive:
            encoded = self.processor.encode_pair(sample)
            tokens = task.tokens
        else:
            encoded = self.processor.encode(sample)
            tokens = len(encoded.input_ids)
        if (tokens, len(encoded.pixel_patches)) != (task.tokens, task.patches):
            folder = shlex.quote(self.processor.model.tokenizer)
            raise ValueError(
                f"sample {key} of the shard {task.shard} has {tokens} tokens and {len(encoded.pixel_patches)} patches, "
                f"its index says {task.tokens} and {task.patches}. The shard was changed after it was indexed; run: "
                f"keye-data index {shlex.quote(task.shard)} --force --tokenizer {folder}"
            )
        return encoded


class Loader:
    """Iterates over the steps of one rank until ``stage.steps``. Close it, or use it in a ``with`` block."""

    def __init__(
        self,
        plan: Plan,
        processor: KeyeProcessor,
        rank: int,
        world_size: int,
        settings: TrainSettings,
        state: PlanState | None = None,
    ) -> None:
        """Args:
            plan: of the stage; the same on every rank.
            processor: encodes samples.
            rank, world_size: which packs are ours.
            settings: objective, steps, readers and how far they work ahead.
            state: where to go on; None: from the beginning.

        Raises:
            SettingsError: the packs of a global batch do not divide over the ranks.
        """
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self._micro_steps = settings.gradient_accumulation(world_size)
        self._stop = settings.stage.steps
        self._pending: deque[tuple[GlobalBatch, PlanState]] = deque()  # handed out, not yet returned
        workers = settings.data.workers
        ahead = math.ceil(settings.data.prefetch_steps * self._micro_steps / max(workers, 1))
        self._packs: DataLoader[LoadedPack] = DataLoader(
            PackDataset(processor, settings.stage.objective, settings.stage.max_tokens),
            batch_size=None,
            sampler=_Tasks(self, state or plan.start()),
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            collate_fn=_as_it_is,
            # Fork is not safe next to the threads of torch and NCCL.
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # else the seeds of the readers would be drawn from the training's generator
        )
        self._iterator: Iterator[LoadedPack] | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepData:
        """The next step.

        Raises:
            RuntimeError: a reader died.
            ValueError: a shard does not match its index.
        """
        if self._iterator is None:
            self._iterator = _start(self._packs)
        try:
            packs = [next(self._iterator) for _ in range(self._micro_steps)]
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and "exited unexpectedly" in str(error):
                raise RuntimeError(
                    f"a reader process died ({error}); if memory ran out, lower data.workers or data.prefetch_steps"
                ) from error
            raise
        batch, state = self._pending.popleft()
        return StepData(batch.step, packs, self._name(batch.dropped), state)

    def close(self) -> None:
        """Stop the readers and wait for them."""
        self._iterator = None  # its finalizer joins them
        self._pending.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tasks(self, state: PlanState) -> Iterator[tuple[ReadTask, ...]]:
        """Packs of this rank in order; what they belong to is noted in ``_pending``."""
        for batch, after in self._plan.batches(state):
            if batch.step >= self._stop:
                return
            self._pending.append((batch, after))
            for micro_step in assign(batch, self._world_size):
                yield self._read_tasks(micro_step[self._rank])

    def _read_tasks(self, pack: Pack) -> tuple[ReadTask, ...]:
        tasks = []
        for sample in pack.samples:
            source = self._plan.source(sample.source)
            tasks.append(ReadTask(source.name, *source.locate(sample.row), sample.tokens, sample.patches))
        return tuple(tasks)

    def _name(self, dropped: tuple[Dropped, ...]) -> list[tuple[SampleRef, str]]:
        if self._rank:
            return []
        return [(self._plan.source(sample.source).ref(sample.row), sample.reason) for sample in dropped]


class _Tasks:
    """What a DataLoader calls a sampler: an iterable of keys for the dataset, walked in the main process."""

    def __init__(self, loader: Loader, state: PlanState) -> None:
        self._loader, self._state = loader, state

    def __iter__(self) -> Iterator[tuple[ReadTask, ...]]:
        return self._loader.tasks(self._state)


def _start(packs: DataLoader[LoadedPack]) -> Iterator[LoadedPack]:
    """Start the readers deaf to Ctrl-C, which reaches the whole process group: the trainer decides when they stop.

    A blocked signal stays blocked in a started process from its first instruction on.
    """
    if packs.num_workers == 0:
        return iter(packs)
    resource_tracker.ensure_running()  # starting it later would unblock the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return iter(packs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(pack: Any) -> Any:
    return pack
