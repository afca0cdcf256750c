"""Annealing branches: drawn mixtures are reproducible and recorded; parallel jobs run N at a time and fail loudly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keye_train import compose
from keye_train.pipeline import branches, jobs, plan, stage_settings
from keye_train.pipeline.jobs import PartFailed, call_all, launched
from keye_train.settings import DrawnMixturesSettings, PipelineSettings, SettingsError

BASE = {"a": 2.0, "b": 1.0, "none": 0.0, "c": 1.0}


def load(*overrides: str) -> PipelineSettings:
    return compose.load_settings(PipelineSettings, "pipeline", ["pipeline=smoke", *overrides])


def test_the_mean_and_the_spread_of_the_draw_are_those_of_the_settings() -> None:
    settings = DrawnMixturesSettings(base="x", count=400, concentration=30.0, seed=3)
    drawn = [branches.draw_mixture(BASE, settings, n) for n in range(1, 401)]
    shares = np.array([list(mixture.values()) for mixture in drawn])
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-5)
    assert (shares[:, 2] == 0).all()
    assert np.allclose(shares.mean(axis=0), [0.5, 0.25, 0, 0.25], atol=0.02)
    assert shares[:, 0].std() == pytest.approx((0.5 * 0.5 / 31) ** 0.5, rel=0.15)
    assert drawn[4] == branches.draw_mixture(BASE, settings, 5)  # on its own, whatever the count


def test_the_record_decides_where_it_fits_and_only_there(tmp_path: Path) -> None:
    settings = DrawnMixturesSettings(base="x", count=2, seed=1)
    first = branches.recorded_mixtures(tmp_path, "stage3", BASE, settings)
    branches.record(tmp_path, "stage3", BASE, settings)
    file = tmp_path / branches.RECORD
    stored = json.loads(file.read_text())
    assert stored["stage3"]["mixtures"] == first
    stored["stage3"]["mixtures"]["drawn1"]["a"] = 0.123  # as another version of the generator would have drawn it
    file.write_text(json.dumps(stored))
    more = DrawnMixturesSettings(base="x", count=3, seed=1)
    again = branches.recorded_mixtures(tmp_path, "stage3", BASE, more)
    assert again["drawn1"]["a"] == 0.123
    assert again["drawn2"] == first["drawn2"]
    other = DrawnMixturesSettings(base="x", count=2, seed=2)
    assert branches.recorded_mixtures(tmp_path, "stage3", BASE, other)["drawn1"]["a"] != 0.123


def test_branches_by_name_table_and_draw_are_runs_with_their_own_recipes(tmp_path: Path) -> None:
    settings = load(
        f"out={tmp_path}",
        "soup.budget=20",
        "stages.stage3.mixtures=[anneal_a]",
        "+stages.stage3.tables.mine={shape:0.5,digit:0.5}",
        "stages.stage3.drawn={base:anneal,count:2,concentration:20,seed:5}",
    )
    names = [run.name for run in settings.runs() if run.entry == "stage3"]
    assert names == ["stage3_anneal_a", "stage3_mine", "stage3_drawn1", "stage3_drawn2"]
    assert settings.merged_runs() == names
    recipes = {run.name: stage_settings(settings, run) for run in settings.runs()}
    assert recipes["stage3_mine"].data.mixtures["mine"] == {"shape": 0.5, "digit": 0.5}
    assert recipes["stage3_drawn2"].stage.mixture == "drawn2"
    drawn = recipes["stage3_drawn2"].data.mixtures["drawn2"]
    assert drawn == plan.drawn_mixtures(settings, "stage3")["drawn2"]
    assert set(drawn) == set(recipes["stage3_mine"].data.mixtures["anneal"])
    plan.record_draws(settings)
    assert json.loads((tmp_path / branches.RECORD).read_text())["stage3"]["mixtures"]["drawn2"] == drawn


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.stage3.drawn={base:anneal,count:-1}", r"drawn\.count=-1"),
        ("stages.stage3.drawn={base:anneal,count:2,concentration:0}", "concentration"),
        ("stages.stage3.drawn.count=2", "neither"),
        ("parallel_branches=0", "parallel_branches"),
        ("soup.curve_points=2", "curve_points=2"),
        ("merged=[]", "soup needs runs to mix"),
        ("soup.budget=3", "budget=3"),
    ],
)
def test_what_cannot_work_is_refused(override: str, expected: str) -> None:
    with pytest.raises(SettingsError, match=expected):
        load(override)


def test_a_base_that_does_not_exist_is_named(tmp_path: Path) -> None:
    settings = load(f"out={tmp_path}", "soup.budget=20", "stages.stage3.drawn={base:moon,count:1}")
    with pytest.raises(SettingsError, match="moon"):
        stage_settings(settings, settings.runs()[-1])


def test_a_launcher_may_name_the_run_and_take_the_overrides_alone() -> None:
    assert launched(["srun", "--job-name={run}"], "s3_a", ["x=1"]) == [
        "srun", "--job-name=s3_a", "-m", "keye_train", "x=1"
    ]  # fmt: skip
    sbatch = ["sbatch", "--wait", "launch/slurm.sbatch", "{arguments}"]
    assert launched(sbatch, "s3_a", ["x=1", "y=2"]) == [*sbatch[:3], "x=1", "y=2"]
    assert launched([], "s3_a", ["x=1"])[1:] == ["-m", "keye_train", "x=1"]


def test_jobs_run_n_at_a_time_and_one_that_fails_is_named(tmp_path: Path) -> None:
    gate = (  # each waits until its partner is there as well: alone they would never end
        "import pathlib, sys, time\n"
        "own, other = map(pathlib.Path, sys.argv[1:3])\n"
        "own.touch()\n"
        "while not other.exists(): time.sleep(0.01)\n"
        "print('met'); sys.exit(int(sys.argv[3]))\n"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")

    def commands(code: str) -> dict[str, list[str]]:
        return {
            "first": [sys.executable, "-c", gate, a, b, "0"],
            "second": [sys.executable, "-c", gate, b, a, code],
            "third": [sys.executable, "-c", gate, a, b, "0"],
        }

    assert set(call_all(commands("0"), 2, tmp_path / "logs")) == {"first", "second", "third"}
    assert (tmp_path / "logs" / "third.log").read_text() == "met\n"
    (tmp_path / "b").unlink()
    with pytest.raises(PartFailed, match=r"second ended with exit code 3 .*second\.log"):
        call_all(commands("3"), 2, tmp_path / "logs")


def test_a_sigterm_while_a_job_is_being_started_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = jobs._start
    started: list[subprocess.Popen[bytes]] = []

    def slow_start(*arguments: Any) -> subprocess.Popen[bytes]:
        process = start(*arguments)
        started.append(process)
        os.kill(os.getpid(), signal.SIGTERM)  # the process is there, and nobody has noted it yet
        return process

    monkeypatch.setattr(jobs, "_start", slow_start)
    waits = [sys.executable, "-c", "import signal; signal.alarm(30); signal.pause()"]
    with pytest.raises(PartFailed) as caught:
        call_all({"first": waits, "second": waits}, 2, tmp_path)
    assert caught.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "second.log").exists()
    with pytest.raises(PartFailed):
        jobs.call("alone", waits)
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2  # and not that of their own alarm


def test_a_job_that_cannot_be_started_leaves_no_other_behind(tmp_path: Path) -> None:
    done = tmp_path / "done"
    works = [sys.executable, "-c", f"import pathlib; pathlib.Path({str(done)!r}).touch()"]
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        call_all({"first": works, "second": ["no-such-program"], "third": works}, 2, tmp_path)
    assert done.exists()
    assert not (tmp_path / "third.log").exists()
