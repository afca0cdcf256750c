"""``python faults.py CORPUS OUT CASE...``: real runs on every rank, each with a fault; the tests look at their folders.

A gradient becomes NaN, or the losses of one rank fifty times as large, in one step, by hooks of torch on the model that
the trainer built.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus import ToyCorpus
from torch import Tensor

from keye_train.settings import TrainSettings
from keye_train.training import trainer
from keye_train.training.distributed import World
from keye_train.training.guards import StopRequest

STAGE, STEPS, FAULT_STEP = "2_multitask", 9, 7
COMMON = (f"stage.steps={STEPS}", "guards.straggler_every_steps=4")
SPIKE = ("guards.spike.min_steps=4", "guards.spike.window_steps=8", "guards.spike.min_rise=2.0")


REAL = trainer.Trainer


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    fault: str  # nan or spike
    overrides: tuple[str, ...]


CASES = [
    *(Case(f"nan-zero{stage}", "nan", (f"deepspeed.zero_stage={stage}",)) for stage in range(4)),
    Case("spike-log", "spike", (*SPIKE, "guards.spike.policy=log", "deepspeed.zero_stage=0")),
    Case("spike-skip", "spike", (*SPIKE, "guards.spike.policy=skip", "deepspeed.zero_stage=3")),
    Case(
        "spike-rollback",
        "spike",
        (
            *SPIKE,
            "guards.spike.policy=rollback",
            "guards.spike.leave_out_steps=2",
            "checkpoint.every_steps=2",  # the newest one has learnt from a batch that is left out
            "checkpoint.keep=5",
            "deepspeed.zero_stage=2",
        ),
    ),
]


def faulty(fault: str) -> type[trainer.Trainer]:
    """A trainer whose rank 1 goes wrong once, in the step before ``FAULT_STEP`` are done."""

    class Faulty(REAL):
        def __init__(self, settings: TrainSettings, world: World, stop_request: StopRequest) -> None:
            super().__init__(settings, world, stop_request)
            if fault == "nan":
                next(iter(self.learner.engine.trainable.values())).register_hook(self._poison)
            else:
                self.learner.objective.register_forward_hook(self._raise_loss)

        def _strikes(self) -> bool:
            return self.world.rank == 1 and self.learner.state.step == FAULT_STEP - 1

        def _poison(self, gradient: Tensor) -> Tensor:
            return gradient * float("nan") if self._strikes() else gradient

        def _raise_loss(self, *call: Any) -> Any:
            losses, figures = call[-1]
            return (50 * losses, figures) if self._strikes() else (losses, figures)

    return Faulty


def main(corpus: ToyCorpus, out: Path, names: list[str]) -> None:
    """Run the cases."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for case in CASES:
        if case.name not in names:
            continue
        trainer.Trainer = faulty(case.fault)  # type: ignore[misc]
        settings = corpus.settings(STAGE, out / case.name, *COMMON, *case.overrides)
        assert trainer.train(settings) == 0, case.name


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    main(ToyCorpus(folder, folder / "recipes"), Path(sys.argv[2]), sys.argv[3:])
