"""Promises: what a forward keeps is counted on the model itself; the forecast of memory is what a step takes; a run
that cannot fit is refused, and what is offered instead fits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from copy import deepcopy
from itertools import islice
from pathlib import Path

import pytest
from corpus import ToyCorpus
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import MODEL
from keye_train import compose
from keye_train.data.cost import training_cost
from keye_train.data.plan import Plan
from keye_train.forecast import activations as counting
from keye_train.forecast import forecast, problems, remedies
from keye_train.forecast.activations import PackShape, trace
from keye_train.forecast.memory import GB, DeviceMemory, device_memory
from keye_train.forecast.parameters import ParameterCounts, parameter_counts
from keye_train.forecast.workload import PLANNED_BATCHES
from keye_train.settings import ActivationCheckpointing, ForecastSettings

FULL, NONE = ActivationCheckpointing.full, ActivationCheckpointing.none


def settings(*overrides: str) -> ForecastSettings:
    return compose.load_settings(ForecastSettings, "forecast", [*MODEL, "cluster=laptop", *overrides])


@pytest.mark.parametrize("stage", ["2_multitask", "1_align"])
def test_layers_and_packs_of_any_size_follow_from_four_small_forwards(stage: str) -> None:
    recipe = settings(f"stage={stage}", "deepspeed=cpu")
    model = counting._working_model(recipe)
    pack = PackShape(896, 640, 300)
    whole = counting._kept_by_layer(model, counting._packed(896, 640, 300), contrastive=False)
    expected = sum(size for name, size in whole.items() if not name.startswith("#"))
    assert trace(recipe).kept(pack, NONE) == pytest.approx(expected, rel=1e-9)


def test_a_frozen_tower_keeps_nothing_and_checkpoints_keep_the_inputs_of_layers() -> None:
    pack = PackShape(1024, 1024, 100)
    frozen = {tower.name: tower for tower in trace(settings("stage=1_align")).towers}
    assert frozen["vision"].kept(pack) == 0  # below everything that learns
    learning = {tower.name: tower for tower in trace(settings("stage=2_multitask")).towers}
    assert learning["language"].stays(pack, FULL) == 1024 * 512 * 2  # bf16
    assert learning["vision"].stays(pack, FULL) == 1024 * 384 * 2


@pytest.mark.parametrize("caption_weight", [0, 1])
def test_stage_0_has_its_own_towers(caption_weight: int) -> None:
    trained = "[vision,caption_decoder]" if caption_weight else "[vision]"
    recipe = settings("stage=0_vision", f"stage.caption_weight={caption_weight}", f"stage.trainable={trained}")
    names = {tower.name for tower in trace(recipe).towers}
    assert names == {"vision", "text"} | ({"decoder"} if caption_weight else set())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "zero", "checkpointing"),
    [("2_multitask", 0, "full"), ("2_multitask", 1, "none"), ("2_multitask", 2, "none"), ("1_align", 2, "none")],
)
def test_one_step_takes_the_memory_that_is_forecast(stage: str, zero: int, checkpointing: str) -> None:
    command = [sys.executable, "-m", "benchmarks.memory", stage, str(zero), "fp32", checkpointing]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert abs(json.loads(done.stdout.splitlines()[-1])["error, %"]) <= 10


def test_what_does_not_fit_is_refused_and_what_is_offered_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MODEL, "stage=2_multitask", "stage.activation_checkpointing=none", "cluster=h100", "deepspeed=zero2"]
    words += ["cluster.device_memory_gb=0.6", "cluster.reserved_gb=0.1", "stage.global_batch_packs=64"]
    recipe = compose.load_settings(ForecastSettings, "forecast", words)
    found = forecast(recipe)
    wrong = problems(found, recipe.cluster)
    assert len(wrong) == 1
    assert "cluster.device_memory_gb=0.6" in wrong[0]
    offered = remedies(recipe, found)
    assert "stage.activation_checkpointing=full" in [change.overrides for change in offered]
    for change in offered:
        better = compose.load_settings(ForecastSettings, "forecast", [*words, *change.overrides.split()])
        assert problems(forecast(better), better.cluster) == []

    from keye_train.cli.plan import main

    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 3
    assert "would fit:" in capsys.readouterr().out


def test_a_copy_for_the_checkpoint_counts_on_the_host() -> None:
    recipe = settings("stage=2_multitask", "cluster.host_memory_gb=0.5")
    found = forecast(recipe)
    assert found.host.checkpoint == 12 * found.counts.learning
    assert problems(found, recipe.cluster)
    assert "checkpoint.background=false" in [change.overrides for change in remedies(recipe, found)]


def test_zero_stages_and_ranks_share_the_state_as_they_should() -> None:
    base = settings("stage=2_multitask", "cluster=h100", "cluster.ranks_per_node=4", "stage.global_batch_packs=64")
    parts = {}
    for zero in (1, 2, 3):
        changed = deepcopy(base)
        changed.deepspeed.zero_stage = zero
        found = forecast(changed)
        parts[zero] = found.device
    counts = found.counts
    assert parts[1].gradients == 4 * counts.learning
    assert parts[2].gradients == counts.learning  # of four ranks
    assert parts[2].weights == 2 * counts.total + counts.learning
    assert parts[3].weights == counts.total / 2 + counts.learning
    assert {part.optimizer for part in parts.values()} == {2 * counts.learning}


def test_a_later_micro_batch_has_its_gradients_beside_the_sum_where_deepspeed_keeps_both() -> None:
    def parts(precision: str) -> list[DeviceMemory]:
        recipe = settings("stage=2_multitask", "deepspeed=zero2", f"deepspeed.precision={precision}")
        counts, traced, pack = parameter_counts(recipe), trace(recipe), PackShape(8192, 8192, 1024)
        return [device_memory(recipe, counts, traced, pack, 1, micro_steps) for micro_steps in (1, 2)]

    single, later = parts("fp32")
    learning = later.gradients
    assert learning == 4 * parameter_counts(settings("stage=2_multitask")).learning
    assert (single.gradients, single.reduced, later.reduced) == (0, learning, learning)
    assert parts("bf16")[1].gradients == learning
    assert parts("bf16")[1].reduced < learning / 2  # one matrix, cast


@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4), st.integers(1, 9))
def test_a_partition_holds_whole_what_it_holds_in_part(groups: list[list[int]], ranks: int) -> None:
    held = [0] * ranks
    for sizes in groups:
        length = math.ceil(sum(sizes) / ranks)
        owners = [element // length for element in range(sum(sizes))]
        for index, size in enumerate(sizes):
            start = sum(sizes[:index])
            for rank in set(owners[start : start + size]):
                held[rank] += size
    counts = ParameterCounts(sum(map(sum, groups)), 1, 1, tuple(map(tuple, groups)))
    assert counts.whole_in_partition(ranks) == max(held)
    assert counts.whole_in_partition(1) == counts.learning


def test_what_is_frozen_has_no_gradient() -> None:
    recipe = settings("stage=1_align", "deepspeed=zero2", "deepspeed.precision=fp32")
    counts = parameter_counts(recipe)
    assert counts.largest_learning == 1536**2  # of the projector; the tower's table of positions is larger
    pack = PackShape(64, 64, 8)
    found = device_memory(recipe, counts, trace(recipe), pack, 1, 2)
    everything = found.total - found.weights - found.optimizer - found.buckets
    assert everything < 2 * 4 * (counts.learning + counts.largest_learning)


def test_without_activations_the_update_is_the_peak() -> None:
    """At stage 0 DeepSpeed reduces all gradients through one flat copy."""
    recipe = settings("stage=2_multitask", "deepspeed=cpu", "stage.activation_checkpointing=full")
    counts = parameter_counts(recipe)
    found = device_memory(recipe, counts, trace(recipe), PackShape(64, 64, 8), 1, 2)
    assert (found.gradients, found.reduced) == (4 * counts.learning, 4 * counts.learning)
    assert found.total == 4 * counts.total + 16 * counts.learning


def test_steps_are_those_of_the_plan_where_shards_are_indexed(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    words = toy_corpus.overrides("2_multitask", tmp_path / "run", "cluster=laptop")
    recipe = compose.load_settings(ForecastSettings, "forecast", words, str(toy_corpus.recipes))
    found = forecast(recipe).step
    plan = Plan.from_settings(recipe, training_cost(recipe))
    batches = [batch for batch, _ in islice(plan.batches(), PLANNED_BATCHES)]
    packs = [pack for batch in batches for pack in batch.packs]
    assert found.tokens * len(batches) == sum(pack.tokens for pack in packs)
    assert found.patches * len(batches) == sum(pack.patches for pack in packs)
    assert found.samples * len(batches) == sum(len(pack.samples) for pack in packs)
    assert found.flops * len(batches) > sum(pack.cost for pack in packs)  # and the output matrix
    assert found.shard_bytes is not None
    assert "plan" in found.origin


def test_the_published_model_is_forecast_on_no_more_than_this_machine() -> None:
    words = ["model=keye_8b", "data=keye_example", "model.tokenizer=none", "model.start.random=true", "cluster=h100"]
    recipe = compose.load_settings(ForecastSettings, "forecast", [*words, "stage=2_multitask", "cluster.nodes=16"])
    found = forecast(recipe)
    assert found.counts.total == 8_696_828_736  # shared with the golden list of keys
    assert found.checkpoint_bytes == 12 * found.counts.learning
    assert 20 * GB < found.device.total < 60 * GB
    assert problems(found, recipe.cluster) == []
