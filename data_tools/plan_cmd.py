"""``keye-data plan``: what a stage will read, step by step, from the indexes alone."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.recipe import add_recipe_words, read_recipe
from data_tools.simulation import Simulation, SourceTally, simulate
from data_tools.text import one_line
from keye_train.data.cost import training_cost
from keye_train.data.plan import Plan
from keye_train.report.charts import amount, figure, short
from keye_train.report.collect import clock
from keye_train.settings import SettingsError

DESCRIPTION = """\
Simulate a stage without training it: how full its packs are, how even the ranks, what each source gives, which samples
are left out, and how much the loader must deliver. Reads the indexes, no shard, and needs no GPU. The plan is the one
that keye-train makes from the same words.

Options of the command, as KEY=VALUE beside the recipe's:
  world_size=N       ranks (1)
  steps=N            how much to simulate: optimizer steps,
  samples=N          or samples,
  epochs=X           or X times as many samples as the mixture's sources hold. Default: one such epoch, but not more
                     than stage.steps
  device_flops=X     peak of one rank in FLOP/s (989e12, an H100 in bf16) and
  mfu=X              the share of it that training reaches (0.4): they give the time of a step
  out=PAGE.html      write a page with plots

Ctrl-C ends the simulation; what was planned so far is reported.
"""
EXAMPLES = """\
examples:
  keye-data plan stage=2_multitask model=tiny data=demo world_size=2
  keye-data plan stage=2_multitask model=keye_8b data=keye_example world_size=64 samples=1_000_000 out=plan.html
  keye-data plan stage=0_vision model=tiny data=demo steps=20 --json
"""


@dataclass
class PlanOptions:
    """Options of the command."""

    world_size: int = 1
    steps: int | None = None
    samples: int | None = None
    epochs: float | None = None
    device_flops: float = 989e12
    """Peak FLOP/s of one rank."""
    mfu: float = 0.4
    """Share of the peak that training reaches."""
    out: str | None = None

    def check(self) -> None:
        """Raise SettingsError for values that cannot work."""
        lengths = {name: getattr(self, name) for name in ("steps", "samples", "epochs")}
        given = [name for name, value in lengths.items() if value is not None]
        if len(given) > 1:
            raise SettingsError(f"{' and '.join(given)} say the same thing in two ways: give one of them")
        for name, value in [*lengths.items(), ("world_size", self.world_size), ("device_flops", self.device_flops)]:
            if value is not None and value <= 0:
                raise SettingsError(f"{name}={value} must be above 0")
        if not 0 < self.mfu <= 1:
            raise SettingsError(f"mfu={self.mfu} is a share: above 0, at most 1")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``plan``."""
    parser = subparsers.add_parser(
        "plan",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_words(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Simulate and tell; the exit status."""
    settings, options = read_recipe(arguments.words, PlanOptions, arguments.recipes)
    settings.gradient_accumulation(options.world_size)  # before the indexes are read
    plan = Plan.from_settings(settings, training_cost(settings))
    held = sum(len(plan.source(number)) for number in range(len(plan.sources)))
    steps = options.steps
    samples = options.samples
    if steps is None and samples is None:
        samples = max(1, round(held * (options.epochs or 1)))
        steps = settings.stage.steps if options.epochs is None else None
    with tqdm(total=samples or steps, unit="sample" if samples else "step", desc="plan", unit_scale=True) as bar:
        # On one scale both limits cannot be shown; the samples are, where both hold.
        def show(result: Simulation) -> None:
            bar.update(min(result.drawn, bar.total) - bar.n if samples else 1)

        def enough(result: Simulation) -> bool:
            return (steps is not None and result.steps >= steps) or (samples is not None and result.drawn >= samples)

        result = simulate(plan, settings, options.world_size, enough, show)
    title = f"{settings.stage.name}, {settings.model.name}, data {settings.data.name}"
    described = describe(result, options)
    if arguments.json:
        json.dump({"title": title, **described}, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        print(f"{title}, mixture {settings.stage.mixture}, seed {settings.seed}\n")
        print(render(described))
    if options.out is not None:
        from data_tools.plan_page import write_page

        print(f"page: {write_page(Path(options.out), title, result, described)}", file=sys.stderr)
    return 0


def describe(result: Simulation, options: PlanOptions) -> dict[str, Any]:
    """All figures as plain values, with units in their names."""
    totals = {name: max(1, sum(getattr(s, name) for s in result.sources)) for name in ("drawn", "tokens", "patches")}
    totals["flops"] = sum(source.flops for source in result.sources) or 1.0
    return {
        "world_size": result.world_size,
        "steps": result.steps,
        "recipe_steps": result.recipe_steps,
        "packs": result.packs,
        "samples": result.samples,
        "drawn": result.drawn,
        "tokens": result.tokens,
        "patches": result.patches,
        "max_tokens": result.max_tokens,
        "max_patches": result.max_patches,
        "samples_per_step": result.samples / max(1, result.steps),
        "tokens_per_step": result.tokens / max(1, result.steps),
        "distributions": {
            "token_fill": result.token_fill.summary(),
            "patch_fill": result.patch_fill.summary(),
            "balance": result.balance.summary(),
            "pack_cost": result.pack_cost.summary(),
            "pack_samples": {
                name: round(2**value) for name, value in result.pack_samples.summary().items() if name != "mean"
            }
            | {"mean": result.samples / max(1, result.packs)},
        },
        "mix_deviation": result.mix_deviation,
        "mixture_unit": result.unit,
        "curriculum": result.curriculum,
        "sources": [_source_figures(source, result, totals) for source in result.sources],
        "left_out": [
            {"source": name, "reason": reason, "samples": count}
            for (name, reason), count in result.reasons.most_common()
        ],
        "loader": _loader_figures(result, options),
        "planning_us_per_sample": result.plan_s / max(1, result.planned_samples) * 1e6,
    }


def _source_figures(source: SourceTally, result: Simulation, totals: Mapping[str, float]) -> dict[str, Any]:
    """What a source gives, and its share of all that is given."""
    plain = ("name", "rows", "weight", "samples", "dropped", "filtered", "downscaled", "truncated", "tokens", "patches")
    return {name: getattr(source, name) for name in plain} | {
        "share_samples": source.drawn / totals["drawn"],
        "share_tokens": source.tokens / totals["tokens"],
        "share_patches": source.patches / totals["patches"],
        "share_flops": source.flops / totals["flops"],
        "mean_tokens": source.tokens / max(1, source.samples),
        "p99_tokens": 2 ** source.token_lengths.percentile(99) if source.samples else 0.0,
        "steps_per_epoch": source.rows * result.steps / source.passed if source.passed else None,
        "epochs_in_recipe": min(
            source.passed / result.steps * result.recipe_steps / source.rows, source.max_epochs or math.inf
        ),
    }


def _loader_figures(result: Simulation, options: PlanOptions) -> dict[str, float]:
    """What the loader must deliver for the ranks to train at that speed."""
    step_s = result.step_seconds(options.device_flops * options.mfu)
    per_s = 1 / (step_s * result.steps) if step_s else 0.0
    return {
        "device_flops": options.device_flops,
        "mfu": options.mfu,
        "step_s": step_s,
        "stage_s": step_s * result.recipe_steps,
        "samples_per_s": result.samples * per_s,
        "tokens_per_s": result.tokens * per_s,
        "patches_per_s": result.patches * per_s,
        "shard_bytes_per_s": result.shard_bytes * per_s,
        "shard_bytes_per_s_and_rank": result.shard_bytes * per_s / result.world_size,
    }


DISTRIBUTIONS = {
    "token_fill": "fill of the token budget",
    "patch_fill": "fill of the patch budget",
    "balance": "balance (mean / slowest rank)",
    "pack_cost": "cost of a pack / mean of its batch",
    "pack_samples": "samples in a pack",
}
COLUMNS = ("mean", "min", "p1", "p10", "p50", "p90", "p99", "max")
MAX_REASONS = 20


def render(described: dict[str, Any]) -> str:
    """The figures as text."""
    d = described
    lines = [
        f"{d['steps']:,} steps on {d['world_size']} ranks: {d['packs']:,} packs of at most {d['max_tokens']:,} tokens "
        f"and {d['max_patches']:,} patches",
        f"{d['samples']:,} samples, {short(d['tokens'])} tokens, {short(d['patches'])} patches; a step has "
        f"{d['samples_per_step']:,.0f} samples and {short(d['tokens_per_step'])} tokens",
        "",
        f"{'':36}" + "".join(f"{name:>9}" for name in COLUMNS),
    ]
    for name, label in DISTRIBUTIONS.items():
        values = d["distributions"][name]
        lines.append(f"{label:36}" + "".join(f"{_figure(values.get(column)):>9}" for column in COLUMNS))
    lines += [
        f"{'shares of a batch against random':36}{d['mix_deviation']:>9.2f}  (1: as n samples drawn at random)",
        "",
        f"weights are shares of {d['mixture_unit']}{' at the start' if d['curriculum'] else ''}; "
        "filtered: passed over, not counted as left out; downscaled, truncated: made to fit by data.overlong",
        f"{'source':20}{'weight':>8}{'samples':>9}{'tokens':>8}{'patches':>8}{'FLOPs':>8}"
        f"{'mean':>8}{'p99':>8}{'filtered':>10}{'downscaled':>11}{'truncated':>10}{'left out':>9}"
        f"{'steps/epoch':>13}{'epochs':>9}",
    ]
    lines += [_source_line(source) for source in d["sources"]]
    lines += ["", "left out" if d["left_out"] else "no sample is left out"]
    lines += [f"{r['samples']:10,}  {r['source']}: {one_line(r['reason'])}" for r in d["left_out"][:MAX_REASONS]]
    if len(d["left_out"]) > MAX_REASONS:
        lines.append(f"            and {len(d['left_out']) - MAX_REASONS} more reasons (see --json)")
    loader = d["loader"]
    lines += [
        "",
        f"at {loader['device_flops'] / 1e12:g} TFLOP/s a rank and {100 * loader['mfu']:.0f} % of it: "
        f"{loader['step_s']:.3g} s a step, {clock(loader['stage_s'])} for the recipe's {d['recipe_steps']:,} steps",
        f"the loader must give {loader['samples_per_s']:,.0f} samples/s, {short(loader['patches_per_s'])} patches/s, "
        f"{short(loader['shard_bytes_per_s'])}B/s of shards ({short(loader['shard_bytes_per_s_and_rank'])}B/s a rank)",
        f"planned in {d['planning_us_per_sample']:.1f} us a sample",
    ]
    return "\n".join(lines)


def _source_line(source: dict[str, Any]) -> str:
    shares = (source[f"share_{name}"] for name in ("samples", "tokens", "patches", "flops"))
    per_epoch = source["steps_per_epoch"]
    return (
        f"{source['name'][:19]:20}{source['weight']:8.1%}"
        + "".join(f"{share:{width}.1%}" for share, width in zip(shares, (9, 8, 8, 8), strict=True))
        + f"{source['mean_tokens']:8.0f}{source['p99_tokens']:8.0f}{source['filtered']:10,}"
        + f"{source['downscaled']:11,}{source['truncated']:10,}{source['dropped']:9,}"
        + f"{'–' if per_epoch is None else amount(per_epoch):>13} {amount(source['epochs_in_recipe']):>8}"
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else figure(value)
