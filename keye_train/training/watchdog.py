"""A thread of each rank that notices when the run is stuck, has every process say where, and ends it.

The first rank whose phase is over its deadline opens a report, ``RUN/hangs/TIME-step-N/``. Every rank writes its stacks
there, those of its readers and the sample that each of them works on. Then all leave without waiting for the thread
that hangs, be it in a collective, a kernel or a read. The ranks find each other over the file system of the run folder
alone: what hangs may be the network.

::

    RUN/heartbeats/rank-00003.json     step, phase, seconds in it, time; rewritten every guards.heartbeat_s
    RUN/hangs/open                     name of the report that is being written
    RUN/hangs/TIME-step-N/report.txt   who noticed, and what every rank was doing by its heartbeat
    RUN/hangs/TIME-step-N/rank-00003.txt
    RUN/hangs/stop                     guards.watchdog.policy=stop: the launcher's restart is refused
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Protocol

from keye_train import runs
from keye_train.settings import GuardSettings, HangPolicy
from keye_train.training.distributed import World

logger = logging.getLogger(__name__)

STOP_CODE, RESTART_CODE = 70, 75  # EX_SOFTWARE and EX_TEMPFAIL of sysexits.h
DATA, COUNT, STEP, SAVE = "data", "count", "step", "save"
KEYS = {DATA: "data_s", COUNT: "data_s", STEP: "step_s", SAVE: "save_s"}
"""Phase -> the setting that limits it. A rank that has its data waits in the count of the batch for the others."""
OF_THE_COLLECTIVES = 0.9
"""Share of the collectives' deadline that a step may take by default: the watchdog must be first."""
GRACE_POLLS = 4
"""The others have so many polls to write their part of a report."""
DEAF_S = 120.0
"""After so long without its turn the interpreter itself is stuck (a kernel that keeps the interpreter's lock); a thread
of C code then writes the stacks to stderr and ends the process."""


class Readers(Protocol):
    """The loader, as the watchdog sees it."""

    def describe_readers(self) -> str:
        """What is being read, and the stacks of the processes that read."""

    def kill_readers(self) -> None:
        """End them, waiting for nothing."""


class Watchdog:
    """Of one rank. Use it in a ``with`` block: its thread runs as long.

    Args:
        run_dir: folder of the run, on a file system that all ranks see.
        guards: deadlines and policy.
        timeout_minutes: deadline of collectives.
        world: the ranks.
        readers: of this rank: asked what they work on and where they stand, and ended before this process leaves.
    """

    def __init__(
        self,
        run_dir: Path,
        guards: GuardSettings,
        timeout_minutes: float,
        world: World,
        readers: Readers,
    ) -> None:
        self._guards, self._rank, self._size = guards, world.rank, world.size
        self._readers = readers
        watched = guards.watchdog
        step_s = watched.step_s or OF_THE_COLLECTIVES * 60 * timeout_minutes
        limits = {"data_s": watched.data_s or step_s, "step_s": step_s, "save_s": watched.save_s}
        self._deadlines = {phase: limits[key] for phase, key in KEYS.items()}
        self._hangs = run_dir / runs.HANGS
        self._beat = heartbeat_path(run_dir, world.rank)
        self._beats = run_dir / runs.HEARTBEATS
        self._now = (SAVE, 0, time.monotonic())  # one assignment: the thread never sees half of it
        self._next_beat = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, phase: str, step: int) -> None:
        """A phase (one of ``KEYS``) begins; ``step`` from 1."""
        self._now = (phase, step, time.monotonic())

    def __enter__(self) -> Watchdog:
        if self._guards.watchdog.enabled or self._guards.heartbeat_s:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        watched, beat_s = self._guards.watchdog, self._guards.heartbeat_s
        while True:
            if beat_s and time.monotonic() >= self._next_beat:
                self._next_beat = time.monotonic() + beat_s
                self._write_heartbeat()
            due_s = self._next_beat - time.monotonic() if beat_s else watched.poll_s
            if self._ended.wait(min(watched.poll_s, max(due_s, 0.0))):
                return
            if not watched.enabled:
                continue
            faulthandler.dump_traceback_later(DEAF_S + 10 * watched.poll_s, exit=True)
            phase, step, since = self._now
            waited_s = time.monotonic() - since
            try:
                if waited_s > self._deadlines[phase]:
                    self._leave(self._open(phase, step, waited_s))
                elif (self._hangs / "open").exists():
                    self._leave(self._hangs / (self._hangs / "open").read_text(encoding="utf-8"))
            except Exception:  # a full disk, readers that are closed by now: the run is stuck, leave all the same
                logger.exception("step %d: no report of the hang could be written", step)
                faulthandler.dump_traceback()
                os._exit(self._code())

    def _write_heartbeat(self) -> None:
        """Whole or absent, but not forced to the disk: it speaks of now."""
        phase, step, since = self._now
        row = {"rank": self._rank, "step": step, "phase": phase, "phase_s": round(time.monotonic() - since, 1)}
        aside = self._beat.with_suffix(".tmp")
        try:
            aside.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(row | {"time": time.time(), "pid": os.getpid()}), encoding="utf-8")
            aside.replace(self._beat)
        except OSError as error:
            logger.warning("no heartbeat: %s", error)

    def _open(self, phase: str, step: int, waited_s: float) -> Path:
        """Open a report, or find the one that another rank has opened a moment ago."""
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-step-{step}"
        self._hangs.mkdir(parents=True, exist_ok=True)
        aside = self._hangs / f".open.{self._rank}"
        aside.write_text(name, encoding="utf-8")
        try:
            os.link(aside, self._hangs / "open")  # whole, and only once
        except FileExistsError:
            return self._hangs / (self._hangs / "open").read_text(encoding="utf-8")
        finally:
            aside.unlink()
        self._write_heartbeat()
        reason = (
            f"rank {self._rank}: step {step} has been in its phase '{phase}' for {waited_s:.0f} s, longer than "
            f"guards.watchdog.{KEYS[phase]} allows ({self._deadlines[phase]:g} s)"
        )
        lines = [reason, "", *(describe_heartbeats(self._beats, self._size))]
        runs.write_text_atomic(self._hangs / name / "report.txt", "\n".join(lines) + "\n")
        logger.error("%s; see %s", reason, self._hangs / name)
        return self._hangs / name

    def _leave(self, report: Path) -> None:
        """Write this rank's part, wait for the others' and end the process."""
        report.mkdir(parents=True, exist_ok=True)
        phase, step, since = self._now
        with (report / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
            file.write(f"rank {self._rank}, step {step}, {time.monotonic() - since:.1f} s in '{phase}'\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n" + self._readers.describe_readers())
            file.flush()
            os.fsync(file.fileno())
        if self._guards.watchdog.policy == HangPolicy.stop:
            (self._hangs / "stop").write_text(report.name, encoding="utf-8")
        deadline = time.monotonic() + GRACE_POLLS * self._guards.watchdog.poll_s
        while len(list(report.glob("rank-*.txt"))) < self._size and time.monotonic() < deadline:
            time.sleep(0.1)
        self._readers.kill_readers()
        logger.error("leaving with exit code %d (guards.watchdog.policy=%s)", self._code(), self._policy())
        logging.shutdown()
        os._exit(self._code())  # the main thread may never come back

    def _policy(self) -> str:
        return self._guards.watchdog.policy.value

    def _code(self) -> int:
        return RESTART_CODE if self._guards.watchdog.policy == HangPolicy.restart else STOP_CODE


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    """Where a rank says what it is doing."""
    return run_dir / runs.HEARTBEATS / f"rank-{rank:05d}.json"


def describe_heartbeats(folder: Path, ranks: int) -> list[str]:
    """A line for each rank that is furthest behind or silent the longest: 32 of them, the worst first."""
    rows = []
    for rank in range(ranks):
        try:
            row = json.loads((folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            rows.append((0, 0.0, f"rank {rank}: no heartbeat"))
            continue
        silent_s = time.time() - row["time"]
        text = (
            f"rank {rank}: step {row['step']}, {row['phase_s']:.0f} s in '{row['phase']}', heard {silent_s:.0f} s ago"
        )
        rows.append((row["step"], -silent_s, text))
    return [text for _, _, text in sorted(rows)[:32]]


def begin_launch(run_dir: Path, world: World) -> None:
    """Clear what the watchdogs of an earlier launch left. Collective: every rank must reach this.

    Raises:
        RuntimeError: a launcher starts the ranks again although the run was stopped for good.
    """
    hangs = run_dir / runs.HANGS
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    stopped = (hangs / "stop").exists()
    world.barrier()  # all have looked
    if again and stopped:
        raise RuntimeError(
            f"the watchdog stopped this run (guards.watchdog.policy=stop), see {hangs}; start it again by hand, or let "
            "launchers do so with guards.watchdog.policy=restart"
        )
    if world.is_main:
        for name in ("open", "stop"):
            (hangs / name).unlink(missing_ok=True)
    world.barrier()
