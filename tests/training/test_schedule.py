"""The learning rate follows the recipe, and only the step."""

from __future__ import annotations

import pytest
from toy import stage

from keye_train.settings import ScheduleShape
from keye_train.training.schedule import factor


def test_warm_up_is_linear_wastes_no_step_and_ends_at_one() -> None:
    recipe = stage(10, shape=ScheduleShape.constant, warmup_steps=4)
    assert [factor(step, recipe) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_one_and_ends_at_the_floor() -> None:
    recipe = stage(11, shape=ScheduleShape.cosine, final_fraction=0.2)
    values = [factor(step, recipe) for step in range(11)]
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert values[10] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


def test_wsd_stays_then_falls_linearly_to_the_floor() -> None:
    recipe = stage(10, shape=ScheduleShape.wsd, warmup_steps=2, decay_steps=4, final_fraction=0.0)
    assert [factor(step, recipe) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("shape", list(ScheduleShape))
def test_a_run_of_one_step_has_a_rate(shape: ScheduleShape) -> None:
    recipe = stage(1, shape=shape, decay_steps=1 if shape == ScheduleShape.wsd else 0, final_fraction=0.5)
    assert 0 < factor(0, recipe) <= 1
