"""Held-out losses during a run are those of the model it has at that time."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import ToyCorpus

from keye_train import runs
from keye_train.data.heldout import Skipped, drawn_rows, read_rows
from keye_train.evaluation.loss import heldout_loss
from keye_train.model.pretrained import load_export
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import SettingsError
from keye_train.training.trainer import train

SHORT = ("stage.steps=3", "stage.schedule.warmup_steps=0", "evaluation.every_steps=2", "evaluation.max_samples=9")


def test_the_last_losses_are_those_of_the_export(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    settings = toy_corpus.settings("1_align", tmp_path, *SHORT, "evaluation.sets=[images,text]")
    assert train(settings) == 0
    rows = runs.read_jsonl(tmp_path / runs.METRICS)
    assert [row["step"] for row in rows if "heldout_loss" in row] == [2, 3]
    model = load_export(tmp_path / runs.EXPORT)
    encoder = SampleEncoder.from_settings(settings.model, settings.data.resolution)
    for name in ("images", "text"):
        chosen = drawn_rows(settings.data.heldout[name], 9, settings.seed, name)
        assert len(chosen) == 9
        encoded = [one for one in read_rows(chosen, name, encoder.encode) if not isinstance(one, Skipped)]
        total, tokens = heldout_loss(model, encoded, settings.model)
        assert rows[-1]["heldout_loss"][name] == pytest.approx(total / tokens, rel=1e-5)


def test_stage_0_matches_held_out_pairs(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    recipe = toy_corpus.settings("0_vision", tmp_path / "a", "stage.max_tokens=48", *SHORT)
    assert train(recipe) == 0
    assert train(toy_corpus.settings("0_vision", tmp_path / "b", "stage.max_tokens=48", *SHORT[:2])) == 0
    with_it, without = (runs.read_jsonl(tmp_path / name / runs.METRICS) for name in "ab")
    assert [row["loss"] for row in with_it] == [row["loss"] for row in without]
    assert set(with_it[-1]["heldout_loss"]) == {"pairs"}
    assert 0 <= with_it[-1]["heldout_retrieval_accuracy"] <= 1
    assert "heldout_loss" not in without[-1]


@pytest.mark.parametrize(
    ("stage", "more", "expected"),
    [
        ("1_align", ("evaluation.sets=[moon]",), r"'moon' is not in data\.heldout; sets: \['clips'"),
        ("1_align", ("evaluation.every_steps=0", "evaluation.sets=[text]"), "no effect with evaluation.every_steps=0"),
        ("1_align", ("evaluation.sets=[]",), "no held-out set"),
        ("0_vision", ("evaluation.sets=[text]",), "no effect in Stage 0"),
        ("0_vision", ("data.heldout_pairs=null",), r"no data\.heldout_pairs"),
        ("1_align", ("evaluation.max_samples=0",), r"evaluation\.max_samples at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    toy_corpus: ToyCorpus, tmp_path: Path, stage: str, more: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(SettingsError, match=expected):
        toy_corpus.settings(stage, tmp_path, *SHORT, *more)


def test_a_set_of_which_nothing_fits_is_named(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    recipe = toy_corpus.settings("1_align", tmp_path, *SHORT, "evaluation.sets=[images]", "stage.max_patches=4")
    recipe.data.mixtures["align"] = {"text": 1.0}
    with pytest.raises(SettingsError, match=r"held-out samples of 'images' can be used"):
        train(recipe)
