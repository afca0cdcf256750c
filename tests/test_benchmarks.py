"""What the benchmarks say rests on: both sides of a comparison learn the same, and forecasts are what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import merge, model_step, padded_trainer
from benchmarks.samples import MIX, draw_samples, into_packs
from benchmarks.step_cases import CPU_CASES, Case, forecast, saved_bytes, step_flops
from keye_train.data.packing import Budget
from keye_train.model import IGNORE_INDEX, KeyeForConditionalGeneration, enable_activation_checkpointing, keye_config
from keye_train.model.flops import pack_flops

PLAIN, RECOMPUTED = (next(c for c in CPU_CASES if c.checkpointing is recomputed) for recomputed in (False, True))


@pytest.mark.parametrize("mix", padded_trainer.MIXES)
def test_padded_and_packed_have_the_same_loss(mix: str) -> None:
    settings = PLAIN.settings()
    torch.manual_seed(0)
    model = KeyeForConditionalGeneration(keye_config(settings.model))
    samples = draw_samples(settings.model, 6, 1.0, 128, 0, padded_trainer.MIXES[mix])
    assert padded_trainer.same_loss(model, settings, samples) < padded_trainer.LOSS_TOLERANCE


def test_packs_hold_every_sample_once_within_the_budget() -> None:
    model, budget = PLAIN.settings().model, Budget(256, 700)
    samples = draw_samples(model, 40, 1 / 32, 128, 3)
    packs = into_packs(samples, budget)
    assert sorted(id(sample) for pack in packs for sample in pack) == sorted(id(sample) for sample in samples)
    for pack in packs:
        assert sum(len(sample.input_ids) for sample in pack) <= budget.max_tokens
        assert sum(len(sample.pixel_patches) for sample in pack) <= budget.max_patches
    assert {sample.task for sample in samples} == set(MIX)
    assert all((sample.labels != IGNORE_INDEX).any() for sample in samples)


@pytest.mark.parametrize("case", [PLAIN, RECOMPUTED])
def test_forecast_of_activations_is_what_a_forward_keeps(case: Case) -> None:
    model = KeyeForConditionalGeneration(keye_config(case.settings().model))
    if case.checkpointing:
        enable_activation_checkpointing(model)
    kept = max(saved_bytes(model, pack) for pack in case.inputs())
    expected = forecast(case)
    if case.checkpointing:  # the backward adds one layer, which the forward does not show
        assert kept < expected.activation_bytes < 3 * kept
    else:
        assert kept == pytest.approx(expected.activation_bytes, rel=0.1)


def test_a_step_costs_three_forwards_but_for_the_pixels() -> None:
    config = keye_config(PLAIN.settings().model)
    forward = sum(
        pack_flops(config, pack.cu_seqlens.diff().tolist(), pack.vision.cu_seqlens.diff().tolist(), len(pack.loss_rows))
        for pack in PLAIN.inputs()
    )
    assert 0.97 * 3 * forward < step_flops(PLAIN) < 3 * forward


def test_the_plan_needs_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    model_step.main(["--plan", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert printed.count("model tiny") == len(CPU_CASES)
    assert f"tokens {forecast(PLAIN).tokens}" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_measuring_a_device_that_is_absent_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        model_step.main(["--device", "cuda"])
    assert "--plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--rounds", "1"], "--rounds"), (["--device", "cpu", "--plan", "--memory-gib", "80"], "--memory-gib")],
)
def test_options_that_cannot_hold_are_refused_at_once(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after the first case has been measured."""
    with pytest.raises(SystemExit):
        model_step.main(options)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [(["measure"], "needs --folder"), (["--turns", "0"], "--turns"), (["--gb", "1e9"], "choose a smaller --gb")],
)
def test_a_merge_that_cannot_be_measured_writes_nothing(
    options: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merge, "FOLDER", tmp_path / "benchmark")  # one may be running here
    with pytest.raises(SystemExit):
        merge.main(options)
    assert named in capsys.readouterr().err
    assert not merge.FOLDER.exists()
