"""Start the ranks of a run as real processes, with a deadline and with every rank's output on failure.

``run`` starts a command, with its launcher; ``forked`` gives a script or module its ranks in a few tenths of a second.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
LONGEST_S = 500.0
"""A launch takes 10 to 40 s, on a machine that does much else besides six times that; one that hangs takes this."""


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


def deepspeed(world_size: int, port: int) -> list[str]:
    """Words that start ``world_size`` ranks with DeepSpeed's launcher, which would take port 29500 for every run."""
    return [
        str(BIN / "deepspeed"),
        *("--num_gpus", str(world_size), "--master_port", str(port)),
        *("--no_local_rank", "--module"),
    ]


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given while the block lasts, and on which rank 0 can listen.

    It is bound all the time: the system then gives it to no one who asks for any port. Rank 0 binds it a second time,
    which SO_REUSEADDR allows as long as one of the two does not listen; a store of torch sets that as well.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("localhost", 0))
        yield held.getsockname()[1]


def forked(world_size: int, words: list[str], timeout_s: float = LONGEST_S) -> str:
    """Run ``python WORDS`` on every rank, without a launcher and without its start-up time; see ``rank_server``.

    Returns:
        The output of all ranks, one after the other. Fails with it where a rank does.
    """
    with tempfile.TemporaryDirectory() as folder, reserved_port() as port:
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        outputs = [Path(folder) / f"rank-{rank}" for rank in range(world_size)]
        of_ranks = [
            {
                "environment": environment()
                | group
                | {"LOCAL_WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "output": str(output),
            }
            for rank, output in enumerate(outputs)
        ]
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps({"words": words, "ranks": of_ranks, "timeout_s": timeout_s}), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        output = "".join(f"--- rank {rank}\n{file.read_text()}" for rank, file in enumerate(outputs) if file.exists())
    assert answer, f"the server of ranks is gone\n{output}"
    codes = json.loads(answer)
    assert not any(codes), f"exit codes {codes} within {timeout_s} s: {words}\n{output}"
    return output


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, which holds the other end of its input."""
    command = [sys.executable, str(Path(__file__).with_name("rank_server.py"))]
    return start(command, stdin=subprocess.PIPE, stderr=None)


def run(command: list[str], timeout_s: float = LONGEST_S, expect: int = 0) -> str:
    """Run a command to its end; its whole output. Fails with that output on another exit code or past the deadline."""
    process = start(command)
    return finish(process, timeout_s, expect)


def start(
    command: list[str], stdin: int | None = None, stderr: int | None = subprocess.STDOUT
) -> subprocess.Popen[str]:
    """Start a command in a process group of its own; ``stdin`` and ``stderr`` as for ``Popen``."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
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
