"""Forecast of a rank's memory against what one optimizer step really takes, on CPU tensors or on a GPU.

    python -m benchmarks.memory [--bf16]

Each case has processes of its own, one a rank; its row is of the rank that took most. A small Keye (64 M parameters) is
built, given to the engine and trained for one short step, which makes the optimizer's state, and one of two
micro-batches, which is watched. On a CPU, what torch's allocator holds is followed through the profiler's memory
events, so neither the interpreter nor what malloc keeps back counts; on a GPU it is torch.cuda.max_memory_allocated.
The forecast is `keye_train.forecast`'s for the same pack. On a CPU the cases in bf16 are left out unless --bf16 asks
for them: without instructions for bf16 they take many times as long. On GPUs each rank of a case needs its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.results import Result
from keye_train import compose
from keye_train.forecast.activations import PackShape, trace
from keye_train.forecast.memory import device_memory
from keye_train.forecast.parameters import parameter_counts
from keye_train.model import module_parameters
from keye_train.model.packed import PackedInputs, VisionInputs
from keye_train.settings import TrainSettings
from keye_train.training import build, distributed
from keye_train.training.engine import Engine
from keye_train.training.learner import weighted_sum
from keye_train.training.optimizer import parameter_groups

MODEL = [
    "data=keye_example",
    "model=tiny",
    "model.tokenizer=none",
    *(
        f"model.language.{key}={value}"
        for key, value in {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "mrope_section": "[8,12,12]",
            "vocab_size": 16384,
        }.items()
    ),
    "model.vision.hidden_size=384",
    "model.vision.intermediate_size=1536",
    "model.vision.num_hidden_layers=6",
    "deepspeed.bucket_elements=5000000",
    "deepspeed.overlap_comm=false",
]
CASES = [  # stage, ZeRO stage, precision, activation checkpointing, ranks
    ("2_multitask", 0, "fp32", "none", 1),
    ("2_multitask", 0, "fp32", "selective", 1),
    ("2_multitask", 0, "fp32", "full", 1),
    ("2_multitask", 1, "fp32", "none", 1),
    ("2_multitask", 2, "fp32", "none", 1),
    ("2_multitask", 3, "fp32", "none", 1),
    ("2_multitask", 3, "fp32", "full", 1),
    ("1_align", 2, "fp32", "none", 1),
    ("2_multitask", 1, "fp32", "full", 2),
    ("2_multitask", 2, "fp32", "full", 2),
    ("2_multitask", 3, "fp32", "full", 2),
    ("2_multitask", 1, "bf16", "none", 1),
    ("2_multitask", 2, "bf16", "full", 1),
    ("2_multitask", 3, "bf16", "none", 1),
    ("2_multitask", 1, "bf16", "full", 2),
    ("2_multitask", 2, "bf16", "full", 2),
    ("2_multitask", 3, "bf16", "full", 2),
]
SAMPLES = 8
SHORT = PackShape(128, 256, 64)
MICRO_STEPS = 2


def main(words: list[str]) -> None:
    """Measure every case: on a GPU one after the other, on a CPU two side by side, for memory takes no notice."""
    parser = argparse.ArgumentParser(description="Forecast of a rank's memory against a real step.")
    parser.add_argument("--bf16", action="store_true", help="also the cases in bf16 on a CPU, which take long there")
    gpu = torch.cuda.is_available()
    bf16 = parser.parse_args(words).bf16 or gpu
    assert __doc__ is not None
    result = Result("memory", __doc__)
    ranks = torch.cuda.device_count() if gpu else max(case[4] for case in CASES)
    cases = [case for case in CASES if (bf16 or case[2] != "bf16") and case[4] <= ranks]
    with ThreadPoolExecutor(1 if gpu else 2) as pool:
        for row in pool.map(_measure_apart, cases):
            result.add(row)
    result.write()


def _measure_apart(case: tuple[str, int, str, str, int]) -> dict[str, Any]:
    """One case, in processes of its own."""
    *words, ranks = case
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.memory", *map(str, words)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2))}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == ranks
    return max(rows, key=lambda row: row["measured, MB"])


def measure(stage: str, zero_stage: int, precision: str, checkpointing: str) -> dict[str, object]:
    """One case, as this process sees it: the only one, or one of those that torchrun started."""
    half = precision == "bf16" and not torch.cuda.is_available()  # slow on CPUs without such instructions
    pack = SHORT if half else PackShape(512, 1024, 256)
    overrides = [
        *MODEL,
        f"stage={stage}",
        f"deepspeed.zero_stage={zero_stage}",
        f"deepspeed.precision={precision}",
        f"stage.activation_checkpointing={checkpointing}",
    ]
    settings = compose.load_settings(TrainSettings, "train", overrides)
    world = distributed.start(5)
    counts = parameter_counts(settings)
    expected = device_memory(settings, counts, trace(settings), pack, world.size, MICRO_STEPS)
    before = _held_bytes()
    objective = build.build_objective(settings)
    groups = parameter_groups(module_parameters(objective.model), settings.stage)
    engine = Engine(objective, objective.model, groups, settings, world)
    short, inputs = (make_pack(one, settings.model.language.vocab_size).to(world.device) for one in (SHORT, pack))

    def step(held: PackedInputs = inputs) -> None:
        for number in range(MICRO_STEPS):
            losses, _ = engine.forward(held)
            engine.accumulate(weighted_sum(losses, 1e-3), last=number == MICRO_STEPS - 1)
            del losses
        engine.apply()

    step(short)
    del short
    gc.collect()
    state = _held_bytes() - before
    peak = _peak(step, state)
    return {
        "stage": stage,
        "ZeRO": zero_stage,
        "precision": precision,
        "checkpointing": checkpointing,
        "ranks": world.size,
        "measured, MB": round(peak / 1e6, 1),
        "forecast, MB": round(expected.total / 1e6, 1),
        "error, %": round(100 * (expected.total / peak - 1), 1),
        "between steps, MB": round(state / 1e6, 1),
        "weights and optimizer, forecast, MB": round((expected.weights + expected.optimizer) / 1e6, 1),
    }


def make_pack(pack: PackShape, vocab_size: int) -> PackedInputs:
    """A pack of equal samples, each with one image."""

    def borders(length: int) -> torch.Tensor:
        return torch.arange(0, length * SAMPLES + 1, length, dtype=torch.int32)

    tokens, patches = pack.tokens // SAMPLES, pack.patches // SAMPLES
    pixels = torch.randint(0, 255, (pack.patches, 3, 14, 14), dtype=torch.uint8)
    ids = torch.randint(100, vocab_size, (pack.tokens,))
    return PackedInputs(
        input_ids=ids,
        labels=ids,
        position_ids=torch.arange(tokens).repeat(SAMPLES).expand(3, -1).contiguous(),
        cu_seqlens=borders(tokens),
        max_seqlen=tokens,
        vision=VisionInputs(pixels, torch.tensor([[1, 8, patches // 8]] * SAMPLES), borders(patches), patches),
        vision_rows=torch.arange(pack.patches // 4),
        loss_rows=torch.arange(pack.labelled),
        loss_targets=ids[: pack.labelled],
        loss_samples=torch.zeros(pack.labelled, dtype=torch.int64),
    )


def _held_bytes() -> int:
    """Bytes of all tensors that this process holds."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def _peak(step: object, state: int) -> int:
    assert callable(step)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return int(torch.cuda.max_memory_allocated())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return state + peak


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])))
    else:
        main(sys.argv[1:])
