"""Promise: the real trainer under ZeRO-3 on four ranks, whatever each of them holds in a micro-step, neither hangs nor
trains another model than one process does: text, pictures and clips side by side, and one rank alone with pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
from corpus import ToyCorpus
from safetensors.torch import load_file

from keye_train import runs
from keye_train.training.recorder import read_flight
from keye_train.training.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STAGE = "2_multitask"
WORLD_SIZE, STEPS = 4, 8
# One sample fills a pack and one pack a rank's step, so that the draw decides who has pixels.
MIXED = (
    f"stage.steps={STEPS}",
    f"stage.global_batch_packs={WORLD_SIZE}",
    "stage.max_tokens=50",
    "stage.optimizer.module_lr.vision=1e-3",
    "logging.every_steps=1",
    *(f"data.mixtures.multitask.{name}={share}" for name, share in (("text", 0.65), ("images", 0.2), ("clips", 0.15))),
    "data.mixtures.multitask.pairs=0.0",
)
# With the tower alone, a rank without pixels has nothing of its own to learn from.
PATTERNS = {
    "all": ("stage.trainable=[vision,projector,language]", "stage.activation_checkpointing=full"),
    "tower": ("stage.trainable=[vision]",),
}


@pytest.fixture(scope="module", params=PATTERNS)
def pair(
    request: pytest.FixtureRequest, toy_corpus: ToyCorpus, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same run on one rank without ZeRO and on four with ZeRO-3."""
    alone, four = (tmp_path_factory.mktemp("four") / name for name in ("alone", "four"))
    more = (*MIXED, *PATTERNS[request.param])
    assert train(toy_corpus.settings(STAGE, alone, *more, "deepspeed.zero_stage=0")) == 0
    words = toy_corpus.command(["-m"], STAGE, four, *more, "deepspeed.zero_stage=3")
    ranks.forked(WORLD_SIZE, words, timeout_s=600)
    return alone, four


def sources_by_step(run_dir: Path) -> list[list[set[str]]]:
    """Of every micro-step what each rank trained on, as the flight recorders of the ranks have it."""
    flights = [read_flight(run_dir, rank) for rank in range(WORLD_SIZE)]
    return [
        [{source for source, _, _ in pack["samples"]} for pack in micro_step]
        for rows in zip(*flights, strict=True)
        for micro_step in zip(*(row["packs"] for row in rows), strict=True)
    ]


def test_four_ranks_train_what_one_does(pair: tuple[Path, Path]) -> None:
    alone, four = pair
    assert (four / runs.TRAINED).read_bytes() == (alone / runs.TRAINED).read_bytes()  # digests of samples
    rows, reference = (runs.read_jsonl(run_dir / runs.METRICS) for run_dir in (four, alone))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for ours, expected in zip(rows, reference, strict=True):
        assert ours["applied"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)
    ours, expected = (load_file(run_dir / runs.EXPORT / "model.safetensors") for run_dir in (four, alone))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-4 * tensor.numel() ** 0.5, name


def test_the_run_held_what_it_is_to_defend(pair: tuple[Path, Path]) -> None:
    """Else the comparison above would prove nothing."""
    steps = sources_by_step(pair[1])
    assert len(steps) == STEPS
    pixels = [sum(bool(sources & {"images", "clips"}) for sources in held) for held in steps]
    alone = [held for held, count in zip(steps, pixels, strict=True) if count == 1]
    for lonely in ("images", "clips"):
        assert any({lonely} in held for held in alone), lonely
    assert any(all({source} in held for source in ("text", "images", "clips")) for held in steps)
