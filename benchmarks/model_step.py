"""One training step of the packed model: tokens a second, and how much of the device's matrix products it uses (MFU).

    python -m benchmarks.model_step

MFU = operations of forward and backward of both towers (keye_train/model/flops.py; attention for each segment, the
causal half of the language model's, recomputation not counted) / time of the step / bare matmul peak of the same
device, data type and threads, measured in turn with the steps. Path *engine* is the training step (DeepSpeed, float32
masters, clipping, AdamW), *module* forward, backward and AdamW on the weights themselves. Packs are full, of made-up
samples with Keye-like lengths (benchmarks/samples.py). Medians over the rounds, with the quartiles. On the CPU with
one thread seconds are those of the process, not of the wall: the cores are shared.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor

from benchmarks import step_cases
from benchmarks.results import Result
from benchmarks.step_cases import DTYPES, GIB, Case, forecast
from keye_train.model import (
    KeyeForConditionalGeneration,
    enable_activation_checkpointing,
    keye_config,
    module_parameters,
)
from keye_train.model.packed import PackedInputs
from keye_train.training import distributed
from keye_train.training.build import freeze
from keye_train.training.distributed import World
from keye_train.training.engine import Engine
from keye_train.training.learner import weighted_sum
from keye_train.training.objectives import LanguageObjective
from keye_train.training.optimizer import build_optimizer, parameter_groups

WARM_UP_STEPS = 3
PEAK_SIZE = {"cuda": 8192, "cpu": 1024}  # of the square matrices whose product is the peak


@dataclass
class Times:
    """Seconds of each round."""

    peak_flops: list[float] = field(default_factory=list)  # operations a second of the bare product
    parts: dict[str, list[float]] = field(default_factory=dict)  # forward, backward, optimizer

    def steps(self) -> list[float]:
        """Whole steps."""
        return [sum(round_) for round_ in zip(*self.parts.values(), strict=True)]


class Clock:
    """Seconds between two places, of the wall, once the device has finished.

    On the CPU with one thread: of this process, so that others on the same cores count less.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._read = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        self.last = self._now()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = self._now()
        seconds, self.last = now - self.last, now
        return seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._read()


def matmul_peak(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Operations a second of a bare square matrix product: the best of ``repeats``."""
    size = PEAK_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    clock, best = Clock(device), float("inf")
    for _ in range(repeats):
        clock.lap()
        left @ right
        best = min(best, clock.lap())
    return 2 * size**3 / best


Step = Callable[[Clock, Times], None]


def build_step(case: Case, world: World) -> tuple[Step, Callable[[], None]]:
    """The step of a case, on its device, which notes what its parts took; and what frees the memory afterwards."""
    settings = case.settings()
    packs = case.inputs()
    items = sum(len(pack.loss_rows) for pack in packs)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with world.device if case.path == "module" else torch.device("cpu"):
            model = KeyeForConditionalGeneration(keye_config(settings.model))
    freeze(model, settings.stage)
    if case.checkpointing:
        enable_activation_checkpointing(model)
    if case.path == "module":
        model = model.to(DTYPES[case.precision])
    groups = parameter_groups(module_parameters(model), settings.stage)
    if case.path == "engine":
        objective = LanguageObjective(model, settings.deepspeed.precision)
        engine = Engine(objective, model, groups, settings, world)
        return _engine_step(engine, packs, 1 / items, world.device), engine.close
    optimizer = build_optimizer(groups, settings.stage.optimizer)
    return _module_step(model, optimizer, packs, 1 / items, world.device), lambda: None


def _engine_step(engine: Engine, packs: list[PackedInputs], weight: float, device: torch.device) -> Step:
    def step(clock: Clock, times: Times) -> None:
        laps: dict[str, float] = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        for number, pack in enumerate(packs):
            losses, _ = engine.forward(pack.to(device))
            laps["forward"] += clock.lap()
            engine.accumulate(weighted_sum(losses, weight), last=number == len(packs) - 1)
            laps["backward"] += clock.lap()
        engine.apply()
        laps["optimizer"] += clock.lap()
        _note(times, laps)

    return step


def _module_step(
    model: KeyeForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    packs: list[PackedInputs],
    weight: float,
    device: torch.device,
) -> Step:
    def step(clock: Clock, times: Times) -> None:
        laps: dict[str, float] = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        for pack in packs:
            losses: Tensor = model(packed=pack.to(device))
            laps["forward"] += clock.lap()
            weighted_sum(losses, weight).backward()
            laps["backward"] += clock.lap()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        laps["optimizer"] += clock.lap()
        _note(times, laps)

    return step


def _note(times: Times, laps: dict[str, float]) -> None:
    for part, seconds in laps.items():
        times.parts.setdefault(part, []).append(seconds)


def measure(case: Case, world: World, rounds: int) -> dict[str, object]:
    """Run a case; its row of the table."""
    device = world.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    (step, close), clock, times = build_step(case, world), Clock(device), Times()
    for _ in range(WARM_UP_STEPS):
        clock.lap()
        step(clock, Times())
    for _ in range(rounds):
        times.peak_flops.append(matmul_peak(device, DTYPES[case.precision]))
        clock.lap()
        step(clock, times)
    close()
    expected = forecast(case)
    seconds, peak = median(times.steps()), median(times.peak_flops)
    shares = [expected.flops / step_s / peak_s for step_s, peak_s in zip(times.steps(), times.peak_flops, strict=True)]
    low, _, high = quantiles(shares, n=4)
    row = _named(case) | {
        "tokens": expected.tokens,
        "patches": expected.patches,
        "tokens/s": round(expected.tokens / seconds),
        "TFLOP/s": round(expected.flops / seconds / 1e12, 3),
        f"peak TFLOP/s ({case.precision})": round(peak / 1e12, 3),
        "MFU": f"{median(shares):.1%} ({low:.1%} - {high:.1%})",
        "step, ms": round(seconds * 1e3, 1),
    }
    row |= {f"{part}, ms": round(median(laps) * 1e3, 1) for part, laps in times.parts.items()}
    if device.type == "cuda":
        row["peak memory, GiB"] = round(torch.cuda.max_memory_allocated(device) / GIB, 1)
        row["forecast, GiB"] = round(expected.memory_bytes / GIB, 1)
    return row


def _named(case: Case) -> dict[str, object]:
    return {"model": case.name, "path": case.path, "recompute": "yes" if case.checkpointing else "no"}


def planned(case: Case, memory: float | None) -> dict[str, object]:
    """The row of ``--plan``: what a case should cost."""
    expected = forecast(case)
    row = _named(case) | {
        "parameters, M": round(expected.parameters / 1e6, 1),
        "tokens": expected.tokens,
        "patches": expected.patches,
        "labelled": expected.labelled_tokens,
        "TFLOP a step": float(f"{expected.flops / 1e12:.4g}"),
        "states, GiB": float(f"{expected.state_bytes / GIB:.3g}"),
        "activations, GiB": float(f"{expected.activation_bytes / GIB:.3g}"),
        "loss, GiB": float(f"{expected.loss_bytes / GIB:.3g}"),
        "all, GiB": float(f"{expected.memory_bytes / GIB:.3g}"),
    }
    if memory is not None:
        row["fits"] = "yes" if expected.memory_bytes <= step_cases.USABLE * memory else "no"
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measure the cases of a device, or say what they should cost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_step")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--plan", action="store_true", help="only print what each case should cost; runs anywhere")
    parser.add_argument("--memory-gib", type=float, help="memory of the GPU; default: this GPU's, else an H200's")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each case")
    parser.add_argument("--only", default="", help="only cases whose 'MODEL PATH TOKENS' contains this text")
    options = parser.parse_args(arguments)
    present = torch.cuda.is_available()
    if options.device == "cuda" and not present and not options.plan:
        parser.error("no CUDA device here: add --plan to see what the cases should cost, or take --device cpu")
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: quartiles need 2 or more")
    if options.device == "cpu" and present and not options.plan:
        parser.error("a CUDA device is visible, which the engine takes: set CUDA_VISIBLE_DEVICES= to measure the CPU")
    kind = options.device if options.device != "auto" else ("cuda" if present else "cpu")
    memory = None
    if kind == "cpu" and options.memory_gib is not None:
        parser.error("--memory-gib is of a GPU: add --device cuda --plan, or leave it out")
    if kind == "cuda":
        memory = step_cases.H200_MEMORY if not present else float(torch.cuda.get_device_properties(0).total_memory)
        memory = memory if options.memory_gib is None else options.memory_gib * GIB
    cases = step_cases.CPU_CASES if memory is None else step_cases.cuda_cases(memory)
    cases = [case for case in cases if options.only in f"{case.name} {case.path} {case.max_tokens}"]
    if options.plan:
        plan = Result("model_step_plan", "")
        for case in cases:
            plan.add(planned(case, memory))
        return
    world = distributed.start(timeout_minutes=5)
    result = Result("model_step", f"{__doc__ or ''}\n{torch.get_num_threads()} threads, {_device_name(world.device)}.")
    for case in cases:
        if memory is not None and forecast(case).memory_bytes > step_cases.USABLE * memory:
            print(f"left out, {forecast(case).memory_bytes / GIB:.0f} GiB are too much: {case}", flush=True)
            continue
        result.add(measure(case, world, options.rounds))
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    result.write()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
