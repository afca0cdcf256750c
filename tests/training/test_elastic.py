"""Promise: a run may change its number of ranks and its ZeRO stage at any start; every step keeps its samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import ranks
from corpus import ToyCorpus

from keye_train import runs
from keye_train.checkpoints import newest_first

STAGE = "2_multitask"
STEPS = 8
EVERY_STEP = (f"stage.steps={STEPS}", "checkpoint.every_steps=1", "checkpoint.mark_every_steps=1")


def go_back(run_dir: Path, step: int) -> None:
    """As if the run had ended behind ``step``."""
    for export in run_dir.glob("export*"):
        shutil.rmtree(export)
    for newer, folder in newest_first(run_dir / runs.CHECKPOINTS):
        if newer > step:
            shutil.rmtree(folder)
    manifest = runs.read_json(run_dir / runs.MANIFEST)
    runs.write_json_atomic(run_dir / runs.MANIFEST, manifest | {"status": "running"})


@pytest.mark.slow
def test_one_two_four_ranks_and_one_again(toy_corpus: ToyCorpus, tmp_path: Path) -> None:
    constant, changing = tmp_path / "constant", tmp_path / "changing"

    def launch(run_dir: Path, world_size: int, zero_stage: int) -> None:
        more = (*EVERY_STEP, f"deepspeed.zero_stage={zero_stage}")
        ranks.forked(world_size, toy_corpus.command(["-m"], STAGE, run_dir, *more), timeout_s=280)

    launch(constant, 1, 3)
    shutil.copytree(constant, changing)
    for step, world_size, zero_stage in ((2, 2, 1), (4, 4, 2), (6, 1, 0)):
        go_back(changing, step)
        launch(changing, world_size, zero_stage)
        assert (changing / runs.TRAINED).read_bytes() == (constant / runs.TRAINED).read_bytes()  # digests of samples
        losses = [[row["loss"] for row in runs.read_jsonl(run / runs.METRICS)] for run in (changing, constant)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
