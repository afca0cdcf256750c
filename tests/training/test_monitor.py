"""What is logged can be read back, survives a resumption, and reaches TensorBoard and wandb."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keye_train import runs
from keye_train.settings import LoggingSettings
from keye_train.training.monitor import Monitor


def row(step: int) -> dict:
    return {"step": step, "loss": 1.0 / step, "tokens_per_s": 10.0, "lr": {"vision": 0.5}, "grad_norm": None}


def monitor(run_dir: Path, first_step: int, is_main: bool = True, **writers: bool) -> Monitor:
    settings = LoggingSettings(tensorboard=writers.get("tensorboard", False), wandb=writers.get("wandb", False))
    return Monitor(run_dir, settings, is_main, first_step, steps=4, name="toy", recipe={"seed": 0})


def test_rows_of_steps_that_are_run_again_are_dropped(tmp_path: Path) -> None:
    first = monitor(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(row(step))
    first.close()
    with (tmp_path / runs.METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # the process died here
    second = monitor(tmp_path, 2)
    second.write(row(3))
    second.close()
    assert [line["step"] for line in runs.read_jsonl(tmp_path / runs.METRICS)] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    silent = monitor(tmp_path, 0, is_main=False, tensorboard=True, wandb=True)
    silent.write(row(1))
    silent.advance(1, row(1))
    silent.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_and_wandb_get_flat_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for first_step in (0, 2):  # a second launch goes on with the same wandb run
        opened = monitor(tmp_path, first_step, tensorboard=True, wandb=True)
        for step in (first_step + 1, first_step + 2):
            opened.write(row(step))
        opened.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("lr/vision")] == [1, 2, 3, 4]
    assert "grad_norm" not in events.Tags()["scalars"]  # a refused update has no norm to show
    offline = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(offline) == 2
    assert all((tmp_path / "wandb_id").read_text() in name for name in offline)


def test_progress_is_a_line_now_and_then_without_a_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    opened = monitor(tmp_path, 0)
    for step in (1, 2, 3, 4):
        opened.advance(step, row(step))
    opened.close()
    lines = [record.message for record in caplog.records]
    assert [line.partition(",")[0] for line in lines] == ["toy: step 1/4", "toy: step 4/4"]
    assert "loss 0.2500" in lines[-1]
    assert lines[-1].endswith("0:00:00 left")
