"""The process that reader processes are forked from.

It imports once what readers run, which takes seconds of processor time and hundreds of megabytes, and then waits, with
no state of the run: forking it is safe, where forking the training process, beside the threads of torch and NCCL, is
not. The threads that imports leave are OpenBLAS's and jemalloc's, idle, and both libraries prepare them for a fork.
Readers share those pages, and one that is replaced is there in milliseconds.

It ends with the process that started it, however that ends, and the last reader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

from keye_train.data.stacks import STACK_SIGNAL
from keye_train.settings import SettingsError

DEAF_TO = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, STACK_SIGNAL}
"""Blocked in a reader from its first instruction on; ``STACK_SIGNAL`` until it can answer."""


def prepare(module: str) -> None:
    """Start the server if it does not run yet, and do not wait until it has imported what readers need.

    Args:
        module: home of what readers run. Another one asked for later is imported by each reader that needs it.

    Raises:
        SettingsError: the folder for temporary files, in which the server has its socket, has too long a path.
    """
    with deaf():
        context().set_forkserver_preload([__name__, module])
        try:
            forkserver.ensure_running()
        except OSError as error:
            if error.errno is not None:  # of the system, which is not even asked to bind such a name
                raise
            raise SettingsError(
                f"TMPDIR={tempfile.gettempdir()}: its path is too long for the socket of the process that readers are "
                "forked from: set TMPDIR to a folder whose path has at most 70 characters"
            ) from error


def context() -> ForkServerContext:
    """What makes processes and their connections."""
    return multiprocessing.get_context("forkserver")


@contextmanager
def deaf() -> Iterator[None]:
    """While open, processes are started that do not hear ``DEAF_TO``: the trainer decides when they end.

    SIGINT, SIGTERM and SIGUSR1 reach them past the trainer, from a terminal and from launchers that signal the whole
    process group, while it still needs the packs of its last step. A blocked signal stays blocked in a started process
    from its first instruction on, and in all that it forks.
    """
    resource_tracker.ensure_running()  # every start makes sure that it runs, and starting it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_environment(variables: Mapping[str, str]) -> None:
    """In a reader: have the variables of the process that asked for it, not those of when the server began."""
    os.environ.clear()
    os.environ.update(variables)
