"""Learning rate over the steps: a pure function, so that resuming needs no state."""

from __future__ import annotations

import math

from keye_train.settings import ScheduleShape, StageSettings


def factor(step: int, stage: StageSettings) -> float:
    """Factor on every group's own learning rate for optimizer step ``step`` (0 .. stage.steps - 1).

    The warm-up is linear and ends at 1 with step ``warmup_steps - 1``; its first step is not 0, so that no batch is
    wasted. Cosine falls to ``final_fraction`` at the last step. WSD stays at 1 and falls linearly over the last
    ``decay_steps`` steps, reaching ``final_fraction`` at the last one (MiniCPM, arXiv 2404.06395, section 4.2).
    """
    schedule = stage.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.shape == ScheduleShape.constant:
        return 1.0
    if schedule.shape == ScheduleShape.wsd:
        done = max(0, step - (stage.steps - schedule.decay_steps) + 1) / schedule.decay_steps
        return 1.0 - (1.0 - schedule.final_fraction) * min(1.0, done)
    last = stage.steps - 1
    done = (step - schedule.warmup_steps) / max(1, last - schedule.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * cosine
