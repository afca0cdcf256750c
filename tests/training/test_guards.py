"""Non-finite gradients and signals stop a run in the promised way; a batch without labels does not."""

from __future__ import annotations

import signal

import pytest
import torch

from keye_train.sample import SampleRef
from keye_train.training.guards import MAX_REFUSED_IN_A_ROW, NonFiniteError, NonFiniteGuard, StopRequest, exit_code
from keye_train.training.trainer import seed_step, weighted_sum

REFS = [SampleRef("images", "a.tar", "000001")]


def test_refused_updates_stop_the_run_only_in_a_row_and_name_the_samples() -> None:
    guard = NonFiniteGuard()
    for step in range(3 * MAX_REFUSED_IN_A_ROW):
        guard.observe(step % MAX_REFUSED_IN_A_ROW == 0, step, REFS)
    for step in range(MAX_REFUSED_IN_A_ROW - 1 - guard.in_a_row):
        guard.observe(False, step, REFS)
    with pytest.raises(NonFiniteError, match=r"000001 in a\.tar"):
        guard.observe(False, 99, REFS)
    assert guard.total == 3 * (MAX_REFUSED_IN_A_ROW - 1) + 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_never_gives_a_finite_gradient(bad: float) -> None:
    losses = torch.tensor([1.0, bad], requires_grad=True)
    weighted_sum(losses, 0.5).backward()
    assert losses.grad is not None
    assert losses.grad.isnan().all()


def test_no_label_gives_a_zero_gradient() -> None:
    parameter = torch.ones(3, requires_grad=True)
    weighted_sum(parameter[:0], 1.0).backward()
    assert torch.equal(parameter.grad, torch.zeros(3))


def test_signals_are_wishes_and_the_launchers_echo_is_ignored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as request:
        assert request.as_flags() == (0, 0)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, handed on by torchrun
        assert request.as_flags() == (1, 0)
    assert signal.getsignal(signal.SIGINT) is before
    assert StopRequest.from_flags(2, 0) == signal.SIGINT
    assert StopRequest.from_flags(1, 1) == signal.SIGTERM
    assert StopRequest.from_flags(0, 0) == 0
    assert (exit_code(signal.SIGINT), exit_code(signal.SIGTERM)) == (130, 143)


def test_random_numbers_of_a_step_do_not_depend_on_the_past() -> None:
    drawn = []
    for noise in (0, 7):
        torch.rand(noise)
        seed_step(3, 11, rank=1)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    seed_step(3, 11, rank=0)
    assert not torch.equal(torch.rand(4), drawn[0])
