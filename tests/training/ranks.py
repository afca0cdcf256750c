"""Start the ranks of a run as real processes, with a deadline and with every rank's output on failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """Variables of a child: one waiting thread for each rank, no trace of a process group around the tests."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_", "MASTER_", "WORLD_"))
    }
    return kept | {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "offline",
    }


def torchrun(world_size: int) -> list[str]:
    """Words that start ``world_size`` ranks with torchrun, on a port of its own choice."""
    return [
        str(BIN / "torchrun"),
        "--nproc-per-node",
        str(world_size),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    ]


def run(command: list[str], timeout_s: float, expect: int = 0) -> str:
    """Run a command to its end; its whole output. Fails with that output on another exit code or past the deadline."""
    process = start(command)
    return finish(process, timeout_s, expect)


def start(command: list[str]) -> subprocess.Popen[str]:
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float, expect: int = 0) -> str:
    """Wait for a started command; see :func:`run`."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s: {process.args}\n{output}") from None
    assert process.returncode == expect, f"exit code {process.returncode}, not {expect}: {process.args}\n{output}"
    return output
