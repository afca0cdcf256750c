"""Two ranks, one of which goes wrong in one step: no rank applies the update, the run says so and goes on."""

from __future__ import annotations

from pathlib import Path

import faults
import pytest
import ranks
from corpus import ToyCorpus

from keye_train import runs
from keye_train.data.audit import audit_run
from keye_train.data.ledger import read_ledger
from keye_train.settings import ReplaySettings, SpikeSettings
from keye_train.training.replay import replay
from keye_train.training.spikes import spike_limit
from keye_train.training.timing import PHASES

STEPS, FAULT_STEP = faults.STEPS, faults.FAULT_STEP


def launch(toy_corpus: ToyCorpus, out: Path, names: list[str]) -> Path:
    """Folder of the runs; two ranks are started once for all of them."""
    script = [str(Path(faults.__file__)), str(toy_corpus.folder), str(out), *names]
    (out / "output").write_text(ranks.forked(2, script, timeout_s=280))
    return out


@pytest.fixture(scope="module")
def found(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every `make test` runs."""
    return launch(toy_corpus, tmp_path_factory.mktemp("faults"), ["nan-zero3", "spike-rollback"])


@pytest.fixture(scope="module")
def all_found(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case."""
    return launch(toy_corpus, tmp_path_factory.mktemp("all-faults"), [case.name for case in faults.CASES])


def rows(run_dir: Path) -> dict[int, dict]:
    return {row["step"]: row for row in runs.read_jsonl(run_dir / runs.METRICS)}


def check_refused(run_dir: Path) -> None:
    assert [step for step, row in rows(run_dir).items() if not row["applied"]] == [FAULT_STEP]
    assert rows(run_dir)[FAULT_STEP]["grad_norm"] is None
    manifest = runs.read_json(run_dir / runs.MANIFEST)
    assert (manifest["steps"], manifest["updates"], manifest["updates_refused"]) == (STEPS, STEPS - 1, 1)
    assert manifest["loss_spikes"] == 0


class TestNanInTheGradientOfOneRank:
    def test_no_rank_applies_the_update(self, found: Path) -> None:
        check_refused(found / "nan-zero3")

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", range(4))
    def test_under_every_zero_stage(self, all_found: Path, stage: int) -> None:
        check_refused(all_found / f"nan-zero{stage}")

    @pytest.mark.slow
    def test_every_zero_stage_goes_on_alike(self, all_found: Path) -> None:
        """A rank that had applied its part would give other losses."""
        curves = [[row["loss"] for row in rows(all_found / f"nan-zero{stage}").values()] for stage in range(4)]
        assert all(len(curve) == STEPS for curve in curves)
        for curve in curves[1:]:
            assert curve == pytest.approx(curves[0], rel=1e-5)


def test_stragglers_stand_in_the_metrics(found: Path) -> None:
    reported = {step: row["slowest_ranks"] for step, row in rows(found / "nan-zero3").items() if "slowest_ranks" in row}
    assert list(reported) == [4, 8]
    for slowest in reported.values():
        assert set(slowest) == set(PHASES)
        assert all(one["rank"] in (0, 1) and one["s"] >= one["median_s"] for one in slowest.values())
        assert slowest["forward"]["median_s"] > 0
    assert "slowest rank: " in (found / "output").read_text()


class TestLossSpikes:
    @pytest.mark.slow
    def test_log_applies_the_update_and_warns(self, all_found: Path) -> None:
        run_dir = all_found / "spike-log"
        assert all(row["applied"] for row in rows(run_dir).values())
        assert runs.read_json(run_dir / runs.MANIFEST)["loss_spikes"] == 1
        assert f"step {FAULT_STEP}: loss" in (all_found / "output").read_text()

    @pytest.mark.slow
    def test_skip_refuses_the_update_on_all_ranks(self, all_found: Path) -> None:
        run_dir = all_found / "spike-skip"
        assert [step for step, row in rows(run_dir).items() if not row["applied"]] == [FAULT_STEP]
        assert rows(run_dir)[FAULT_STEP]["loss"] > 3 * rows(run_dir)[FAULT_STEP - 1]["loss"]
        manifest = runs.read_json(run_dir / runs.MANIFEST)
        assert (manifest["updates"], manifest["loss_spikes"], manifest["updates_refused"]) == (STEPS - 1, 1, 0)

    def test_rollback_goes_on_from_the_checkpoint_without_the_batches(self, found: Path) -> None:
        run_dir = found / "spike-rollback"
        left_out = [FAULT_STEP - 2, FAULT_STEP - 1]  # from 0
        (spike,) = runs.read_json(run_dir / runs.LEFT_OUT)
        assert (spike["step"], spike["left_out"]) == (FAULT_STEP, left_out)
        assert [path.name for path in (run_dir / runs.CHECKPOINTS).glob("*.rollback-*")] == ["step-6.rollback-1"]
        assert list(rows(run_dir)) == [step for step in range(1, STEPS + 1) if step - 1 not in left_out]
        assert all(row["applied"] for row in rows(run_dir).values())
        trained = {row["step"]: row["samples"] for row in runs.read_jsonl(run_dir / runs.TRAINED)}
        assert [step for step, samples in trained.items() if not samples] == left_out
        manifest = runs.read_json(run_dir / runs.MANIFEST)
        assert (manifest["updates"], manifest["loss_spikes"]) == (STEPS - 2, 1)

    def test_a_left_out_step_can_be_replayed(self, found: Path) -> None:
        """Without the fault, which was no matter of its samples, it has the loss that it has elsewhere."""
        replayed = replay(ReplaySettings(run=str(found / "spike-rollback"), step=FAULT_STEP))
        assert replayed.from_step == 4
        assert replayed.loss == pytest.approx(rows(found / "nan-zero3")[FAULT_STEP]["loss"], rel=1e-5)
        assert replayed.recorded == runs.read_json(found / "spike-rollback" / runs.LEFT_OUT)[0]["loss"]

    def test_left_out_samples_stand_in_the_ledger(self, found: Path) -> None:
        run_dir = found / "spike-rollback"
        assert audit_run(run_dir).problems == []
        reasons = {row["step"]: row["reason"] for row in read_ledger(run_dir) if "left out" in row["reason"]}
        assert list(reasons) == [FAULT_STEP - 2, FAULT_STEP - 1]
        assert all(f"loss spike at step {FAULT_STEP}" in reason for reason in reasons.values())

    @pytest.mark.slow
    def test_until_the_spike_the_policies_change_nothing(self, all_found: Path) -> None:
        losses = {
            name: [rows(all_found / name)[step]["loss"] for step in range(1, FAULT_STEP - 1)]
            for name in ("nan-zero0", "spike-log", "spike-skip", "spike-rollback")
        }
        assert losses["spike-log"] == losses["nan-zero0"]
        for curve in losses.values():
            assert curve == pytest.approx(losses["nan-zero0"], rel=1e-5)


class TestSpikeLimit:
    settings = SpikeSettings(window_steps=8, min_steps=4, threshold=4.0, min_rise=0.1)

    def test_too_few_losses_are_not_judged(self) -> None:
        assert spike_limit([1.0, 2.0, 3.0], self.settings) == float("inf")

    def test_it_lies_robust_deviations_above_the_median(self) -> None:
        assert spike_limit([1.0, 2.0, 3.0, 4.0, 5.0], self.settings) == pytest.approx(3 + 4 * 1.4826)
        assert spike_limit([1.0, 2.0, 3.0, 4.0, 500.0], self.settings) == pytest.approx(3 + 4 * 1.4826)

    def test_equal_losses_leave_room_for_rounding(self) -> None:
        assert spike_limit([2.0] * 5, self.settings) == pytest.approx(2.2)
