"""``keye-data stats``: what is in the shards, from their indexes alone."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data_tools.storage_options import add_storage_arguments, storage_from
from data_tools.text import one_line
from keye_train.data.corpus import Sizes, measure
from keye_train.data.facts import Facts
from keye_train.data.index import read_columns
from keye_train.data.opening import open_headers
from keye_train.data.paths import find_shards
from keye_train.settings import ResolutionSettings, StorageSettings
from keye_train.settings.data import check_resolution

DESCRIPTION = """\
Count samples, tokens and patches, per task and in all, from the indexes: no shard is opened. Tokens and patches of
media follow from the resolution settings, by default those of the recipes.
"""
EXAMPLES = """\
examples:
  keye-data stats 'data/*.tar'
  keye-data stats 'data/*.tar' --set image_max_tokens=1280 --set video_fps=1
"""
BAR_CHARACTERS = 40


@dataclass
class Summary:
    """What one or more shards hold."""

    sizes: Sizes
    tasks: list[str]  # of each sample
    errors: Counter[str]  # reason -> samples

    @property
    def usable(self) -> int:
        """Samples that can be trained on."""
        return len(self.tasks) - self.errors.total()


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``stats``."""
    parser = subparsers.add_parser(
        "stats",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="paths or patterns of .tar files")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of data.resolution (repeatable)"
    )
    add_storage_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Count and tell; the exit status."""
    storage = storage_from(arguments)
    shards = find_shards(arguments.shards, storage)
    resolution = read_resolution(arguments.set)
    print(render(summarise(shards, resolution, storage), len(shards)))
    budgets = ", ".join(f"{name}={value}" for name, value in vars(resolution).items())
    print(f"\nMedia are counted at {budgets}; --set changes these.")
    return 0


def read_resolution(assignments: list[str]) -> ResolutionSettings:
    """Resolution settings with some values changed.

    Raises:
        ValueError: not NAME=VALUE, no such setting, or values that cannot work together.
    """
    resolution = ResolutionSettings()
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not hasattr(resolution, name):
            raise ValueError(f"--set {assignment}: use NAME=VALUE with one of {', '.join(vars(resolution))}")
        kind = type(getattr(resolution, name))
        try:
            setattr(resolution, name, kind(value))
        except ValueError as error:
            raise ValueError(f"--set {assignment}: {value!r} is no {kind.__name__}") from error
    check_resolution(resolution)
    return resolution


def summarise(shards: list[str], resolution: ResolutionSettings, storage: StorageSettings | None = None) -> Summary:
    """Read the indexes of shards.

    Raises:
        ValueError: a shard has no index, or a stale one.
    """
    parts, tasks = [], []
    errors: Counter[str] = Counter()
    open_headers(shards, None, storage=storage)
    for shard in tqdm(shards, unit="shard", desc="stats", leave=False):
        table = read_columns(shard, ["text_tokens", "media", "task", "error"], storage)
        sizes, wrong = measure(Facts.of(table), resolution)
        parts.append(sizes)
        names = table["task"].to_pylist()
        tasks += ["(unreadable)" if row in wrong else name for row, name in enumerate(names)]
        errors.update(wrong.values())
    return Summary(Sizes.concatenate(parts), tasks, errors)


def render(summary: Summary, shards: int) -> str:
    """The summary as text."""
    sizes, tasks = summary.sizes, np.array(summary.tasks)
    lines = [f"{shards} shards, {len(tasks)} samples, {summary.usable} of them usable", ""]
    lines.append(f"{'task':24} {'samples':>10} {'share':>7} {'tokens':>14} {'mean':>8} {'max':>8} {'patches':>14}")
    for name in [*sorted(set(summary.tasks)), None]:
        mine = np.ones(len(tasks), dtype=bool) if name is None else tasks == name
        own = sizes.tokens[mine]
        if not len(own):
            continue
        label = "all" if name is None else one_line(name) or "(no task)"
        lines.append(
            f"{label:24} {len(own):10d} {len(own) / len(tasks):7.1%} "
            f"{own.sum():14d} {own.mean():8.0f} {own.max():8d} {sizes.patches[mine].sum():14d}"
        )
    lines += ["", "tokens of a sample", *histogram(sizes.tokens)]
    if summary.errors:
        lines += [
            "",
            "unreadable",
            *(f"{count:8d}  {one_line(reason)}" for reason, count in summary.errors.most_common(20)),
        ]
    return "\n".join(lines)


def histogram(tokens: np.ndarray) -> list[str]:
    """Bars over powers of two."""
    if not len(tokens):
        return []
    # Bucket b holds 2^(b-1) <= tokens < 2^b; bucket 0 holds the samples without tokens.
    buckets = np.ceil(np.log2(tokens + 1)).astype(int)
    counts = np.bincount(buckets)
    first = int(buckets.min())
    lines = []
    for bucket in range(first, len(counts)):
        bar = "#" * round(BAR_CHARACTERS * counts[bucket] / counts.max())
        lines.append(f"{2**bucket // 2:8d} - {2**bucket - 1:8d} {counts[bucket]:10d} {bar}")
    return lines
