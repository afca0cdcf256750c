"""``keye-data fit-cost``: what packs cost, from the step times of a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from keye_train import runs
from keye_train.data.audit import run_plan
from keye_train.data.cost import config_cost
from keye_train.data.fitted import CostFit, fit_cost, step_seconds

DESCRIPTION = """\
Fit the cost of packs on the step times of a run, so that a plan balances time and not operations alone: seconds for
each token, each pair of tokens of a sample, each patch and each pair of patches of an image or video, none below 0, and
a constant for each step. Plans the run once more; its shards' indexes must be those of the run. Logged steps count
(logging.every_steps=1 gives most), less the time spent waiting for data; the first two and outliers are left out, and
of a run that went on with another number of ranks all but the steps of that number that has most of them.

Prints how well the times are told, beside the cost that the model's config counts. The file is for data.cost_file of
runs of the same model and stage on machines like the one that was measured: another model, or another choice of what is
trained, is refused; another kind of device nobody can tell from it. Another cost is another plan.
"""
EXAMPLES = """\
examples:
  keye-data fit-cost runs/2_multitask --out cost.json
  keye-train stage=2_multitask model=keye_8b data=keye_example data.cost_file=cost.json
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``fit-cost``."""
    parser = subparsers.add_parser(
        "fit-cost",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder of a run of keye-train")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the file for data.cost_file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Fit and tell; the exit status."""
    settings, plan = run_plan(arguments.folder)
    world_size, seconds, others = most_steps(step_seconds(runs.read_jsonl(arguments.folder / runs.METRICS)))
    fit = fit_cost(plan, config_cost(settings), world_size, seconds)
    if others:
        print(f"steps of {world_size} ranks; {others} steps of another number are left out")
    print(text_table(fit))
    if arguments.out:
        fit.write(arguments.out)
    return 0


def most_steps(by_world_size: Mapping[int, dict[int, float]]) -> tuple[int, dict[int, float], int]:
    """The number of ranks that has most steps, their seconds, and how many steps the others have.

    Raises:
        ValueError: there are no steps.
    """
    if not by_world_size:
        raise ValueError(
            f"{runs.METRICS} has no step with its step_s and world_size: name a run that logged some, by this version"
        )
    world_size = max(by_world_size, key=lambda ranks: (len(by_world_size[ranks]), ranks))
    own = by_world_size[world_size]
    return world_size, own, sum(map(len, by_world_size.values())) - len(own)


def text_table(fit: CostFit) -> str:
    """The fit for a terminal."""
    lines = [f"{fit.steps} steps; {fit.fixed_s:.4g} s of each, whatever its packs"]
    lines += [f"{name:16}{value * fit.seconds:12.4g} s" for name, value in asdict(fit.cost).items()]
    lines += [
        f"{'':24}{'R^2':>8}{'mean error':>12}",
        f"{'fitted':24}{fit.r2:8.3f}{fit.error:12.1%}",
        f"{'by the config':24}{fit.config_r2:8.3f}{fit.config_error:12.1%}",
    ]
    if fit.r2 <= 0:
        lines.append(
            "The fit tells these times no better than their mean does: do not plan by it. More steps, packs that "
            "differ more in what they hold, or a machine without other work give a better one."
        )
    return "\n".join(lines)
