"""``keye-data view``: samples and packs as the model sees them, as one HTML page."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.pack_view import PackView, pack_view
from data_tools.page import write_html
from data_tools.recipe import add_recipe_words, read_recipe
from data_tools.samples import Album, Card
from data_tools.view_reader import GuardedReader
from keye_train.data.cost import training_cost
from keye_train.data.index import read_columns
from keye_train.data.loader import ReadTask, read_tasks
from keye_train.data.plan import Plan
from keye_train.model.sample_encoder import WHOLE, SampleEncoder
from keye_train.settings import SettingsError, TrainSettings

DESCRIPTION = """\
Write an HTML page of samples as the model sees them: the pixels after resizing with the grid of patches and of the
2 x 2 cells that become one token, the frames of videos with their times, every token with what is learnt of it; and of
whole packs. Samples and packs are those that keye-train reads first with the same words.

Options of the command, as KEY=VALUE beside the recipe's:
  out=PAGE.html      where to write (view.html)
  per_source=N       samples of each source (4)
  packs=N            packs (2)
  keys=[a,b]         only the samples with these keys, wherever they stand
  skipped=true       only samples that the plan leaves out, over a budget or unreadable: the first per_source of each
                     source among the next scan_samples draws (100,000)
  changed=true       only samples that data.overlong makes fit, looked for in the same way
  max_megabytes=X    of pictures on the page (12); what comes after is shown without

Reading is held to data.decode_seconds and data.decode_bytes as in training (not with data.workers=0): a sample that
hangs its decoder or takes too much memory is shown with that reason.

Names and texts of samples are shown as text: nothing of them can become part of the page.
"""
EXAMPLES = """\
examples:
  keye-data view stage=2_multitask model=tiny data=demo out=view.html
  keye-data view stage=0_vision model=tiny data=demo per_source=2 out=view.html
  keye-data view model=tiny data=demo keys=[000000012] packs=0
  keye-data view model=tiny data=demo stage.max_tokens=48 skipped=true
"""


@dataclass
class ViewOptions:
    """Options of the command."""

    out: str = "view.html"
    per_source: int = 4
    packs: int = 2
    keys: list[str] = field(default_factory=list)
    skipped: bool = False
    changed: bool = False
    scan_samples: int = 100_000
    """Draws that are looked through for samples."""
    max_megabytes: float = 12.0
    """Of pictures."""

    def check(self) -> None:
        """Raise SettingsError for values that cannot work."""
        if bool(self.keys) + self.skipped + self.changed > 1:
            raise SettingsError("keys=..., skipped=true and changed=true choose samples in several ways: give one")
        if min(self.per_source, self.packs) < 0 or self.scan_samples < 1 or self.max_megabytes < 0:
            raise SettingsError("per_source, packs and max_megabytes are at least 0, scan_samples at least 1")


@dataclass(frozen=True)
class Chosen:
    """A sample to show."""

    source: int  # number of its source
    task: ReadTask
    problem: str = ""  # why the plan leaves it out


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``view``."""
    parser = subparsers.add_parser(
        "view",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_words(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the page; the exit status."""
    settings, options = read_recipe(arguments.words, ViewOptions, arguments.recipes)
    plan = Plan.from_settings(settings, training_cost(settings))
    encoder = SampleEncoder.from_settings(settings.model, settings.data.resolution, settings.data.video_backend)
    if options.keys:
        chosen = find_keys(plan, options.keys)
    elif options.skipped:
        chosen = first_skipped(plan, options)
    else:
        chosen = first_planned(plan, options)
    with GuardedReader(settings, encoder) as reader:
        album = Album(settings, encoder, reader, round(options.max_megabytes * 1e6))
        ordered = sorted(chosen, key=lambda one: one.source)
        cards = [album.card(one.task, one.source, one.problem) for one in tqdm(ordered, unit="sample", desc="view")]
        special = options.keys or options.skipped or options.changed
        packs = first_packs(plan, settings, reader, 0 if special else options.packs)
    page = _write(Path(options.out), settings, plan, cards, packs, album.full)
    print(f"{len(cards)} samples, {len(packs)} packs: {page}")
    return 0


def first_planned(plan: Plan, options: ViewOptions) -> list[Chosen]:
    """The first samples of each source, or of those made to fit, each once, in the order of the training."""
    found: dict[int, dict[int, Chosen]] = {number: {} for number in range(len(plan.sources))}
    seen = 0
    for batch, _ in plan.batches():
        for pack in batch.packs:
            for sample, task in zip(pack.samples, read_tasks(plan, pack), strict=True):
                if len(found[sample.source]) < options.per_source and (task.fit != WHOLE or not options.changed):
                    found[sample.source].setdefault(sample.row, Chosen(sample.source, task))
            seen += len(pack.samples)
        if seen >= options.scan_samples or all(len(some) >= options.per_source for some in found.values()):
            break
    return [one for some in found.values() for one in some.values()]


def first_skipped(plan: Plan, options: ViewOptions) -> list[Chosen]:
    """The first samples of each source that the plan leaves out, each once."""
    found: dict[tuple[int, int], Chosen] = {}
    counts: Counter[int] = Counter()
    seen = 0
    with tqdm(total=options.scan_samples, unit="sample", desc="looking for skipped samples") as bar:
        for batch, _ in plan.batches():
            for gone in batch.dropped:
                if (gone.source, gone.row) not in found and counts[gone.source] < options.per_source:
                    counts[gone.source] += 1
                    source = plan.source(gone.source)
                    task = ReadTask(source.name, *source.locate(gone.row), gone.row, 0, 0)
                    found[gone.source, gone.row] = Chosen(gone.source, task, gone.reason)
            more = len(batch.dropped) + sum(len(pack.samples) for pack in batch.packs)
            seen += more
            bar.update(more)
            full = all(counts[number] >= options.per_source for number in range(len(plan.sources)))
            if full or seen >= options.scan_samples:
                break
    return list(found.values())


def find_keys(plan: Plan, keys: list[str]) -> list[Chosen]:
    """The samples with some keys; reads the keys of the mixture's shards, one shard at a time.

    Raises:
        ValueError: a key is nowhere.
    """
    wanted = set(keys)
    found: list[Chosen] = []
    missing = set(keys)
    for number, name in enumerate(plan.sources):
        source = plan.source(number)
        shards = tqdm(source.shards, unit="shard", desc=f"looking for keys in {name}", leave=False)
        for shard, first in zip(shards, source.first_rows.tolist(), strict=False):
            for row, key in enumerate(read_columns(shard, ["key"], source.storage)["key"].to_pylist()):
                if key in wanted:
                    (fit,) = source.fits(np.array([first + row]))
                    found.append(Chosen(number, ReadTask(name, shard, row, first + row, 0, 0, fit)))
                    missing.discard(key)
    if missing:
        raise ValueError(f"no sample with the key {sorted(missing)[0]!r} in the sources {', '.join(plan.sources)}")
    return found


def first_packs(plan: Plan, settings: TrainSettings, reader: GuardedReader, count: int) -> list[PackView]:
    """The first packs of the training, read as it reads them."""
    views: list[PackView] = []
    for batch, _ in plan.batches() if count else ():
        mean_cost = sum(pack.cost for pack in batch.packs) / len(batch.packs)
        for pack in batch.packs[: count - len(views)]:
            tasks = read_tasks(plan, pack)
            title = f"step {batch.step}, pack {len(views)}"
            views.append(pack_view(title, pack, tasks, reader.pack(tasks), settings, plan.sources, mean_cost))
        if len(views) >= count:
            break
    return views


def _write(
    out: Path, settings: TrainSettings, plan: Plan, cards: list[Card], packs: list[PackView], full: bool
) -> Path:
    by_source: dict[str, list[Card]] = {}
    for card in cards:
        by_source.setdefault(card.source, []).append(card)
    values = {
        "title": f"{settings.stage.name}, data {settings.data.name}",
        "about": (
            f"mixture {settings.stage.mixture}, seed {settings.seed}, tokenizer {settings.model.tokenizer}; packs of "
            f"at most {settings.stage.max_tokens:,} tokens and {settings.stage.max_patches:,} patches"
        ),
        "tiles": [],
        "sources": list(enumerate(plan.sources)),
        "by_source": by_source,
        "packs": packs,
        "full": full,
    }
    return write_html(out, "view.html", values)
