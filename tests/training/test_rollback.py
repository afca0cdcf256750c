"""Promise: a rollback goes on from the newest checkpoint, also where that one is still being written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from corpus import ToyCorpus

from keye_train import runs
from keye_train.settings import TrainSettings
from keye_train.training import trainer
from keye_train.training.checkpoint import TrainState
from keye_train.training.distributed import World
from keye_train.training.guards import StopRequest
from keye_train.training.saver import Saver
from keye_train.training.trainer import train

SAVED, SPIKE, STEPS = 4, 6, 7
SETTINGS = (
    f"stage.steps={STEPS}",
    f"checkpoint.every_steps={SAVED}",
    "guards.spike.policy=rollback",
    "guards.spike.min_steps=4",
    "guards.spike.window_steps=8",
    "guards.spike.min_rise=2.0",
    "guards.spike.leave_out_steps=1",
)


class Spiking(trainer.Trainer):
    """Its losses are fifty times as large in one step."""

    def __init__(self, settings: TrainSettings, world: World, stop_request: StopRequest) -> None:
        super().__init__(settings, world, stop_request)
        self.learner.objective.register_forward_hook(self._raise_loss)

    def _raise_loss(self, *call: Any) -> Any:
        losses, figures = call[-1]
        return (50 * losses, figures) if self.learner.state.step == SPIKE - 1 else (losses, figures)


class Slow(Saver):
    """Its save of one step lasts until somebody waits for it without limit, which may be never."""

    made: list[Slow]
    bug = False

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.waited_for = threading.Event()
        self.left_behind = False
        Slow.made.append(self)

    def _commit(self, final: Path, state: TrainState) -> None:
        if state.step == SAVED:
            assert self.waited_for.wait(60)
            if Slow.bug:
                raise TypeError("no fault of the disk")
        super()._commit(final, state)

    def wait(self) -> None:
        if self.busy:
            self.waited_for.set()
        super().wait()

    def close(self, patience_s: float) -> None:
        self.left_behind = self.busy
        self.waited_for.set()
        super().close(patience_s)


@pytest.fixture(autouse=True)
def _slow_and_spiking(monkeypatch: pytest.MonkeyPatch) -> None:
    Slow.made = []
    monkeypatch.setattr(trainer, "Trainer", Spiking)
    monkeypatch.setattr(trainer, "Saver", Slow)


def test_it_waits_for_the_save_under_way(
    toy_corpus: ToyCorpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert train(toy_corpus.settings("1_align", tmp_path, *SETTINGS)) == 0
    assert [one.left_behind for one in Slow.made] == [False, False]
    assert f"continuing from {tmp_path / runs.CHECKPOINTS / f'step-{SAVED}'}" in caplog.text
    manifest = runs.read_json(tmp_path / runs.MANIFEST)
    assert (manifest["updates"], manifest["loss_spikes"]) == (STEPS - 1, 1)


def test_a_fault_of_that_save_stops_the_run(
    toy_corpus: ToyCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "bug", True)
    with pytest.raises(RuntimeError, match="not for want of disk"):
        train(toy_corpus.settings("1_align", tmp_path, *SETTINGS))
    assert not (tmp_path / runs.LEFT_OUT).exists()
