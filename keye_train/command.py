"""How every command ends: exit codes, and errors in one line.

0 done, 1 the command looked and found something wrong (``keye-data check``, ``keye-merge verify``), 2 the words, a
recipe or the data are wrong and the message says how to mend it, 130 interrupted by Ctrl-C. ``keye-train`` has more,
see docs/operations.md. This module imports nothing of the package, so that a mistyped word is answered at once.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

WRONG_USE = 2
INTERRUPTED = 130
PIPE_CLOSED = 141

_STDOUT = 1


def guarded(name: str, work: Callable[[], int], also: tuple[type[Exception], ...] = ()) -> None:
    """Run ``work`` and leave with its code; what the user can mend becomes one line, all else keeps its traceback.

    By the convention of this package ValueError and FileNotFoundError are about input: a recipe, data, a checkpoint.
    KEYE_TRACEBACK=1 shows where they came from.

    Args:
        name: of the command.
        work: returns the exit code.
        also: other errors that are the user's, such as OSError where a command only reads and writes files.
    """
    mendable: tuple[type[Exception], ...] = (ValueError, FileNotFoundError, *also)
    caught: tuple[type[Exception], ...] = (*mendable, BrokenPipeError)
    try:
        code = work()
        sys.stdout.flush()  # here, where a closed pipe can still be told apart
        sys.exit(code)
    except KeyboardInterrupt:
        if os.environ.get("KEYE_TRACEBACK"):
            raise
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except caught as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # what is still buffered has nowhere to go
            sys.exit(PIPE_CLOSED)
        if os.environ.get("KEYE_TRACEBACK") or not isinstance(error, mendable):
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as behind ``| head``."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
