"""``python -m benchmarks.checkpoint``: how long a checkpoint holds up the training, and how long it is written.

A real engine (ZeRO-3, AdamW) trains a stack of matrices on one and on two processes and saves four times; the first
save is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import Result

WIDTH, LAYERS, SAVES, ROWS = 2048, 8, 4, 64
ABOUT = f"""
Stall: time that the training waits for a save. Write: from the copy to the rename, with SHA-256 and fsync, while the
training goes on. {WIDTH * WIDTH * LAYERS / 1e6:.0f} M trained parameters: weights and two moments in fp32. Medians of
{SAVES - 1} saves of the slowest rank. Step: median time of a step beside a save, and without one. In the last row
(`checkpoint.background=false`) the training waits for everything.
"""


def main(argv: list[str] | None = None) -> None:
    """Measure and write the result; with ``--rank-of FOLDER`` act as one of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--foreground", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    if arguments.rank_of is not None:
        _train(arguments.rank_of, background=not arguments.foreground)
        return
    result = Result("checkpoint", ABOUT)
    for ranks, more in ((1, []), (2, []), (2, ["--foreground"])):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            subprocess.run(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
                    *("-m", "benchmarks.checkpoint", "--rank-of", folder, *more),
                ],
                check=True,
            )
            found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("figures-*.json"))]
        slowest = max(found, key=lambda one: one["stall_s"])
        written = sum(one["bytes"] for one in found)
        result.add(
            {
                "processes": ranks,
                "background": not more,
                "state MB": round(written / 1e6),
                "stall ms": round(slowest["stall_s"] * 1e3, 1),
                "write s": round(slowest["write_s"], 2),
                "stall / write %": round(100 * slowest["stall_s"] / slowest["write_s"], 1),
                "MB/s": round(written / 1e6 / slowest["write_s"]),
                "step beside a save ms": round(slowest["beside_s"] * 1e3) if slowest["beside_s"] else "-",
                "step ms": round(slowest["step_s"] * 1e3),
            }
        )
    result.write()


def _train(folder: Path, background: bool) -> None:
    import torch
    from torch import nn

    from keye_train.settings import CheckpointSettings
    from keye_train.training import distributed
    from keye_train.training.checkpoint import TrainState
    from keye_train.training.engine import Engine
    from keye_train.training.optimizer import parameter_groups
    from keye_train.training.saver import Saver

    world = distributed.start(timeout_minutes=5)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    recipe = _settings()
    groups = parameter_groups({"language": list(model.named_parameters())}, recipe.stage)
    engine = Engine(model, model, groups, recipe, world)
    saver = Saver(folder, engine, world, CheckpointSettings(keep=1, background=background), {})
    rows = torch.randn(ROWS, WIDTH)

    def step() -> float:
        began = time.monotonic()
        engine.accumulate(engine.forward(rows).square().mean(), last=True)
        engine.apply()
        return time.monotonic() - began

    alone: list[float] = []
    beside: list[float] = []
    stalls: list[float] = []
    writes: list[float] = []
    for save in range(SAVES):
        alone += [step() for _ in range(3)]
        world.barrier()
        began = time.monotonic()
        saver.save(TrainState(save + 1, engine.updates, {}))
        stalls.append(time.monotonic() - began)
        while world.sum_int([saver.busy])[0]:
            beside.append(step())
        saver.wait()
        assert saver.figures is not None
        writes.append(saver.figures.write_s)
    figures = {
        "stall_s": statistics.median(stalls[1:]),
        "write_s": statistics.median(writes[1:]),
        "bytes": saver.figures.written_bytes,
        "step_s": statistics.median(alone[3:]),
        "beside_s": statistics.median(beside) if beside else None,
    }
    (folder / f"figures-{world.rank}.json").write_text(json.dumps(figures))
    world.barrier()


def _settings():
    from keye_train.settings import (
        DataSettings,
        DeepSpeedSettings,
        LoggingSettings,
        ModelSettings,
        Objective,
        Precision,
        StageSettings,
        TrainSettings,
    )

    return TrainSettings(
        stage=StageSettings("bench", Objective.language, ["language"], "all", 100, 1, 1, 2),
        model=ModelSettings(name="bench", tokenizer=""),
        data=DataSettings(name="bench", root="", sources={}, mixtures={}),
        deepspeed=DeepSpeedSettings(zero_stage=3, precision=Precision.fp32, overlap_comm=False, timeout_minutes=5),
        logging=LoggingSettings(),
        run_dir="",
    )


if __name__ == "__main__":
    main()
