"""A run that is stuck says where every process stands, and ends as the recipe says: nothing is mocked, ranks and reads
really hang."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ranks
from corpus import ToyCorpus

from keye_train import runs
from keye_train.training.watchdog import RESTART_CODE, STOP_CODE

pytestmark = pytest.mark.slow  # what hangs takes its time

STAGE = "2_multitask"
STEPS = 8
WATCHED = (
    f"stage.steps={STEPS}",
    "guards.watchdog.step_s=60",
    "guards.watchdog.data_s=30",  # a reader has started by then, and a lease of the kernel lasts 45 s
    "guards.watchdog.poll_s=0.5",
    "guards.heartbeat_s=0.5",
)


@pytest.fixture
def corpus(toy_corpus: ToyCorpus, tmp_path: Path) -> ToyCorpus:
    """A copy, to be spoiled."""
    folder = tmp_path / "corpus"
    shutil.copytree(toy_corpus.folder, folder)
    for name in ("data", "model"):
        recipe = folder / "recipes" / name / "toy.yaml"
        recipe.write_text(recipe.read_text().replace(str(toy_corpus.folder), str(folder)))
    return ToyCorpus(folder, folder / "recipes")


def wait_for(happened: Callable[[], bool], process: object, deadline_s: float = 150.0) -> None:
    """Look again and again; the process must not end before."""
    deadline = time.monotonic() + deadline_s
    while not happened():
        assert process.poll() is None, process.communicate()[0]  # type: ignore[attr-defined]
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def reports(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / runs.HANGS).glob("*-step-*") if path.is_dir())


@contextmanager
def unreachable(shard: Path) -> Iterator[None]:
    """Whoever opens the file hangs in the kernel: this process holds a lease on it and does not answer (fcntl(2))."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel asks for the lease
    descriptor = os.open(shard, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        pytest.skip(f"this file system knows no leases: {error}")
    try:
        yield
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def test_a_reader_that_hangs_is_named_and_the_run_restarts(corpus: ToyCorpus, tmp_path: Path) -> None:
    """Two ranks, a reader process each. The storage comes back before the launcher starts the ranks again."""
    run_dir, shard = tmp_path / "run", corpus.folder / "images-0.tar"
    launcher = [*ranks.torchrun(2), "--max-restarts", "3", "-m"]  # on a busy machine readers may start late again
    with unreachable(shard):
        process = ranks.start(corpus.command(launcher, STAGE, run_dir, *WATCHED, "data.workers=1"))
        wait_for(lambda: any(len(list(path.glob("rank-*.txt"))) == 2 for path in reports(run_dir)), process)
    output = ranks.finish(process, timeout_s=300)
    report = reports(run_dir)[0]
    assert "'data'" in (report / "report.txt").read_text()
    parts = [(report / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)]
    stuck = next(part for part in parts if "fetching or sending a pack" in part)
    assert str(shard) in stuck
    assert "reader-0" in stuck
    assert "in read_many" in stuck  # of the reader process
    assert all("in _train" in part for part in parts)  # of the ranks
    assert f"exit code {RESTART_CODE}" in output
    assert runs.read_json(run_dir / runs.MANIFEST)["status"] == "finished"


def test_a_frozen_rank_ends_the_run_for_good(corpus: ToyCorpus, tmp_path: Path) -> None:
    """Rank 1 does not run any more: rank 0 waits in a collective and says whom it has not heard of."""
    run_dir = tmp_path / "run"
    more = (
        *WATCHED,
        "guards.watchdog.step_s=10",
        "stage.steps=5000",
        "guards.watchdog.policy=stop",
        "checkpoint.every_steps=5000",
    )
    process = ranks.start(corpus.command([*ranks.torchrun(2), "--max-restarts", "1", "-m"], STAGE, run_dir, *more))
    wait_for(lambda: len(runs.read_jsonl(run_dir / runs.METRICS)) >= 3, process)
    pid = runs.read_json(run_dir / runs.HEARTBEATS / "rank-00001.json")["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: (run_dir / runs.HANGS / "stop").exists(), process)
        (report,) = reports(run_dir)
    finally:
        os.kill(pid, signal.SIGCONT)
    output = ranks.finish(process, timeout_s=150, expect=1)
    assert f"exit code {STOP_CODE}" in output
    assert "the watchdog stopped this run" in output  # the ranks that the launcher started again
    lines = (report / "report.txt").read_text().splitlines()
    assert lines[0].startswith("rank 0: ")
    assert lines[2].startswith("rank 1: ")  # the rank that has been silent the longest comes first
    assert "in _train" in (report / "rank-00000.txt").read_text()


@pytest.mark.parametrize("workers", [1, 0])
def test_one_process_whose_read_hangs(corpus: ToyCorpus, tmp_path: Path, workers: int) -> None:
    """In a reader process, or in the main thread of the only rank itself."""
    shard = corpus.folder / "images-0.tar"
    run_dir = tmp_path / "run"
    more = (*WATCHED, f"data.workers={workers}")
    with unreachable(shard):
        ranks.run(corpus.command([sys.executable, "-m"], STAGE, run_dir, *more), timeout_s=150, expect=RESTART_CODE)
    (report,) = reports(run_dir)
    part = (report / "rank-00000.txt").read_text()
    assert str(shard) in part
    assert part.count("in read_many") == 1
    assert "in _train" in part
    assert ("reader-0" in part) == bool(workers)
