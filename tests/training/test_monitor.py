"""What is logged can be read back, survives a resumption, and reaches TensorBoard and wandb."""

from __future__ import annotations

import io
import logging
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from keye_train import runs
from keye_train.settings import LoggingSettings
from keye_train.training import progress
from keye_train.training.monitor import Monitor
from keye_train.training.progress import Progress, figures


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
        # Each is taken away before the next: wandb names the folder of a launch by the second in which it began.
        (tmp_path / "wandb").rename(tmp_path / f"wandb-{first_step}")
    wandb.teardown()  # its process has written all when it has ended
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("lr/vision")] == [1, 2, 3, 4]
    assert "grad_norm" not in events.Tags()["scalars"]  # a refused update has no norm to show
    histories = [read_offline_run(path) for path in sorted(tmp_path.glob("wandb-*/offline-run-*/*.wandb"))]
    identity = (tmp_path / "wandb_id").read_text()
    assert histories == [(identity, (1, 2)), (identity, (3, 4))]  # `wandb sync` joins both into one run
    offline = [path.name for path in tmp_path.glob("wandb-*/offline-run-*")]
    assert len(offline) == 2
    assert all((tmp_path / "wandb_id").read_text() in name for name in offline)


def test_progress_is_a_line_now_and_then_without_a_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the first and the last step, and where there was none for some time."""
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    opened = Monitor(tmp_path, LoggingSettings(tensorboard=False), True, 0, steps=6, name="toy", recipe={})
    for step, seconds in ((1, 1.0), (2, 10.0), (3, 10.0), (4, 10.0), (5, 1.0), (6, 1.0)):
        now[0] += seconds
        opened.advance(step, row(step))
    opened.close()
    lines = [record.message for record in caplog.records if record.name == progress.__name__]
    assert [line.partition(",")[0] for line in lines] == ["toy: step 1/6", "toy: step 3/6", "toy: step 6/6"]
    assert "loss 0.3333" in lines[1]
    assert [line.rpartition(", ")[2] for line in lines] == ["0:00:05 left", "0:00:21 left", "0:00:00 left"]


def test_progress_on_a_terminal_is_one_line_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler()  # as basicConfig makes it: holds the stream of now
    logging.getLogger().addHandler(handler)
    try:
        shown = Progress("toy", 2, 4, Console(file=screen, force_terminal=True, width=140))
        shown.advance(3, row(3) | {"mfu": 0.413, "data_wait_share": 0.25})
        logging.getLogger("keye_train").warning("a word in between")
        shown.advance(4, row(4))
        shown.close()
    finally:
        logging.getLogger().removeHandler(handler)
    assert handler.stream is screen
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    assert "a word in between" in lines  # alone on its line
    assert any("4/4" in line and "left" in line and "loss 0.2500, 10 tokens/s" in line for line in lines)


def test_the_line_shows_what_matters() -> None:
    full = row(3) | {"mfu": 0.413, "data_wait_share": 0.25}
    assert figures(full) == "loss 0.3333, 10 tokens/s, MFU 41.3%, waiting for data 25%"
    assert figures(full | {"loss": None, "mfu": None, "data_wait_share": 0.001}) == "loss not finite, 10 tokens/s"


def read_offline_run(path: Path) -> tuple[str, tuple[int, ...]]:
    """Id of an offline wandb run and the steps that its file holds."""
    identity, steps = "", []
    for data in log_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            identity = record.run.run_id
        if record.HasField("history"):
            steps.append(record.history.step.num)
    return identity, tuple(steps)


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log, as wandb keeps one: blocks of 32 KiB; parts with checksum, length and kind before them.

    wandb puts 7 bytes of its own at the start of the first block. Kinds: 1 whole, 2 first, 3 middle, 4 last.
    """
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
