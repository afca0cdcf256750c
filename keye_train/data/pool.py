"""Processes that read packs ahead of the training.

Each reader process has two pipes of its own and no other tie to this process: a task goes in, the bytes of a pack come
out. Nothing is shared, so a reader can be ended at any moment without harm, and neither the size of /dev/shm nor the
number of open files limits what is read ahead. Moving a pack of 40 MB through a pipe takes some 20 ms, in a thread
that does not hold up the training.
"""

from __future__ import annotations

import io
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")

JOIN_SECONDS = 10.0


class ReaderPool(Generic[Task, Result]):
    """Runs ``read`` in other processes, which have loaded it once. Close the pool to end them."""

    def __init__(self, read: Callable[[Task], Result], processes: int) -> None:
        """Args:
        read: what to run; it is pickled into each process.
        processes: how many, at least 1.
        """
        self._processes = _start(read, processes)
        self._idle: SimpleQueue[_ReaderProcess] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="reader")

    def submit(self, task: Task) -> Future[Result]:
        """Queue a task; tasks start in the order in which they come.

        The future raises ValueError and OSError as ``read`` raised them, and RuntimeError where the process died or
        ``read`` failed otherwise.
        """
        return self._threads.submit(self._ask_idle, task)

    def close(self) -> None:
        """End the processes at once and wait for them; what is being read is lost."""
        for process in self._processes:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()

    def _ask_idle(self, task: Task) -> Result:
        process = self._idle.get()  # as many threads as processes: there is one
        try:
            return process.ask(task)
        finally:
            self._idle.put(process)


class _ReaderProcess:
    """One reader process and this side of its pipes."""

    def __init__(self, read: Callable[[Any], Any], number: int) -> None:
        context = multiprocessing.get_context("spawn")  # fork is not safe next to the threads of torch and NCCL
        their_tasks, self._tasks = context.Pipe(duplex=False)
        self._results, their_results = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve, args=(read, their_tasks, their_results), name=f"reader-{number}", daemon=True
        )
        self._process.start()
        # Only the child holds its ends now, so its death closes the pipes.
        their_tasks.close()
        their_results.close()

    def ask(self, task: Any) -> Any:
        try:
            self._tasks.send(task)
            result, failure = pickle.loads(self._results.recv_bytes())
        except (EOFError, OSError) as error:
            self._process.join(JOIN_SECONDS)
            raise RuntimeError(
                f"a reader process died (exit code {self._process.exitcode}); if memory ran out, lower data.workers or "
                "data.prefetch_steps"
            ) from error
        if failure is not None:
            kind, message, trace = failure
            if issubclass(kind, ValueError | OSError):
                raise kind(message)
            raise RuntimeError(f"a reader process failed:\n{trace}")
        return result

    def terminate(self) -> None:
        self._process.kill()  # SIGTERM is blocked there

    def join(self) -> None:
        self._process.join(JOIN_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._tasks.close()
        self._results.close()


def _start(read: Callable[[Any], Any], processes: int) -> list[_ReaderProcess]:
    """Start readers that are deaf to SIGINT and SIGTERM: the trainer decides when they end.

    Both reach them past the trainer, from a terminal and from launchers that signal the whole process group, while it
    still needs the packs of its last step.
    A blocked signal stays blocked in a started process from its first instruction on.
    """
    resource_tracker.ensure_running()  # every start makes sure that it runs, and starting it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return [_ReaderProcess(read, number) for number in range(processes)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(read: Callable[[Any], Any], tasks: Connection, results: Connection) -> None:
    """Life of a reader process: until the other side closes the pipe, also by dying."""
    torch.set_num_threads(1)  # readers are parallel by process
    while True:
        try:
            task = tasks.recv()
        except EOFError:
            return
        failure = result = None
        try:
            result = read(task)
        except Exception as error:  # not handled here: the training process raises it
            kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
            failure = (kind, str(error), traceback.format_exc())
        try:
            results.send_bytes(_dumps((result, failure)))
        except BrokenPipeError:
            return


def _dumps(value: Any) -> memoryview:
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(value)
    return file.getbuffer()


class _Pickler(pickle.Pickler):
    """Writes tensors as plain bytes, where torch's own way would go through files in shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented
