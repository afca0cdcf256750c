"""``python rank_server.py``: forks ranks from one process that has imported the libraries of the trainer.

Their import takes 8 s of processor time, for each rank of each launch. Here it is paid for once; keye_train itself each
rank imports anew. What a launcher does for the trainer has tests of its own, with real launchers.

A request is a line of JSON on stdin, ``{"words": [...], "ranks": [{"environment": {...}, "output": FILE}, ...],
"timeout_s": ...}``; the answer a line on stdout: the exit codes, negative for a signal. Once a rank has failed, or time
is up, those that still run are killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

LIBRARIES = (
    "av",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "hydra",
    "pyarrow.compute",
    "safetensors.torch",
    "scipy.optimize",
    "torch",
    "torch.utils.tensorboard",
    "transformers.generation.utils",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.models.auto.tokenization_auto",
)


def main() -> None:
    """Serve until stdin ends. In a rank this returns when its program does."""
    for library in LIBRARIES:
        importlib.import_module(library)
    assert threading.active_count() == 1, "a process with threads must not be forked"
    assert not any(name.split(".")[0] == "keye_train" for name in sys.modules)
    gc.freeze()  # no collection in a rank looks at what has been imported, and so copies its pages
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in request["ranks"]:
            if not (child := os.fork()):
                become(rank["environment"], rank["output"])
                run(request["words"])
                return
            children.append(child)
        print(json.dumps(exit_codes(children, time.monotonic() + request["timeout_s"])), flush=True)


def exit_codes(children: list[int], deadline: float) -> list[int]:
    """Wait for all; see the module."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > deadline
        if late or any(codes.values()):
            for other in set(children) - set(codes):
                os.kill(other, signal.SIGKILL)
        if not child:
            signal.sigtimedwait({signal.SIGCHLD}, 1.0)
    return [codes[child] for child in children]


def become(environment: dict[str, str], output: str) -> None:
    """Be a rank of a run: a session, variables and an output of its own."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)


def run(words: list[str]) -> None:
    """``python WORDS``: a script, or ``-m MODULE``, with its arguments."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
