"""Commands that the pipeline starts: one in the foreground, or several at the same time."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

log = logging.getLogger(__name__)

_POLL_S = 0.2


class PartFailed(RuntimeError):
    """A part ended with an error; its own message stands above, or in its log."""

    def __init__(self, part: str, code: int, where: str = "") -> None:
        super().__init__(f"{part} ended with exit code {code}" + (f" (see {where})" if where else ""))
        self.code = code


def launched(launcher: Sequence[str], run: str, arguments: Sequence[str]) -> list[str]:
    """The command of one run: see ``PipelineSettings.launcher``."""
    words = [word.replace("{run}", run) for word in launcher]
    if "{arguments}" in words:
        place = words.index("{arguments}")
        return [*words[:place], *arguments, *words[place + 1 :]]
    return [*(words or [sys.executable]), "-m", "keye_train", *arguments]


def call(part: str, command: Sequence[str]) -> None:
    """Run a command in the foreground; on Ctrl-C and SIGTERM it saves its state, and we wait for it.

    Raises:
        PartFailed: it ended with an error, or a signal stopped it.
    """
    log.info("%s: %s", part, " ".join(command))
    with _passing_on() as signals:
        code = signals.start(command, None).wait()
    _check(part, code, signals.stopped)


def call_all(commands: Mapping[str, Sequence[str]], at_once: int, logs: Path) -> dict[str, float]:
    """Run commands, ``at_once`` at the same time, each with its output appended to ``logs / NAME.log``.

    Where one fails, or cannot be started, those that run are waited for, since their work is kept, and no further one
    is started.

    Returns:
        Seconds that each took.

    Raises:
        PartFailed: one ended with an error, or a signal stopped them all.
        OSError: one could not be started: no such program, or no place for its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(commands)
    running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes], float]] = {}
    seconds: dict[str, float] = {}
    failed: tuple[str, int] | None = None
    unstarted: OSError | None = None
    with _passing_on() as signals:
        while running or (waiting and not failed and not signals.stopped):
            while waiting and len(running) < at_once and not failed and not signals.stopped:
                name = waiting.pop(0)
                try:
                    running[name] = _begin(signals, name, commands[name], logs)
                except OSError as error:
                    unstarted, waiting = error, []
            for name, (process, written, began) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                written.close()
                del running[name]
                seconds[name] = time.monotonic() - began
                log.info("%s: ended with exit code %d after %.0f s", name, code, seconds[name])
                if code and failed is None:
                    failed = (name, code)
            if running:
                time.sleep(_POLL_S)
    if unstarted is not None and not signals.stopped:
        raise unstarted
    name, code = failed or (", ".join(commands), 0)
    _check(name, code, signals.stopped, str(logs / f"{name}.log"))
    return seconds


def _begin(
    signals: _Signals, name: str, command: Sequence[str], logs: Path
) -> tuple[subprocess.Popen[bytes], IO[bytes], float]:
    output: IO[bytes] = (logs / f"{name}.log").open("ab")
    log.info("%s: %s > %s", name, " ".join(command), output.name)
    try:
        return signals.start(command, output), output, time.monotonic()
    except OSError:
        output.close()
        raise


def _start(command: Sequence[str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    # Programs of this environment first, whether it is activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    stderr = None if output is None else subprocess.STDOUT
    return subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=output, stderr=stderr)


class _Signals:
    """Processes that are told of SIGTERM, whenever it comes: while they run, or while they are being started."""

    def __init__(self) -> None:
        self.stopped: list[int] = []
        """Signals that came, in order."""
        self._told: list[subprocess.Popen[bytes]] = []
        self._starting = False
        self._late = 0  # SIGTERMs that came while a process was being started

    def start(self, command: Sequence[str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
        """Start a process and pass SIGTERM on to it from its first moment.

        Raises:
            OSError: there is no such program.
        """
        self._starting = True
        try:
            process = _start(command, output)
            self._told.append(process)
        finally:
            self._starting = False
            while self._late:
                self._late -= 1
                self._terminate()
        return process

    def handle(self, number: int, frame: FrameType | None) -> None:
        """As a handler of ``signal.signal``."""
        self.stopped.append(number)
        if number != signal.SIGTERM:  # Ctrl-C has reached the whole process group already
            return
        if self._starting:
            self._late += 1
        else:
            self._terminate()

    def _terminate(self) -> None:
        for process in self._told:
            process.terminate()  # does nothing to one that has ended


class Interrupts:
    """Ctrl-C outside of started commands: KeyboardInterrupt, as ever, which is remembered besides. Raised within an
    import, a destructor or a callback it may be swallowed there, and whoever pressed the keys would wait for nothing.
    """

    def __init__(self) -> None:
        self._came = False

    def check(self) -> None:
        """Raise KeyboardInterrupt where one has come."""
        if self._came:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """While it lasts, Ctrl-C is remembered; where it is ignored (nohup), it stays so."""
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def _passing_on() -> Iterator[_Signals]:
    """While it lasts, SIGINT and SIGTERM are noted, and SIGTERM is passed on to what it started."""
    signals = _Signals()
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check(part: str, code: int, stopped: Sequence[int], where: str = "") -> None:
    if stopped:  # whatever the code: torchrun leaves with 1 when its ranks have saved and left as asked
        raise PartFailed(part, 128 + stopped[-1])
    if code:
        raise PartFailed(part, 128 - code if code < 0 else code, where)
