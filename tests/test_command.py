"""Promise: every command leaves with a code that a script can tell apart, and what the user can mend is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

ERRORS = {
    "raise ValueError('stage.steps=0: at least 1')": (2, "keye-x: error: stage.steps=0: at least 1\n"),
    "raise FileNotFoundError('no run there')": (2, "keye-x: error: no run there\n"),
    "raise PermissionError('may not be written')": (2, "keye-x: error: may not be written\n"),  # by ``also``
    "raise KeyboardInterrupt": (130, "keye-x: interrupted\n"),
    "return 1": (1, ""),
}


def run(body: str, stdout: int = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"""
from keye_train.command import guarded
def work():
    {body}
guarded("keye-x", work, also=(OSError,))
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("body", ERRORS)
def test_mistakes_and_interruptions_are_one_line(body: str) -> None:
    ended = run(body)
    assert (ended.returncode, ended.stderr) == ERRORS[body]


def test_faults_of_ours_keep_their_traceback() -> None:
    for ended in (run("assert False, 'invariant'"), run("raise ValueError('x')", KEYE_TRACEBACK="1")):
        assert ended.returncode == 1
        assert "Traceback" in ended.stderr


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    """As in ``keye-data check ... | head -3``; a broken pipe to a process of ours is no such thing."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = run("print('a line'); return 0", stdout=writing)
        assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")
    finally:
        os.close(writing)
    assert "error: [Errno 32]" in run("raise BrokenPipeError(32, 'Broken pipe')").stderr
