"""Non-finite gradients and signals stop a run in the promised way; a batch without labels does not."""

from __future__ import annotations

import signal

import pytest
import torch

from keye_train.sample import SampleRef
from keye_train.settings import NonFiniteSettings
from keye_train.training.guards import NonFiniteError, NonFiniteGuard, StopRequest, exit_code
from keye_train.training.learner import seed_step, weighted_sum

REFS = [SampleRef("images", "a.tar", "000001")]


def test_refused_updates_stop_the_run_only_in_a_row_and_name_the_samples() -> None:
    guard = NonFiniteGuard(NonFiniteSettings(max_in_a_row=3))
    for step in range(9):
        guard.observe(step % 3 == 0, step, REFS)
    guard.observe(True, 9, REFS)
    guard.observe(False, 10, REFS)
    guard.observe(False, 11, REFS)
    with pytest.raises(NonFiniteError, match=r"max_in_a_row=3.*000001 in a\.tar"):
        guard.observe(False, 12, REFS)
    assert guard.total == 9


def test_refused_updates_stop_the_run_at_their_total_where_the_recipe_says_so() -> None:
    guard = NonFiniteGuard(NonFiniteSettings(max_total=4), total=2)
    guard.observe(False, 1, REFS)
    guard.observe(True, 2, REFS)
    with pytest.raises(NonFiniteError, match="max_total=4"):
        guard.observe(False, 3, REFS)


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
        assert request.as_flags() == (0, 0, 0)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, handed on by torchrun
        assert request.as_flags() == (0, 0, 1)
    assert signal.getsignal(signal.SIGINT) is before
    with StopRequest() as request:
        signal.raise_signal(signal.SIGUSR1)
        assert StopRequest.from_flags(request.as_flags()) == signal.SIGUSR1
    assert StopRequest.from_flags((0, 0, 2)) == signal.SIGINT
    assert StopRequest.from_flags((1, 1, 1)) == signal.SIGTERM
    assert StopRequest.from_flags((0, 0, 0)) == 0
    assert [exit_code(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == [130, 143, 138]


def test_random_numbers_of_a_step_do_not_depend_on_the_past() -> None:
    drawn = []
    for noise in (0, 7):
        torch.rand(noise)
        seed_step(3, 11, rank=1)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    seed_step(3, 11, rank=0)
    assert not torch.equal(torch.rand(4), drawn[0])
