"""``python held.py STEPS ...``: ``keye-train ...`` that waits behind its first ``STEPS`` steps until a signal has come.

A toy makes its steps in milliseconds: a signal that a test sends when it sees the second would come to a run that has
ended, on a machine that is fast enough. Here it comes to a run that still has steps to make, however late it is.
"""

from __future__ import annotations

import os
import select
import signal
import sys

from keye_train.cli import train_main
from keye_train.data.loader import StepData
from keye_train.settings import TrainSettings
from keye_train.training import trainer
from keye_train.training.attendants import Attendants
from keye_train.training.distributed import World
from keye_train.training.guards import StopRequest


def holding(steps: int) -> type[trainer.Trainer]:
    """A trainer that waits for a signal, perhaps one that has come already, before it reads for the next step."""

    class Held(trainer.Trainer):
        def __init__(self, settings: TrainSettings, world: World, stop_request: StopRequest) -> None:
            super().__init__(settings, world, stop_request)
            self._came, writing = os.pipe()
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing)  # each signal that is handled leaves a byte

        def _read(self, by: Attendants) -> StepData | None:
            if self._done == steps:
                select.select([self._came], [], [])
            return super()._read(by)

    return Held


if __name__ == "__main__":
    trainer.Trainer = holding(int(sys.argv[1]))  # type: ignore[misc]
    train_main(sys.argv[2:])
