"""A step of a run once more: the same loss, sample by sample, and nothing written into the run."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from corpus import ToyCorpus

from keye_train import runs
from keye_train.settings import ReplaySettings, SettingsError
from keye_train.training import attendants, learner
from keye_train.training.counting import BatchCounter, Counts
from keye_train.training.learner import step_seed
from keye_train.training.recorder import FlightRecorder, read_flight
from keye_train.training.replay import describe, replay
from keye_train.training.timing import PHASES, describe_straggler, slowest_ranks
from keye_train.training.trainer import train
from keye_train.training.watchdog import COUNT, DATA, KEYS, STEP, Watchdog

STEPS = 6


@pytest.fixture(scope="module")
def run_dir(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with a checkpoint after its fourth step. Also notes the order of what it does."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    more = (f"stage.steps={STEPS}", "checkpoint.every_steps=4", "stage.loss_weighting=square", "seed=3")
    order: list[str] = []

    class Noting(Watchdog):
        def enter(self, phase: str, step: int) -> None:
            order.append(phase)
            super().enter(phase, step)

    class Counting(BatchCounter):
        def count(self, *call: Any) -> Counts:
            order.append("counts")
            counts = super().count(*call)
            order.append("counted")
            return counts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attendants, "Watchdog", Noting)
        patch.setattr(learner, "BatchCounter", Counting)
        assert train(toy_corpus.settings("2_multitask", folder, *more)) == 0
    (folder / "order").write_text(" ".join(order))
    return folder


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("step", "from_step"), [(6, 4), (3, 0)])
def test_one_process_is_met_exactly(run_dir: Path, step: int, from_step: int, tmp_path: Path) -> None:
    before = files(run_dir)
    out = tmp_path / "step.json"
    replayed = replay(ReplaySettings(run=str(run_dir), step=step, out=str(out)))
    assert files(run_dir) == before
    row = runs.read_jsonl(run_dir / runs.METRICS)[step - 1]
    assert (replayed.from_step, replayed.loss, replayed.loss_by_source) == (
        from_step,
        row["loss"],
        row["loss_by_source"],
    )
    text = describe(replayed, samples=3)
    assert "exactly as recorded" in text
    assert replayed.samples[0].key in text
    assert runs.read_json(out)["loss"] == row["loss"]
    assert sum(sample.items for sample in replayed.samples) == row["labelled_tokens"]
    losses = [sample.loss for sample in replayed.samples]
    assert losses == sorted(losses, reverse=True)
    weights = [math.sqrt(sample.items) for sample in replayed.samples]  # of a sample's mean, by square averaging
    mean = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert mean == pytest.approx(row["loss"], rel=1e-5)


def test_the_flight_recorder_names_the_samples(run_dir: Path) -> None:
    recorded = read_flight(run_dir, rank=0)
    rows = runs.read_jsonl(run_dir / runs.METRICS)
    assert [row["step"] for row in recorded] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in recorded] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert [row["seed"] for row in recorded] == [step_seed(3, step, 0) for step in range(STEPS)]
    assert [row["grad_norms"] for row in recorded] == [row["grad_norms"] for row in rows]
    assert all(row["seconds"]["forward"] > 0 and set(row["seconds"]) == set(PHASES) for row in recorded)
    replayed = replay(ReplaySettings(run=str(run_dir), step=5))
    named = {tuple(sample) for pack in recorded[4]["packs"] for sample in pack["samples"]}
    assert named == {(sample.source, sample.shard, sample.key) for sample in replayed.samples}


def test_a_step_that_is_not_there_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has 6 steps"):
        replay(ReplaySettings(run=str(run_dir), step=7))
    with pytest.raises(SettingsError, match="is no run"):
        replay(ReplaySettings(run=str(tmp_path), step=1))
    recipe = tmp_path / runs.RECIPE
    for damaged in ("moon: 1", "a: [", "\x00"):
        recipe.write_text(damaged)
        with pytest.raises(SettingsError, match=str(recipe)):
            replay(ReplaySettings(run=str(tmp_path), step=1))


def check_kept(run_dir: Path, written: int) -> None:
    """At least the last three of the steps 0 .. written - 1 are there, and at most six."""
    kept = [row["step"] for row in read_flight(run_dir, 0)]
    assert kept == list(range(written - len(kept), written))
    assert min(3, written) <= len(kept) <= 6


def test_the_wait_for_the_data_of_other_ranks_has_the_deadline_of_data(run_dir: Path) -> None:
    """A rank that has its data waits in the collective that counts the batch."""
    order = (run_dir / "order").read_text()
    assert order.count(f"{DATA} {COUNT} counts counted {STEP}") == STEPS
    assert KEYS[COUNT] == KEYS[DATA] == "data_s"


class TestContrastive:
    """The loss of a pair depends on the other pairs of the micro-step, and so on the number of ranks."""

    @pytest.fixture(scope="class")
    def stage_0(self, toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("replay-0") / "run"
        assert train(toy_corpus.settings("0_vision", folder, "stage.steps=2")) == 0
        return folder

    def test_one_rank_is_met_exactly(self, stage_0: Path) -> None:
        replayed = replay(ReplaySettings(run=str(stage_0), step=2))
        assert replayed.loss == replayed.recorded

    @pytest.mark.parametrize("known_from", ["manifest", "flight"])
    def test_several_ranks_are_refused(self, stage_0: Path, tmp_path: Path, known_from: str) -> None:
        several = tmp_path / "run"
        shutil.copytree(stage_0, several)
        if known_from == "manifest":
            shutil.rmtree(several / runs.FLIGHT)
            manifest = runs.read_json(several / runs.MANIFEST)
            runs.write_json_atomic(several / runs.MANIFEST, manifest | {"world_size": 2})
        else:  # a launch of fewer ranks came later
            for path in (several / runs.FLIGHT).iterdir():
                path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))
        with pytest.raises(SettingsError, match=r"trained by 2 ranks.*stage\.objective=contrastive"):
            replay(ReplaySettings(run=str(several), step=2))


class TestRing:
    @pytest.mark.parametrize("of_a_launch", range(1, 8))
    def test_it_keeps_the_last_steps_over_launches(self, tmp_path: Path, of_a_launch: int) -> None:
        written = 0
        for _ in range(5):
            recorder = FlightRecorder(tmp_path, 0, steps=3)
            check_kept(tmp_path, written)
            for _ in range(of_a_launch):
                recorder.write({"step": written, "time": float(written)})
                written += 1
                check_kept(tmp_path, written)
            recorder.close()
        assert len(list((tmp_path / runs.FLIGHT).iterdir())) == (1 if written <= 3 else 2)

    @pytest.mark.parametrize("whole", [0, 1])
    def test_a_line_cut_off_by_a_crash_is_dropped(self, tmp_path: Path, whole: int) -> None:
        for launch in range(2):
            recorder = FlightRecorder(tmp_path, 0, steps=3)
            for step in range(launch * whole, (launch + 1) * whole + launch):
                recorder.write({"step": step, "time": float(step)})
            recorder.close()
            if launch == 0:
                with next((tmp_path / runs.FLIGHT).iterdir()).open("a") as file:
                    file.write('{"step": 1, "ti')
        check_kept(tmp_path, 2 * whole + 1)

    def test_it_is_kept_when_the_run_fails(self, tmp_path: Path) -> None:
        recorder = FlightRecorder(tmp_path, 2, steps=3)
        recorder.write({"step": 1})
        recorder.keep(2, RuntimeError("broken"))
        rows = runs.read_jsonl(tmp_path / runs.FLIGHT / "failed-step-2" / "rank-00002.jsonl")
        assert rows == [{"step": 1}, {"step": 2, "error": "RuntimeError: broken"}]


def test_the_slowest_rank_is_that_of_the_largest_lag() -> None:
    times = {"data_wait": [1, 1, 9], "forward": [5, 6, 5], "backward": [8, 8, 8], "optimizer": [1, 1, 2]}
    summed = [times.get(phase, [0, 0, 0])[rank] * 1_000_000 for rank in range(3) for phase in PHASES]
    slowest = slowest_ranks(summed)
    assert slowest["data_wait"] == {"rank": 2, "s": 9.0, "median_s": 1.0}
    assert slowest["forward"]["rank"] == 1
    assert describe_straggler(slowest) == "slowest rank: 2 in data wait, 9.000 s a step, median of the ranks 1.000 s"
