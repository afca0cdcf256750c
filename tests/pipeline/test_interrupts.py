"""Promise: no part of a chain begins behind a Ctrl-C, also where that was lost on its way."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest

from keye_train.pipeline.clock import Clock
from keye_train.pipeline.jobs import Interrupts


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["heard", "ignored"])
def ctrl_c(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What Ctrl-C does to this process; it is ignored in one that a script has put into the background."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_one_that_a_library_swallowed_stops_the_chain_before_its_next_part(ctrl_c: Any) -> None:
    interrupts = Interrupts()
    clock = Clock(["a", "b"], {}, interrupts.check)
    with interrupts.remembered():
        clock.begin("a")
        with suppress(KeyboardInterrupt):  # as a bare ``except`` of an import does
            signal.raise_signal(signal.SIGINT)
        clock.end("a")
        with nullcontext() if ctrl_c is signal.SIG_IGN else pytest.raises(KeyboardInterrupt):
            clock.begin("b")
    assert signal.getsignal(signal.SIGINT) is ctrl_c
