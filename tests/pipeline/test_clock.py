"""Promise: the time left that a chain announces goes by what its stages compute."""

from __future__ import annotations

import pytest
from rich.console import Console

from keye_train.compose import load_settings
from keye_train.data.storage import StorageError
from keye_train.pipeline.chain import _operations
from keye_train.pipeline.clock import Clock
from keye_train.settings import TrainSettings


def test_the_time_left_goes_by_the_work_of_the_parts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("keye_train.pipeline.clock.time.monotonic", lambda: now[0])
    asked: list[str] = []

    def work(name: str, operations: float) -> float:
        asked.append(name)
        return operations

    wanted = {"stage0": 1e12, "stage1": 1e12, "stage2": 4e12}
    parts = ["data", *wanted, "merge"]
    clock = Clock(parts, {name: (lambda name=name, value=value: work(name, value)) for name, value in wanted.items()})
    clock.begin("data")
    now[0] += 1000.0
    clock.end("data")
    clock.begin("stage0")
    assert not asked  # planning takes a moment: not before it is of use
    clock.end("stage0", kept=True)
    clock.begin("stage1")
    assert "left" not in capsys.readouterr().out  # nothing has been measured
    now[0] += 60.0
    clock.end("stage1")
    clock.begin("stage2")
    assert "[4/5] stage2  (about 4 min of training left)" in capsys.readouterr().out
    now[0] += 0.4
    clock.end("stage2")
    assert sorted(asked) == ["stage1", "stage2"]  # once each, and those kept never
    shown = Console(record=True, width=40)
    clock.table(shown)
    assert "0.4" in shown.export_text()  # not "0", as if nothing had been done


def test_a_storage_that_fails_costs_the_estimate_and_not_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise StorageError("no answer")

    settings = load_settings(TrainSettings, "train", ["stage=2_multitask", "model=tiny", "data=demo"])
    monkeypatch.setattr("keye_train.forecast.workload.workload", fails)
    assert _operations(settings) > 0
