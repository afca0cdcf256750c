"""Promises: the forecast of time counts what is computed and sent, once; by hand on round numbers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest

from benchmarks.memory import MODEL
from keye_train import compose
from keye_train.forecast.activations import Activations, Linear, PackShape
from keye_train.forecast.forecast import _forecast
from keye_train.forecast.gradients import Moment, gradient_memory
from keye_train.forecast.memory import GB, host_memory
from keye_train.forecast.parameters import ParameterCounts
from keye_train.forecast.speed import StepTime, step_time
from keye_train.forecast.workload import Workload, assumed
from keye_train.model import keye_config
from keye_train.model.flops import FlopCoefficients
from keye_train.settings import ActivationCheckpointing, ForecastSettings, Precision

LEARNING, FROZEN, MICRO_STEPS = 9_000_000_000, 1_000_000_000, 4
COUNTS = ParameterCounts(LEARNING + FROZEN, LEARNING + FROZEN, 10**8, ((LEARNING,),))
STEP = Workload("by hand", 1, 1, 1, None, 8e15, 0.0, 1.0, PackShape(1, 1, 1))
CLUSTER = (
    "model.text_tower.max_tokens=64",
    "model.vision.image_size=384",
    "cluster.nodes=3",
    "cluster.ranks_per_node=3",
    "cluster.host_link_gb_per_s=5",
    "cluster.host_memory_gb_per_s=60",
    "stage.global_batch_packs=36",
    "cluster.node_gb_per_s=100",
    "cluster.network_gb_per_s=10",
    "cluster.peak_tflops=100",
    "cluster.efficiency=0.5",
    "cluster.overlap=0.75",
)


@cache
def composed(stage: str = "2_multitask") -> ForecastSettings:
    return compose.load_settings(ForecastSettings, "forecast", [*MODEL, f"stage={stage}", *CLUSTER])


def settings(stage: str = "2_multitask", **deepspeed: object) -> ForecastSettings:
    """Composing takes half a second, and the tests ask for many."""
    recipe = deepcopy(composed(stage))
    vars(recipe.deepspeed).update(deepspeed)
    return recipe


def timed(ranks: tuple[int, int] = (3, 3), **deepspeed: object) -> StepTime:
    recipe = settings(**deepspeed)
    recipe.cluster.nodes, recipe.cluster.ranks_per_node = ranks
    return step_time(recipe, COUNTS, STEP, recipe.cluster, MICRO_STEPS)


@pytest.mark.parametrize(
    ("zero", "beside", "behind"),
    # GB that a rank of 9 sends: reductions of stages 1 and 2 are all-reduces, in 16 bits.
    # Stage 1 with bf16 reduces behind the last backward.
    [(1, 2 * 2 * 9, 2 * 9), (2, 2 * 2 * 9 * 4, 2 * 9), (3, (2 * 2 * 10 + 2 * 9) * 4, 0)],
)
def test_what_a_rank_sends(zero: int, beside: float, behind: float) -> None:
    rate = 30 * 9 / 8  # a node has three ports; of a ring each rank sends 8 of 9 parts
    bare = timed(zero_stage=zero, overlap_comm=False)
    assert bare.exposed_s == pytest.approx((beside + behind) / rate)
    hidden = timed(zero_stage=zero, overlap_comm=True)
    compute_s = 8e15 / (9 * 50e12)
    longest_s = {1: 0, 2: compute_s * 2 / 3, 3: compute_s}[zero]
    assert hidden.exposed_s == pytest.approx(bare.exposed_s - min(0.75 * beside / rate, longest_s))
    assert hidden.compute_s == pytest.approx(compute_s)
    assert hidden.mfu == pytest.approx(8e15 / (9 * 100e12 * hidden.total_s))


def test_stage_0_reduces_in_float32_behind_the_backward() -> None:
    assert timed(zero_stage=0, precision=Precision.fp32, overlap_comm=True).exposed_s == pytest.approx(
        8 * 9 * 8 / 9 / 30
    )


def test_stage_1_reduces_beside_its_last_backward() -> None:
    bare, hidden = (timed(zero_stage=1, precision=Precision.fp32, overlap_comm=on) for on in (False, True))
    assert bare.exposed_s - hidden.exposed_s == pytest.approx(min(0.75 * 72 * 8 / 9 / 30, 8e15 / 9 / 50e12 * 2 / 3 / 4))


def test_one_node_has_no_network_and_one_rank_sends_nothing() -> None:
    node, alone = (timed(ranks, overlap_comm=False, zero_stage=2) for ranks in ((1, 3), (1, 1)))
    assert node.exposed_s == pytest.approx((2 * 2 * 9 * 4 + 2 * 9) * 2 / 3 / 100)
    assert alone.exposed_s == 0


def test_what_is_offloaded_goes_over_the_link_and_through_the_memory_of_the_host() -> None:
    offload = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    near, far = timed(zero_stage=3), timed(**offload)
    moved = (4 * (2 * 4 - 1) + 2) * 1 + 2 * 2 * 4 * 10 / 9  # a rank's 1 of 9 GB that learn; all weights
    assert far.exposed_s - near.exposed_s == pytest.approx(moved / 5)
    assert far.optimizer_s == pytest.approx(36 / (60 / 3))
    offloaded = host_memory(settings(**offload), COUNTS, 9, 3).offloaded
    assert offloaded == pytest.approx(3 * (20 * 1 + 2 * 10 / 9) * GB)
    on_disk = host_memory(settings(**offload, nvme_path="/nvme"), COUNTS, 9, 3).offloaded
    assert on_disk == pytest.approx(3 * 20 * GB)


def test_an_update_at_stage_3_copies_a_billion_elements_of_a_rank_at_most() -> None:
    recipe = settings(zero_stage=3)
    copied = [gradient_memory(Moment.update, recipe, COUNTS, ranks, 1).reduced for ranks in (1, 9, 18)]
    one_matrix = replace(COUNTS, groups=((10**8,) * 90,))
    assert gradient_memory(Moment.update, recipe, one_matrix, 9, 1).reduced == 4e9
    assert copied == [8.0 * LEARNING, 8.0 * LEARNING / 9, 8.0 * LEARNING / 18]  # the norm of that one matrix


def test_stage_1_in_16_bits_reduces_whole_groups() -> None:
    """DeepSpeed copies those that it reduces together, and casts the copy."""
    recipe = settings(zero_stage=1)
    groups = ((3 * 10**8,), (10**8,), (4 * 10**9,), (10**9,))
    counts = replace(COUNTS, groups=groups)
    learning = sum(map(sum, groups))
    found = gradient_memory(Moment.update, recipe, counts, 9, 1)
    assert (found.summed, found.reduced) == (4 * learning, 2 * learning + 6 * (3 * 10**8 + 10**8 + 4 * 10**9))
    kept = [gradient_memory(Moment.layers, recipe, counts, 9, steps).reduced for steps in (1, 2)]
    assert kept == [0, 2 * learning]


def test_only_layers_that_a_gradient_passes_through_are_computed_again() -> None:
    def recomputed(checkpointing: str, stage: str = "2_multitask") -> Workload:
        recipe = settings(stage)
        recipe.stage.activation_checkpointing = ActivationCheckpointing(checkpointing)
        return assumed(recipe, "no index")

    full = recomputed("full")
    forward = FlopCoefficients.of(keye_config(settings().model))
    rest = full.patches * (3 * forward.projector_patch + 2 * forward.pixel_patch)
    rest += 3 * forward.labelled_token * (full.tokens - full.patches / 4)
    assert 3 * full.recomputed + rest == pytest.approx(full.flops)
    assert recomputed("none").recomputed == 0
    selective = recomputed("selective").recomputed
    assert selective == pytest.approx(full.tokens * forward.language_token + full.patches * forward.tower_patch)
    align = recomputed("selective", "1_align")
    assert align.recomputed == pytest.approx(align.tokens * forward.language_token)


def test_packs_of_stage_0_are_of_pairs() -> None:
    recipe = settings("0_vision")
    recipe.stage.max_tokens = recipe.stage.max_patches = 65_536
    found = assumed(recipe, "no index")
    pairs = 65_536 // 27**2  # the patches are full first
    assert (found.samples, found.tokens, found.patches) == (36 * pairs, 36 * pairs * 64, 36 * pairs * 27**2)


def test_a_checkpoint_holds_up_what_the_steps_until_the_next_one_do_not_hide() -> None:
    recipe = settings(zero_stage=3)
    recipe.stage.steps = 100
    counts = replace(COUNTS, groups=((10**9,),))
    kept = Linear(0.0, 0.0, 0.0, 0.0)
    for every, background in ((100, False), (10, True), (100, True)):
        recipe.checkpoint.every_steps, recipe.checkpoint.background = every, background
        found = _forecast(recipe, recipe.cluster, counts, Activations((), kept), STEP)
        assert found.checkpoint_s == pytest.approx(12 / recipe.cluster.storage_gb_per_s)
        step_s = found.time.total_s
        hidden_s = every * step_s if background else 0.0
        assert found.held_up_s == pytest.approx(max(0.0, found.checkpoint_s - hidden_s))
        assert found.run_s == pytest.approx(100 * step_s + 100 / every * found.held_up_s)
