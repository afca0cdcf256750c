"""Processes that read packs ahead of the training.

Each reader process has a pipe and a socket of its own and no other tie to this process: a task goes in, a pack comes
out, laid out in memory that both have mapped (``transport``). A reader can be ended at any moment without harm. All are
forked from one process that has imported what they run (``reader_server``).

A reader that a sample ends (see ``limits``) is replaced, and its pack read again without that sample. What else ends a
reader, and what ``read`` raises, stops the run.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from keye_train.data import reader_server
from keye_train.data.limits import OF_THE_SAMPLE, DecodeLimits, DecodeWatch, Progress
from keye_train.data.memory import keep_freed_memory
from keye_train.data.stacks import StackFile
from keye_train.data.transport import Receiver, Sender

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")
Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

JOIN_SECONDS = 10.0
LOOK_SECONDS = 1.0
"""How often the clock of a sample is looked at."""


class Read(Protocol[Task_contra, Result_co]):
    """What readers run."""

    def __call__(
        self, task: Task_contra, /, given_up: Mapping[int, str], watch: DecodeWatch, memory: np.ndarray
    ) -> Result_co:
        """Read a task.

        Args:
            task: several samples.
            given_up: number of a sample -> why it is not to be tried again.
            watch: ``with watch(number):`` around the work on a sample holds it to the limits.
            memory: [slot_bytes] uint8; tensors made in it from its start on need no copy to reach the other process.
        """


class ReaderPool(Generic[Task, Result]):
    """Runs ``read`` in other processes, which have loaded it once. Close the pool to end them."""

    def __init__(
        self,
        read: Read[Task, Result],
        processes: int,
        limits: DecodeLimits,
        slot_bytes: int,
        out_of_memory: str = "lower data.workers or data.prefetch_steps",
    ) -> None:
        """Args:
        read: what to run; it is pickled into each process.
        processes: how many, at least 1.
        limits: of each sample.
        slot_bytes: what the tensors of a result take; those that find no room travel through the socket.
        out_of_memory: what helps where the machine runs out of memory, for messages.
        """
        self._advice = out_of_memory
        self._start = partial(_start, read, limits, slot_bytes)
        self._processes = self._start(processes)
        self._lock = threading.Lock()  # of the list of processes
        self._closed = False
        self._idle: SimpleQueue[int] = SimpleQueue()
        for number in range(processes):
            self._idle.put(number)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="reader")

    def submit(self, task: Task) -> Future[Result]:
        """Queue a task; tasks start in the order in which they come.

        The future raises ValueError and OSError as ``read`` raised them, and RuntimeError where the process died or
        ``read`` failed otherwise.
        """
        return self._threads.submit(self._ask_idle, task)

    def look(self) -> list[ReaderLook[Task]]:
        """What each process is doing now. Takes up to ``stacks.WRITE_SECONDS`` for each that does not answer."""
        return [process.look() for process in self._processes]

    def kill(self) -> None:
        """End the processes and wait for nothing: this process is about to leave."""
        for process in self._processes:
            process.terminate()

    def close(self) -> None:
        """End the processes at once and wait for them; what is being read is lost."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def _ask_idle(self, task: Task) -> Result:
        number = self._idle.get()  # as many threads as processes: there is one
        given_up: dict[int, str] = {}
        try:
            while True:  # every round gives up one more sample
                try:
                    return self._processes[number].ask(task, given_up, self._advice)
                except _EndedBySample as ended:
                    log.warning("a reader process is replaced: %s", ended.reason)
                    given_up[ended.sample] = ended.reason
                    self._replace(number)
        finally:
            self._idle.put(number)

    def _replace(self, number: int) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the readers were closed")
            self._processes[number].join()
            (self._processes[number],) = self._start(1)


@dataclass(frozen=True)
class ReaderLook(Generic[Task]):
    """A reader process at one moment."""

    name: str
    pid: int
    task: Task | None  # None: it waits for one
    sample: int  # number of the sample that is decoded; -1: none, the task is being fetched or sent
    seconds: float  # since that sample began
    stacks: str


class _EndedBySample(Exception):
    """A sample ended its reader process."""

    def __init__(self, sample: int, reason: str) -> None:
        super().__init__(reason)
        self.sample, self.reason = sample, reason


class _ReaderProcess:
    """One reader process and this side of its connections."""

    def __init__(self, read: Read[Any, Any], limits: DecodeLimits, slot_bytes: int, number: int) -> None:
        self._limits, self._progress, self._stacks = limits, Progress(), StackFile()
        self._task: Any = None
        context = reader_server.context()
        their_tasks, self._tasks = context.Pipe(duplex=False)
        results, their_results = context.Pipe(duplex=True)  # a socket, over which descriptors travel, too
        self._results = Receiver(results)
        self._process = context.Process(
            target=_serve,
            args=(
                dict(os.environ),
                read,
                limits,
                slot_bytes,
                self._progress,
                self._stacks,
                their_tasks,
                their_results,
            ),
            name=f"reader-{number}",
            daemon=True,
        )
        self._process.start()
        # Only the child holds its ends now, so its death closes them.
        their_tasks.close()
        their_results.close()

    def ask(self, task: Any, given_up: Mapping[int, str], advice: str) -> Any:
        self._task = task
        try:
            return self._answer(task, given_up, advice)
        finally:
            self._task = None

    def _answer(self, task: Any, given_up: Mapping[int, str], advice: str) -> Any:
        try:
            self._tasks.send((task, given_up, self._results.freed()))
            while not self._results.connection.poll(min(LOOK_SECONDS, self._limits.clock_s / 4)):
                self._look_at_the_clock()
            result, failure = self._results.receive()
        except (EOFError, OSError) as error:
            self._process.join(JOIN_SECONDS)
            sample, _ = self._progress.read()
            signal_number = -(self._process.exitcode or 0)
            if sample >= 0 and signal_number in OF_THE_SAMPLE:
                raise _EndedBySample(sample, self._limits.died_of(signal_number)) from error
            raise RuntimeError(
                f"a reader process died (exit code {self._process.exitcode}); if memory ran out, {advice}"
            ) from error
        if failure is not None:
            kind, message, trace = failure
            if issubclass(kind, ValueError | OSError):
                raise kind(message)
            raise RuntimeError(f"a reader process failed:\n{trace}")
        return result

    def look(self) -> ReaderLook[Any]:
        sample, seconds = self._progress.read()
        pid = self._process.pid or 0
        return ReaderLook(self._process.name, pid, self._task, sample, seconds, self._stacks.ask(pid))

    def _look_at_the_clock(self) -> None:
        sample, seconds = self._progress.read()
        if sample >= 0 and seconds > self._limits.clock_s:
            self.terminate()
            raise _EndedBySample(sample, self._limits.too_slow())

    def terminate(self) -> None:
        if self._process.is_alive():  # else the server has waited for it, and its number may be another process's
            self._process.kill()  # SIGTERM is blocked there

    def join(self) -> None:
        self._process.join(JOIN_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._tasks.close()
        self._results.connection.close()
        self._progress.close()
        self._stacks.close()


def _start(read: Read[Any, Any], limits: DecodeLimits, slot_bytes: int, processes: int) -> list[_ReaderProcess]:
    """Start readers; they hear no signal that is meant for the trainer."""
    reader_server.prepare(type(read).__module__)
    with reader_server.deaf():
        return [_ReaderProcess(read, limits, slot_bytes, number) for number in range(processes)]


def _serve(
    environment: Mapping[str, str],
    read: Read[Any, Any],
    limits: DecodeLimits,
    slot_bytes: int,
    progress: Progress,
    stacks: StackFile,
    tasks: Connection,
    results: Connection,
) -> None:
    """Life of a reader process: until the other side closes the pipe, also by dying."""
    reader_server.take_environment(environment)
    stacks.answer_signals()
    torch.set_num_threads(1)  # readers are parallel by process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keep_freed_memory()
    watch, sender = DecodeWatch(limits, progress), Sender(results, slot_bytes)
    while True:
        try:
            task, given_up, freed = tasks.recv()
        except EOFError:
            return
        failure = result = None
        slot, memory = sender.slot(freed)
        try:
            result = read(task, given_up=given_up, watch=watch, memory=memory)
        except Exception as error:  # not handled here: the training process raises it
            kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
            failure = (kind, str(error), traceback.format_exc())
        try:
            sender.send((result, failure), slot)
        except (BrokenPipeError, ConnectionResetError):
            return
