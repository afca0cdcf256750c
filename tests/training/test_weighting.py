"""A weighted loss is one number of the global batch: no split over ranks and micro-steps changes it or its gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
from corpus import ToyCorpus
from safetensors.torch import load_file

from keye_train import runs
from keye_train.settings import SettingsError
from keye_train.training.trainer import train

STAGE = "2_multitask"
SQUARE = ("stage.loss_weighting=square", "stage.steps=2", "stage.optimizer.ema_decay=0.5")


def rows(run_dir: Path) -> list[dict]:
    return runs.read_jsonl(run_dir / runs.METRICS)


@pytest.fixture(scope="module")
def one_rank(toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("weighting") / "1x4"
    assert train(toy_corpus.settings(STAGE, run_dir, *SQUARE, "deepspeed.zero_stage=0")) == 0
    return run_dir


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 1), (2, 2), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_every_split_gives_the_same_losses_and_gradients(
    toy_corpus: ToyCorpus, one_rank: Path, tmp_path: Path, world_size: int, zero_stage: int
) -> None:
    more = (*SQUARE, f"deepspeed.zero_stage={zero_stage}")
    if world_size == 1:
        assert train(toy_corpus.settings(STAGE, tmp_path, *more)) == 0
    else:
        ranks.forked(world_size, toy_corpus.command(["-m"], STAGE, tmp_path, *more))
    for figure in ("loss", "token_loss", "grad_norm"):
        ours, reference = ([row[figure] for row in rows(folder)] for folder in (tmp_path, one_rank))
        assert ours == pytest.approx(reference, rel=1e-5), figure
    ours, reference = (load_file(folder / runs.EXPORT_EMA / "model.safetensors") for folder in (tmp_path, one_rank))
    assert not torch.equal(
        ours["lm_head.weight"], load_file(tmp_path / runs.EXPORT / "model.safetensors")["lm_head.weight"]
    )
    for name, expected in reference.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-3)


def test_weights_change_the_loss_and_not_what_is_counted(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    # A seed whose first batch has samples of unlike loss and length: the weightings are 3e-4 apart there.
    more = ("deepspeed.zero_stage=0", "stage.steps=2", "stage.schedule.decay_steps=1", "seed=3")
    for name, weighting in (("plain", ()), ("square", SQUARE)):
        assert train(toy_corpus.settings(STAGE, tmp_path / name, *more, *weighting)) == 0
    plain, square = rows(tmp_path / "plain")[0], rows(tmp_path / "square")[0]
    assert "token_loss" not in plain
    assert square["token_loss"] == pytest.approx(plain["loss"], rel=1e-6)  # same weights, same batch
    assert square["loss"] != pytest.approx(plain["loss"], rel=1e-4)
    assert square["labelled_tokens"] == plain["labelled_tokens"]


def test_a_weighting_without_effect_is_refused(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"stage\.loss_weighting=square has no effect with objective=contrastive"):
        toy_corpus.settings("0_vision", tmp_path, "stage.loss_weighting=square")
