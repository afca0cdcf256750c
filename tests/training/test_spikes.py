"""A refused update is called by its reason, and what is said to be left out of the training was never trained on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from keye_train import runs
from keye_train.checkpoints import folder
from keye_train.checkpoints.layout import MANIFEST, STATE
from keye_train.settings import SpikePolicy, SpikeSettings
from keye_train.training import distributed
from keye_train.training.checkpoint import TrainState, newest_whole
from keye_train.training.distributed import World
from keye_train.training.spikes import RollBack, Spike, SpikeGuard, Verdict, read_spikes, record_spike


@pytest.fixture(scope="module")
def world() -> World:
    return distributed.start(timeout_minutes=5)


def judge(guard: SpikeGuard, step: int, loss: float, applied: bool) -> Verdict:
    """One step of a single micro-batch."""
    guard.begin()
    guard.gate(torch.tensor(loss), last=True)
    return guard.observe(step, applied)


def calm(policy: SpikePolicy, world: World) -> SpikeGuard:
    """A guard that has seen eight equal losses."""
    guard = SpikeGuard(SpikeSettings(policy=policy, window_steps=8, min_steps=4, leave_out_steps=3), world, {})
    for step in range(1, 9):
        assert judge(guard, step, 1.0, applied=True) == Verdict.fine
    return guard


class TestTheReasonOfARefusedUpdate:
    def test_log_refuses_no_spike_so_the_gradient_was_not_finite(self, world: World) -> None:
        guard = calm(SpikePolicy.log, world)
        assert judge(guard, 9, 50.0, applied=False) == Verdict.not_finite
        assert (guard.total, guard.in_a_row) == (0, 0)

    def test_log_applies_a_spike_and_counts_none_in_a_row(self, world: World) -> None:
        guard = calm(SpikePolicy.log, world)
        assert [judge(guard, step, 50.0, applied=True) for step in (9, 10)] == [Verdict.spike] * 2
        assert (guard.total, guard.in_a_row) == (2, 0)

    def test_skip_refuses_a_spike(self, world: World) -> None:
        guard = calm(SpikePolicy.skip, world)
        assert judge(guard, 9, 50.0, applied=False) == Verdict.spike
        assert judge(guard, 10, 1.0, applied=False) == Verdict.not_finite
        assert (guard.total, guard.in_a_row) == (1, 1)

    def test_rollback_names_the_batches_up_to_the_spike(self, world: World) -> None:
        with pytest.raises(RollBack) as raised:
            judge(calm(SpikePolicy.rollback, world), 9, 50.0, applied=False)
        assert raised.value.spike.left_out == [6, 7, 8]


def save(run_dir: Path, *steps: int) -> None:
    """Whole checkpoints without tensors."""
    for step in steps:
        final = run_dir / runs.CHECKPOINTS / f"step-{step}"
        folder.aside(final).mkdir(parents=True)
        folder.commit(final, {}, {STATE: asdict(TrainState(step, step, {})), MANIFEST: {}}, marked=False)


class TestWhereARollbackGoes:
    """The spike of step 12; wished to be left out are the batches 8 to 11, of the steps 9 to 12."""

    spike = Spike(step=12, loss=9.0, limit=2.0, left_out=[8, 9, 10, 11])

    @pytest.mark.parametrize(
        ("saved", "begin", "left_out", "aside"),
        [
            ((4, 8), 8, [8, 9, 10, 11], []),
            ((4, 10), 4, [8, 9, 10, 11], ["step-10.rollback-1"]),
            ((4, 9, 11), 4, [8, 9, 10, 11], ["step-11.rollback-1", "step-9.rollback-1"]),
            ((9, 10), 10, [10, 11], []),  # none is old enough
            ((), 0, [8, 9, 10, 11], []),
        ],
    )
    def test_nothing_is_left_out_that_the_checkpoint_has_learnt(
        self, world: World, tmp_path: Path, saved: tuple[int, ...], begin: int, left_out: list[int], aside: list[str]
    ) -> None:
        save(tmp_path, *saved)
        record_spike(tmp_path, self.spike, SpikeSettings(), world)
        found = newest_whole(tmp_path, world)
        assert (found.state.step if found else 0) == begin
        (spike,) = read_spikes(tmp_path)
        assert spike.left_out == left_out
        assert sorted(path.name for path in (tmp_path / runs.CHECKPOINTS).glob("*.rollback-*")) == aside

    def test_a_torn_checkpoint_is_not_gone_back_to(self, world: World, tmp_path: Path) -> None:
        save(tmp_path, 4, 10)
        (tmp_path / runs.CHECKPOINTS / "step-4" / STATE).unlink()
        record_spike(tmp_path, self.spike, SpikeSettings(), world)
        assert read_spikes(tmp_path)[0].left_out == [10, 11]

    def test_the_log_says_what_is_not_left_out(
        self, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        save(tmp_path, 10)
        record_spike(tmp_path, self.spike, SpikeSettings(), world)
        assert "only the batches of steps 11 to 12 are left out" in caplog.text
