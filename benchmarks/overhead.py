"""What the trainer and its loader cost beside a bare PyTorch loop that is fed the same packs, ready-made.

    python -m benchmarks.overhead

Both sides train the same tiny model from the same weights on the same packs, float32, fused AdamW with the same groups
and values, clipping at 1. The bare loop has all tensors in memory and does nothing but forward, backward, clip, update.
The trainer is ``keye-train`` as it is: it plans, reads pictures (JPEGs of 640 x 480) through a reader process, counts,
runs DeepSpeed (ZeRO 0), guards, logs each step to metrics.jsonl and TensorBoard, and writes the ledger. Both are timed
from the end of an update to the end of the last one, in turns; the first updates of a turn are not counted. Useful
tokens are those of the samples.

*share*: useful tokens a second of the trainer over those of the bare loop, by the clock; median of the rounds, range.
Processor time is that of the training process, and beside it that of its reader.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.loader import write_corpus
from benchmarks.results import Result
from keye_train import runs
from keye_train.data.cost import training_cost
from keye_train.data.loader import Loader
from keye_train.data.plan import Plan
from keye_train.model import module_parameters
from keye_train.model.packed import PackedInputs
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.settings import Precision, TrainSettings
from keye_train.training import distributed
from keye_train.training.build import build_objective
from keye_train.training.optimizer import build_optimizer, parameter_groups
from keye_train.training.trainer import train

WARM_UP = 3  # updates of a turn that are not counted
LOSS_TOLERANCE = 1e-4


@dataclass
class Marks:
    """Clock and processor time at the end of each update."""

    clock: list[float] = field(default_factory=list)
    process: list[float] = field(default_factory=list)
    readers: list[float] = field(default_factory=list)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """After every ``step`` of any optimizer."""
        handle = register_optimizer_step_post_hook(lambda *_: self._take())
        try:
            yield
        finally:
            handle.remove()

    def _take(self) -> None:
        self.clock.append(time.perf_counter())
        self.process.append(time.process_time())
        children = psutil.Process().children(recursive=True)
        self.readers.append(sum(sum(child.cpu_times()[:2]) for child in children))

    def spent(self) -> tuple[float, float, float]:
        """Seconds by the clock, of this process, and of its readers, from the end of the warm-up."""
        return tuple(values[-1] - values[WARM_UP - 1] for values in (self.clock, self.process, self.readers))  # type: ignore[return-value]


def settings_of(folder: Path, steps: int) -> TrainSettings:
    """A run of the tiny model on pictures with short texts."""
    settings = write_corpus(folder)
    settings.data.resolution.image_max_tokens = 196
    settings.data.workers = 1
    settings.stage.steps, settings.stage.max_tokens, settings.stage.max_patches = steps, 1024, 2048
    settings.stage.schedule.decay_steps, settings.stage.schedule.warmup_steps = 1, 0
    settings.deepspeed.zero_stage, settings.deepspeed.precision = 0, Precision.fp32
    settings.checkpoint.every_steps = 10**9
    settings.logging.progress = False
    settings.check()
    return settings


def ready_packs(settings: TrainSettings) -> tuple[list[list[PackedInputs]], list[int]]:
    """All packs of the run in memory, step by step, and the tokens of each step."""
    cost = training_cost(settings)
    encoder = SampleEncoder.from_settings(settings.model, settings.data.resolution)
    steps = list(Loader(Plan.from_settings(settings, cost), encoder, 0, 1, settings))
    packs = [[pack.inputs for pack in step.packs] for step in steps]
    return packs, [sum(pack.tokens for pack in step.packs) for step in steps]  # type: ignore[return-value]


def bare_turn(settings: TrainSettings, steps: list[list[PackedInputs]]) -> tuple[Marks, float]:
    """Train on the packs; the marks and the loss of the last step."""
    model: Any = build_objective(settings).model
    groups = parameter_groups(module_parameters(model), settings.stage)
    optimizer = build_optimizer(groups, settings.stage.optimizer)
    trained = [parameter for group in groups for parameter in group["params"]]
    marks, loss = Marks(), torch.zeros(())
    with marks.taken():
        for packs in steps:
            items = sum(len(pack.loss_rows) for pack in packs)
            loss = torch.zeros(())
            for pack in packs:
                part = model(packed=pack).sum() / items
                part.backward()
                loss += part.detach()
            torch.nn.utils.clip_grad_norm_(trained, settings.stage.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    return marks, float(loss)


def trainer_turn(settings: TrainSettings, run_dir: Path) -> tuple[Marks, float]:
    """Train with ``keye-train``'s trainer; see :func:`bare_turn`."""
    settings.run_dir = str(run_dir)
    marks = Marks()
    with marks.taken():
        assert train(settings) == 0
    return marks, float(runs.read_jsonl(run_dir / runs.METRICS)[-1]["loss"])


def constant_rate(settings: TrainSettings) -> None:
    """The bare loop has no schedule."""
    settings.stage.schedule.shape = type(settings.stage.schedule.shape).constant
    settings.stage.schedule.decay_steps = 0


def compare(settings: TrainSettings, folder: Path, rounds: int, result: Result) -> None:
    """Take turns; one row for each side."""
    packs, tokens = ready_packs(settings)
    useful = sum(tokens[WARM_UP:])
    spent: dict[str, list[tuple[float, float, float]]] = {"bare loop": [], "trainer and loader": []}
    for number in range(rounds):
        bare, expected = bare_turn(settings, packs)
        ours, loss = trainer_turn(settings, folder / f"run-{number}")
        assert abs(loss - expected) <= LOSS_TOLERANCE * expected, f"the two sides learn differently: {loss}, {expected}"
        spent["bare loop"].append(bare.spent())
        spent["trainer and loader"].append(ours.spent())
    for name, seconds in spent.items():
        shares = sorted(b[0] / own[0] for b, own in zip(spent["bare loop"], seconds, strict=True))
        work = sorted(b[1] / own[1] for b, own in zip(spent["bare loop"], seconds, strict=True))
        steps = len(tokens) - WARM_UP
        result.add(
            {
                "side": name,
                "useful tokens/s": round(useful / median(s[0] for s in seconds)),
                "share": _range(shares),
                "step, ms": round(1e3 * median(s[0] for s in seconds) / steps, 1),
                "processor, ms a step": round(1e3 * median(s[1] for s in seconds) / steps, 1),
                "share by processor time": _range(work),
                "reader, ms a step": round(1e3 * median(s[2] for s in seconds) / steps, 1),
            }
        )


def _range(shares: list[float]) -> str:
    return f"{median(shares):.1%} ({shares[0]:.1%} - {shares[-1]:.1%})"


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead")
    parser.add_argument("--steps", type=int, default=24, help="updates of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="that compute; the reader needs a core beside them")
    options = parser.parse_args(arguments)
    if options.steps <= WARM_UP or options.rounds < 1 or options.threads < 1:
        parser.error(f"--steps must be above {WARM_UP}, --rounds and --threads 1 or more")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # else the trainer takes all cores, and bare turns after it
    torch.set_num_threads(options.threads)
    distributed.start(timeout_minutes=5)
    turns = f"{options.rounds} rounds of {options.steps} steps; computing threads: {options.threads}; one reader."
    about = f"{__doc__ or ''}\n{turns}"
    result = Result("overhead", about)
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(Path(folder), options.steps)
        constant_rate(settings)
        compare(settings, Path(folder), options.rounds, result)
    result.write()


if __name__ == "__main__":
    main()
