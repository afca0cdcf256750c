"""Each stage still computes what it did: a change without effect on the computation gives the recorded curves."""

from __future__ import annotations

import json

import pytest
from corpus import ToyCorpus
from record_curves import GOLDEN, STAGES, STEPS, train_stages

TOLERANCE = 1e-4
"""Relative. One build of torch on one processor gives the very same numbers; other vector units round differently, and
Adam turns rounding of a gradient near zero into a step: five steps later losses differ by about 1e-6, norms by 1e-5."""


@pytest.fixture(scope="module")
def curves(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    return train_stages(toy_corpus, tmp_path_factory.mktemp("curves"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_curve_is_the_recorded_one(curves: dict[str, list[dict]], stage: str) -> None:
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))["stages"][stage]
    assert len(recorded) == STEPS
    for number, (now, then) in enumerate(zip(curves[stage], recorded, strict=True), 1):
        for figure, expected in then.items():
            assert now[figure] == pytest.approx(expected, rel=TOLERANCE), (
                f"{stage}, step {number}: {figure} is not the recorded one. If the change is meant to alter what is "
                "computed, record the curves anew: python -m tests.training.record_curves"
            )
