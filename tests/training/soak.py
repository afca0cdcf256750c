"""``python tests/training/soak.py --kills 100 --seed 0``: kill a run again and again; nothing may show.

A tiny ZeRO-3 run of two ranks with reader processes behind ``torchrun --max-restarts`` is killed (SIGKILL, no warning)
at random moments: a rank, a reader or the launcher; while it starts, steps, or writes a checkpoint. A dead launcher is
started again, as a scheduler would. At the end its weights, its ledger and the account of its steps are held against an
uninterrupted run: bit for bit, line for line.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import psutil
import ranks
from corpus import ToyCorpus, write_corpus

from keye_train import runs
from keye_train.data.ledger import read_ledger

STAGE = "2_multitask"
SLOWEST_START_S = 300.0  # a launch that shows no step for so long is stuck
# How a kill chooses its moment -> how often.
MOMENTS = {"start": 2, "step": 5, "checkpoint": 3}
VICTIMS = {"rank": 6, "reader": 2, "launcher": 2}


@dataclass
class Soak:
    """One run and the processes behind it."""

    command: list[str]
    run_dir: Path
    chance: random.Random
    log: Path
    kills: Counter[str] = field(default_factory=Counter)
    _launcher: subprocess.Popen[bytes] | None = None

    def kill_until(self, kills: int, stop_step: int) -> None:
        """Kill ``kills`` times, but only before ``stop_step``: there must be something left to interrupt."""
        while self.kills.total() < kills:
            self._launch_if_gone()
            moment = self._choose(MOMENTS)
            if not self._wait_for(moment):
                continue  # it ended, or restarted, in between
            if self.step() >= stop_step:
                raise SystemExit(
                    f"the run came to step {self.step()} after {self.kills.total()} kills: give it more steps"
                )
            victim = self._choose(VICTIMS)
            if self._kill(victim):
                self.kills[f"{victim} at {moment}"] += 1
                print(f"kill {self.kills.total()}: {victim} at {moment}, step {self.step()}", flush=True)

    def finish(self) -> None:
        """Let the run come to its end."""
        for _ in range(20):
            if runs.read_json(self.run_dir / runs.MANIFEST)["status"] == "finished":
                return
            self._launch_if_gone()
            assert self._launcher is not None
            self._launcher.wait()
        raise SystemExit(f"left alone, the run does not finish; see {self.log}")

    def step(self) -> int:
        """Steps done, by the file that rank 0 flushes after each."""
        path = self.run_dir / runs.TRAINED
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def close(self) -> None:
        """End what is still running."""
        for process in self._processes().values():
            for one in process:
                one.kill()

    def _launch_if_gone(self) -> None:
        if self._launcher is None or self._launcher.poll() is not None:
            with self.log.open("ab") as log:
                self._launcher = subprocess.Popen(
                    self.command, cwd=ranks.ROOT, env=ranks.environment(), stdout=log, stderr=log
                )

    def _wait_for(self, moment: str) -> bool:
        """Wait for a moment of the kind; False where the launch ended before."""
        if moment == "start":
            return self._sleep(self.chance.uniform(0.0, 12.0))
        before = self._written()
        deadline = time.monotonic() + SLOWEST_START_S
        while self._written() == before:
            if time.monotonic() > deadline:
                raise SystemExit(f"no step in {SLOWEST_START_S:.0f} s; see {self.log}")
            if not self._sleep(0.005):
                return False
        if moment == "step":
            return self._sleep(self.chance.uniform(0.0, 0.5))
        while not any((self.run_dir / runs.CHECKPOINTS).glob(".step-*.tmp")):
            if time.monotonic() > deadline or not self._sleep(0.0005):
                return False
        return self._sleep(self.chance.uniform(0.0, 0.02))

    def _written(self) -> tuple[int, int]:
        """Changes with every step, and with a restart."""
        path = self.run_dir / runs.TRAINED
        return (path.stat().st_size, path.stat().st_ino) if path.exists() else (0, 0)

    def _sleep(self, seconds: float) -> bool:
        """Wait; False where the launcher has ended."""
        assert self._launcher is not None
        try:
            self._launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def _kill(self, victim: str) -> bool:
        found = self._processes()[victim]
        if not found:
            return False
        try:
            self.chance.choice(found).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
        return True

    def _processes(self) -> dict[str, list[psutil.Process]]:
        """Processes by their part, found below the launcher."""
        parts: dict[str, list[psutil.Process]] = {"launcher": [], "rank": [], "reader": []}
        if self._launcher is None or self._launcher.poll() is not None:
            return parts
        launcher = psutil.Process(self._launcher.pid)
        parts["launcher"].append(launcher)
        try:
            parts["rank"] = launcher.children()
            servers = [
                child
                for rank in parts["rank"]
                for child in rank.children()
                if any("forkserver" in word for word in child.cmdline())
            ]
            parts["reader"] = [reader for server in servers for reader in server.children()]
        except psutil.NoSuchProcess:
            pass
        return parts

    def _choose(self, weights: dict[str, int]) -> str:
        return self.chance.choices(list(weights), list(weights.values()))[0]


def main() -> int:
    """Run the soak; 0 where nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many processes to kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="length of the run (default: 30 and 8 a kill)")
    parser.add_argument("--folder", type=Path, help="where to work, kept (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        steps = arguments.steps or 30 + 8 * arguments.kills
        return soak(folder, arguments.kills, arguments.seed, steps)


def soak(folder: Path, kills: int, seed: int, steps: int) -> int:
    """See the module; prints the verdict and returns the exit code."""
    corpus = write_corpus(folder / "corpus")
    reference, killed = folder / "uninterrupted", folder / "killed"
    began = time.monotonic()
    ranks.run(command_of(corpus, reference, steps, 0), timeout_s=3600)
    print(f"uninterrupted: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    run = Soak(command_of(corpus, killed, steps, 1000), killed, random.Random(seed), folder / "killed.log")
    try:
        run.kill_until(kills, steps - 2)
        run.finish()
    finally:
        run.close()
    seconds = time.monotonic() - began
    print(f"{run.kills.total()} kills in {seconds:.0f} s: {dict(sorted(run.kills.items()))}")
    faults = differences(reference, killed)
    print("\n".join(faults) or "weights, ledger and steps are those of the uninterrupted run")
    return 1 if faults else 0


def command_of(corpus: ToyCorpus, run_dir: Path, steps: int, restarts: int) -> list[str]:
    """Words that start the run."""
    launcher = [*ranks.torchrun(2), "--max-restarts", str(restarts), "-m"]
    return corpus.command(
        launcher,
        STAGE,
        run_dir,
        f"stage.steps={steps}",
        "deepspeed.zero_stage=3",
        "checkpoint.every_steps=3",
        "data.workers=1",
        "logging.progress=false",
        "stage.optimizer.ema_decay=0.9",
    )


def differences(reference: Path, killed: Path) -> list[str]:
    """What the killed run has otherwise than the uninterrupted one."""
    faults = []
    for export in (runs.EXPORT, runs.EXPORT_EMA):
        file = Path(export) / "model.safetensors"
        if (reference / file).read_bytes() != (killed / file).read_bytes():
            faults.append(f"{file} differs")
    if (reference / runs.TRAINED).read_bytes() != (killed / runs.TRAINED).read_bytes():
        faults.append(f"{runs.TRAINED} differs")
    if read_ledger(reference) != read_ledger(killed):
        faults.append(f"{runs.LEDGER} differs")
    losses = [
        [(row["step"], row["loss"]) for row in runs.read_jsonl(run / runs.METRICS)] for run in (reference, killed)
    ]
    if losses[0] != losses[1]:
        faults.append(f"losses in {runs.METRICS} differ")
    return faults


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Step and loss of each step."""
    return [(row["step"], row["loss"]) for row in runs.read_jsonl(run_dir / runs.METRICS)]


if __name__ == "__main__":
    os.chdir(ranks.ROOT)
    sys.exit(main())
