"""From planned packs to tensors: readers that work ahead of the training step.

This process walks through the plan and hands out whole packs; readers fetch, decode and lay them out. Packs come back
in the order of the plan at any number of readers.
"""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from keye_train.data.collate import LoadedPack, collate_pairs, collate_samples
from keye_train.data.digest import digest_samples
from keye_train.data.formats import parse_sample
from keye_train.data.index import read_key
from keye_train.data.limits import DecodeLimits, Watch, unwatched
from keye_train.data.memory import PackMemory, keep_freed_memory, slot_bytes
from keye_train.data.plan import Dropped, Pack, Plan, PlanState, assign, balance
from keye_train.data.pool import ReaderPool
from keye_train.data.reader import ShardReader
from keye_train.model.positions import PATCH_BYTES, PATCH_SIZE
from keye_train.model.sample_encoder import WHOLE, EncodedPair, EncodedSample, SampleEncoder
from keye_train.sample import Fit, SampleError, SampleRef
from keye_train.settings import Objective, StorageSettings, TrainSettings


@dataclass(frozen=True)
class StepData:
    """What one rank reads in one optimizer step."""

    step: int  # from 0
    packs: list[LoadedPack]  # one for each micro-step
    dropped: list[tuple[SampleRef, str]]  # drawn and given up by the plan, with the reason; rank 0 only
    plan_state_after: PlanState  # where a run goes on that has done this step
    balance: float = 1.0  # planned cost of the mean rank / of the slowest, summed over micro-steps; 1: no rank waits
    left_out: list[tuple[SampleRef, str]] = field(default_factory=list)  # of this rank, with the reason
    passed_over: bool = False  # the whole batch is left out, on every rank: there are no packs


@dataclass(frozen=True)
class ReadTask:
    """One sample to read."""

    source: str
    shard: str
    row: int  # of the shard
    source_row: int  # of the source: all its shards one after another
    tokens: int  # as planned
    patches: int
    fit: Fit = WHOLE  # what is taken of it


def read_tasks(plan: Plan, pack: Pack) -> tuple[ReadTask, ...]:
    """What a reader is asked for a pack."""
    fits, samples = {}, pack.samples
    for number in {sample.source for sample in samples}:
        if plan.source(number).fitting is not None:
            rows = [sample.row for sample in samples if sample.source == number]
            fits[number] = dict(zip(rows, plan.source(number).fits(np.array(rows)), strict=True))
    tasks = []
    for sample in samples:
        source = plan.source(sample.source)
        place = source.locate(sample.row)
        fit = fits[sample.source][sample.row] if sample.source in fits else WHOLE
        tasks.append(ReadTask(source.name, *place, sample.row, sample.tokens, sample.patches, fit))
    return tuple(tasks)


class PackReader:
    """Reads packs. Goes into the reader processes, so it knows shards by path only, never the corpus."""

    def __init__(
        self,
        processor: SampleEncoder,
        objective: Objective,
        max_tokens: int,
        captions: bool = False,
        storage: StorageSettings | None = None,
    ) -> None:
        self.processor = processor
        self.objective = objective
        self.max_tokens = max_tokens
        self.captions = captions  # lay out pairs for the caption loss too
        self._storage = storage
        self._shards = ShardReader(storage)
        self.reading: tuple[ReadTask, ...] = ()  # looked at by other threads of this process
        self.decoding = -1  # number of the sample

    def __call__(
        self,
        tasks: tuple[ReadTask, ...],
        given_up: Mapping[int, str] | None = None,
        watch: Watch = unwatched,
        memory: np.ndarray | None = None,
    ) -> LoadedPack:
        """Read the samples of a pack; those that cannot be read are named in ``skipped``.

        Args:
            tasks: the samples.
            given_up: number of a sample -> why it is not to be tried (again).
            watch: holds the decoding of each sample to limits.
            memory: [bytes] uint8 in which the patches are laid out, if they fit; None: in memory of their own.

        Raises:
            ValueError: a sample has another size than its index says.
            OSError: a shard cannot be read; no sample is skipped for that.
        """
        self.reading, self.decoding = tasks, -1
        found = self._shards.read_many([(task.shard, task.row) for task in tasks])
        read: list[Any] = []
        skipped: list[tuple[SampleRef, str]] = []
        whole: list[ReadTask] = []
        patches = _patches_in(memory, sum(task.patches for task in tasks))
        used = 0
        for number, (task, raw) in enumerate(zip(tasks, found, strict=True)):
            self.decoding = number
            try:
                if given_up and number in given_up:
                    raise SampleError(given_up[number])
                read.append(self._encode(task, raw, number, watch, patches[used : used + task.patches]))
                whole.append(task)
                used += task.patches
            except SampleError as error:
                ref = SampleRef(task.source, task.shard, read_key(task.shard, task.row, self._storage))
                skipped.append((ref, str(error)))
        self.reading, self.decoding = (), -1
        model, pixels = self.processor.model, torch.from_numpy(patches[:used])
        pairs = self.objective == Objective.contrastive
        return LoadedPack(
            inputs=collate_pairs(read, model, self.captions, pixels) if pairs else collate_samples(read, model, pixels),
            refs=tuple(sample.ref for sample in read),
            tasks=tuple(sample.task for sample in read),
            skipped=tuple(skipped),
            tokens=sum(sample.text_ids.numel() if pairs else sample.input_ids.numel() for sample in read),
            patches=used,
            fill=sum(task.tokens for task in tasks) / self.max_tokens,
            digest=digest_samples((task.source, task.source_row) for task in whole),
            changed=sum(task.fit != WHOLE for task in whole),
        )

    def close(self) -> None:
        """Close the shards."""
        self._shards.close()

    def _encode(
        self,
        task: ReadTask,
        raw: tuple[str, dict[str, bytes]] | SampleError,
        number: int,
        watch: Watch,
        out: np.ndarray,
    ) -> EncodedSample | EncodedPair:
        if isinstance(raw, SampleError):
            raise raw
        key, members = raw
        encoded: EncodedSample | EncodedPair
        with watch(number):
            sample = parse_sample(SampleRef(task.source, task.shard, key), members)
            if self.objective == Objective.contrastive:
                encoded = self.processor.encode_pair(sample, task.fit, out)
                tokens = encoded.text_ids.numel()
            else:
                encoded = self.processor.encode(sample, task.fit, out)
                tokens = len(encoded.input_ids)
        if (tokens, len(encoded.pixel_patches)) != (task.tokens, task.patches):
            folder = shlex.quote(self.processor.model.tokenizer)
            raise ValueError(
                f"sample {key} of the shard {task.shard} has {tokens} tokens and {len(encoded.pixel_patches)} patches, "
                f"its index says {task.tokens} and {task.patches} ({task.fit}): the shard was changed after it was "
                f"indexed; run: keye-data index {shlex.quote(task.shard)} --force --tokenizer {folder}"
            )
        return encoded


def _patches_in(memory: np.ndarray | None, count: int) -> np.ndarray:
    """Place for the patches of a pack: [count, 3, 14, 14] uint8."""
    shape = (count, 3, PATCH_SIZE, PATCH_SIZE)
    if memory is None or len(memory) < count * PATCH_BYTES:
        return np.empty(shape, dtype=np.uint8)
    return memory[: count * PATCH_BYTES].reshape(shape)


@dataclass(frozen=True)
class _PlannedStep:
    """A step of which some packs may still be with the readers."""

    step: int
    packs: list[tuple[ReadTask, ...]]
    futures: list[Future[LoadedPack]]  # empty without reader processes
    dropped: tuple[Dropped, ...]
    state_after: PlanState
    balance: float
    left_out: list[tuple[SampleRef, str]] | None = None  # None: it is read


class Loader:
    """Iterates over the steps of one rank until ``stage.steps``. Close it, or use it in a ``with`` block."""

    def __init__(
        self,
        plan: Plan,
        processor: SampleEncoder,
        rank: int,
        world_size: int,
        settings: TrainSettings,
        state: PlanState | None = None,
        leave_out: Mapping[int, str] | None = None,
    ) -> None:
        """Start the readers.

        Args:
            plan: of the stage; the same on every rank.
            processor: encodes samples.
            rank, world_size: which packs are ours.
            settings: objective, steps, readers and how far they work ahead.
            state: where to go on; None: from the beginning.
            leave_out: steps whose batches are not read -> the reason; the same on every rank.

        Raises:
            SettingsError: the packs of a global batch do not divide over the ranks.
        """
        settings.gradient_accumulation(world_size)
        self._plan, self._rank, self._leave_out = plan, rank, leave_out or {}
        self._steps = self._planned_steps(world_size, settings.stage.steps, state)
        self._ahead: deque[_PlannedStep] = deque()
        self._read = PackReader(
            processor,
            settings.stage.objective,
            settings.stage.max_tokens,
            settings.stage.caption_weight > 0,
            settings.data.storage,
        )
        workers = settings.data.workers
        limits = DecodeLimits(settings.data.decode_seconds, settings.data.decode_bytes)
        size = slot_bytes(settings.stage)
        self._memory = PackMemory(size)  # touched without reader processes only
        self._pool = ReaderPool(self._read, workers, limits, size) if workers else None
        if not workers:
            keep_freed_memory()
        self._depth = 1 + (settings.data.prefetch_steps if workers else 0)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepData:
        """The next step.

        Raises:
            RuntimeError: a reader process failed, or died and no sample was the reason.
            ValueError: a shard does not match its index.
        """
        while len(self._ahead) < self._depth and (step := next(self._steps, None)) is not None:
            self._ahead.append(step)
        if not self._ahead:
            raise StopIteration
        step = self._ahead.popleft()
        if step.left_out is not None:
            dropped = self._name(step.dropped)
            return StepData(step.step, [], dropped, step.state_after, left_out=step.left_out, passed_over=True)
        packs = [future.result() for future in step.futures] or [
            self._read(tasks, memory=self._memory.lend()) for tasks in step.packs
        ]
        return StepData(step.step, packs, self._name(step.dropped), step.state_after, step.balance)

    def describe_readers(self) -> str:
        """What is being read now, by whom, and where each reader process stands in its code. Any thread may ask."""
        if self._pool is None:
            return f"this process reads by itself: {_doing(self._read.reading, self._read.decoding)}\n"
        text = ""
        for look in self._pool.look():
            since = f" for {look.seconds:.1f} s" if look.sample >= 0 else ""
            doing = _doing(look.task or (), look.sample)
            text += f"{look.name} (process {look.pid}): {doing}{since}\n{look.stacks}\n"
        return text

    def kill_readers(self) -> None:
        """End the reader processes, waiting for nothing."""
        if self._pool is not None:
            self._pool.kill()

    def close(self) -> None:
        """End the readers, and close the shards that are read in this process."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.close()
        self._read.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _planned_steps(self, world_size: int, stop: int, state: PlanState | None) -> Iterator[_PlannedStep]:
        for batch, after in self._plan.batches(state):
            if batch.step >= stop:
                return
            micro_steps = assign(batch, world_size)
            if (reason := self._leave_out.get(batch.step)) is not None:
                samples = [sample for packs in micro_steps for sample in packs[self._rank].samples]
                left_out = [(self._plan.source(one.source).ref(one.row), reason) for one in samples]
                yield _PlannedStep(batch.step, [], [], batch.dropped, after, 1.0, left_out)
                continue
            packs = [read_tasks(self._plan, micro_step[self._rank]) for micro_step in micro_steps]
            futures = [self._pool.submit(tasks) for tasks in packs] if self._pool is not None else []
            yield _PlannedStep(batch.step, packs, futures, batch.dropped, after, balance(micro_steps))

    def _name(self, dropped: tuple[Dropped, ...]) -> list[tuple[SampleRef, str]]:
        if self._rank:
            return []
        return [(self._plan.source(sample.source).ref(sample.row), sample.reason) for sample in dropped]


def _doing(tasks: tuple[ReadTask, ...], number: int) -> str:
    if not tasks:
        return "nothing is being read"
    if number >= 0:
        task = tasks[number]
        return f"decoding row {task.row} of the shard {task.shard} ({task.source})"
    shards = sorted({task.shard for task in tasks})
    return f"fetching or sending a pack of {len(tasks)} samples of {', '.join(shards)}"
