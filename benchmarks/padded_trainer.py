"""The packed step of keye_train beside the same model trained with padded batches by transformers' Trainer.

    python -m benchmarks.padded_trainer

Same tiny model and first weights, same samples in each optimizer step, float32, same threads, fused AdamW with the
same values, gradient clipping at 1. Everything is collated before the clock runs, for both. The Trainer gets what a
transformers user would write: right-padded batches of the published arguments (input_ids, attention_mask, labels,
normalised pixels, grids) through ``forward``. It is shown with several batch sizes; accumulation keeps the samples of
an optimizer step the same. The packed side runs the training engine (DeepSpeed, ZeRO 0) as ``keye-train`` does.
Contenders take turns, the first step of each turn is not counted. Useful tokens are those of the samples, padding
never counts.

*padding*: share of the Trainer's positions that hold no token. *operations*: matrix products of its step over those
of the packed step, by the formula of keye_train/model/flops.py: what padding, and logits for every position, cost in
principle; batches of 1 have no padding. *packed is faster by*: median of the turns and range. The vision tower is the
packed one on both sides, because ``forward`` uses it too: the more of the work is vision, the less there is to gain.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.model_step import Clock
from benchmarks.results import Result
from benchmarks.samples import MIX, Kind, draw_samples, into_packs
from benchmarks.step_cases import CPU_CASES
from keye_train.data.collate import collate_samples
from keye_train.data.packing import Budget
from keye_train.model import IGNORE_INDEX, KeyeForConditionalGeneration, keye_config, module_parameters
from keye_train.model.flops import FlopCoefficients
from keye_train.model.sample_encoder import EncodedSample
from keye_train.model.vision import normalize_levels
from keye_train.settings import TrainSettings
from keye_train.training import distributed
from keye_train.training.build import freeze
from keye_train.training.distributed import World
from keye_train.training.engine import Engine
from keye_train.training.learner import weighted_sum
from keye_train.training.objectives import LanguageObjective
from keye_train.training.optimizer import parameter_groups

SAMPLES_A_STEP = 32
BATCH_SIZES = (32, 8, 1)  # all at once; the Trainer's default; no padding at all
LONGEST = 512  # tokens of a sample; packs have 1,024
LOSS_TOLERANCE = 1e-5


def _kind(share: float, text: float, vision: float, frames: int = 1, spreads: tuple[float, float] = (0.7, 0.8)) -> Kind:
    return Kind(share, text, vision, frames, *spreads)


MIXES: dict[str, dict[str, Kind]] = {
    # Chats of very unequal length, half of them about one small picture.
    "chats": {"text": _kind(0.5, 40, 0, spreads=(1.2, 0)), "image": _kind(0.5, 30, 9, spreads=(1.2, 0.5))},
    # benchmarks.plan's mix at a sixteenth of its lengths: most tokens are vision.
    "Keye-like": {
        name: _kind(kind.share, kind.text_tokens / 16, kind.vision_tokens / 16, kind.frames)
        for name, kind in MIX.items()
    },
    # The demo's samples: nearly equal lengths, so padding costs little.
    "demo-like": {
        "image": _kind(0.91, 18, 5, spreads=(0.2, 0.4)),
        "video": _kind(0.05, 18, 24, 8, spreads=(0.2, 0.2)),
        "text": _kind(0.04, 18, 0, spreads=(0.2, 0)),
    },
}

Batch = dict[str, torch.Tensor]
Turn = Callable[[], list[float]]


def padded(samples: Sequence[EncodedSample], pad: int, video_pad: int) -> Batch:
    """Right-padded arguments of the published ``forward``."""

    def rows(name: str, fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([getattr(s, name) for s in samples], True, fill)

    batch = {"input_ids": rows("input_ids", pad), "labels": rows("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    is_video = [bool((sample.input_ids == video_pad).any()) for sample in samples]
    for video, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        own = [s for s, of_video in zip(samples, is_video, strict=True) if of_video == video and len(s.grid_thw)]
        if own:
            batch[pixels] = normalize_levels(torch.cat([s.pixel_patches for s in own]))
            batch[grids] = torch.cat([s.grid_thw for s in own])
    if "video_grid_thw" in batch:
        batch["second_per_grid_ts"] = torch.full((len(batch["video_grid_thw"]),), 0.5)
    return batch


class StepTimes(TrainerCallback):
    """Seconds between the ends of optimizer steps."""

    def __init__(self) -> None:
        self.clock = Clock(torch.device("cpu"))
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note a step."""
        self.seconds.append(self.clock.lap())


def trainer_turn(settings: TrainSettings, model: KeyeForConditionalGeneration, steps: list[list[Batch]]) -> Turn:
    """Trains ``steps`` once with the Trainer; seconds of each step but the first."""
    optimizer = settings.stage.optimizer
    batches = [batch for step in steps for batch in step]

    def turn() -> list[float]:
        times = StepTimes()
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=1,  # of ready batches
                gradient_accumulation_steps=len(steps[0]),
                max_steps=len(steps),
                train_sampling_strategy="sequential",
                learning_rate=optimizer.lr,
                lr_scheduler_type="constant",
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.betas[0],
                adam_beta2=optimizer.betas[1],
                adam_epsilon=optimizer.eps,
                max_grad_norm=optimizer.clip_norm,
                optim="adamw_torch_fused",
                use_cpu=True,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            )
            trainer = Trainer(
                model, arguments, data_collator=lambda ready: ready[0], train_dataset=batches, callbacks=[times]
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return times.seconds[1:]

    return turn


def packed_turn(
    settings: TrainSettings, model: KeyeForConditionalGeneration, steps: list[list[EncodedSample]], world: World
) -> Turn:
    """Trains ``steps`` once with the engine; seconds of each step but the first."""
    stage = settings.stage
    freeze(model, stage)
    objective = LanguageObjective(model, settings.deepspeed.precision).train()
    engine = Engine(objective, model, parameter_groups(module_parameters(model), stage), settings, world)
    budget = Budget(stage.max_tokens, stage.max_patches)
    batches = [[collate_samples(pack, settings.model) for pack in into_packs(samples, budget)] for samples in steps]

    def turn() -> list[float]:
        clock, seconds = Clock(torch.device("cpu")), []
        for packs in batches:
            weight = 1 / sum(len(pack.loss_rows) for pack in packs)
            for number, pack in enumerate(packs):
                losses, _ = engine.forward(pack)
                engine.accumulate(weighted_sum(losses, weight), last=number == len(packs) - 1)
            engine.apply()
            seconds.append(clock.lap())
        return seconds[1:]

    return turn


def same_loss(model: KeyeForConditionalGeneration, settings: TrainSettings, samples: list[EncodedSample]) -> float:
    """Largest difference of the two sides' losses on the samples of a step: they do learn the same."""
    ids = settings.model.special_tokens
    with torch.no_grad():
        one = model(**padded(samples, ids.pad, ids.video_pad)).loss
        other = model.forward_packed(collate_samples(samples, settings.model)).mean()
    return abs(float(one - other))


def operations(settings: TrainSettings, samples: Sequence[EncodedSample], batch_size: int | None) -> float:
    """Matrix products of a step: padded to batches of a size, or (None) packed."""
    cost = FlopCoefficients.of(keye_config(settings.model)).for_training()
    lengths = [len(sample.input_ids) for sample in samples]
    patches = [int(grid.prod()) for sample in samples for grid in sample.grid_thw]
    if batch_size is None:
        return cost.pack(lengths, patches, sum(int((s.labels != IGNORE_INDEX).sum()) for s in samples))
    rows = _padded_lengths(lengths, batch_size)
    return cost.pack(rows, patches, sum(rows))


def _padded_lengths(lengths: list[int], batch_size: int) -> list[int]:
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return [max(batch) for batch in batches for _ in batch]


def compare(mix: str, settings: TrainSettings, world: World, steps: int, turns: int, result: Result) -> None:
    """All contenders on one mix: rows of the table."""
    ids = settings.model.special_tokens
    drawn = [draw_samples(settings.model, SAMPLES_A_STEP, 1.0, LONGEST, seed, MIXES[mix]) for seed in range(steps + 1)]
    lengths = [len(sample.input_ids) for samples in drawn[1:] for sample in samples]

    def model() -> KeyeForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return KeyeForConditionalGeneration(keye_config(settings.model)).train()

    difference = same_loss(model(), settings, drawn[0])
    assert difference < LOSS_TOLERANCE, f"the two sides do not compute the same loss: {difference}"
    contenders = {None: packed_turn(settings, model(), drawn, world)}
    for size in BATCH_SIZES:
        batches = [
            [padded(samples[start : start + size], ids.pad, ids.video_pad) for start in range(0, len(samples), size)]
            for samples in drawn
        ]
        contenders[size] = trainer_turn(settings, model(), batches)
    rates: dict[int | None, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, turn in contenders.items():
            rates[name].append(sum(lengths) / sum(turn()))
    packed_operations = sum(operations(settings, samples, None) for samples in drawn[1:])
    for name in contenders:
        ratios = sorted(mine / theirs for mine, theirs in zip(rates[None], rates[name], strict=True))
        row: dict[str, object] = {
            "mix": f"{mix}: tokens a sample median {median(lengths):.0f}, mean {sum(lengths) / len(lengths):.0f}, "
            f"longest {max(lengths)}",
            "trained by": "keye_train, packed" if name is None else f"Trainer, batches of {name}",
            "useful tokens/s": round(median(rates[name])),
            "padding": "0%",
            "operations": "1.00",
            "packed is faster by": "1",
        }
        if name is not None:
            rows = [sum(_padded_lengths([len(s.input_ids) for s in samples], name)) for samples in drawn[1:]]
            costs = sum(operations(settings, samples, name) for samples in drawn[1:])
            row["padding"] = f"{1 - sum(lengths) / sum(rows):.0%}"
            row["operations"] = f"{costs / packed_operations:.2f}"
            row["packed is faster by"] = f"{median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
        result.add(row)


def main(arguments: list[str] | None = None) -> None:
    """Every mix, all contenders."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padded_trainer")
    parser.add_argument("--steps", type=int, default=4, help="measured optimizer steps of a turn")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    if min(options.steps, options.turns) < 1:
        parser.error("--steps and --turns must be 1 or more")
    world = distributed.start(timeout_minutes=5)
    settings = CPU_CASES[0].settings()
    seconds = "the process" if torch.get_num_threads() == 1 else "the wall"
    about = f"{__doc__ or ''}\n{torch.get_num_threads()} threads; seconds of {seconds}; "
    result = Result("padded_trainer", f"{about}{SAMPLES_A_STEP} samples a step, {options.turns} turns.")
    for mix in MIXES:
        compare(mix, settings, world, options.steps, options.turns, result)
    result.write()


if __name__ == "__main__":
    main()
