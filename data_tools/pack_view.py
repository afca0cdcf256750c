"""One pack as a picture: its segments in order, coloured by source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_tools.text import printable
from keye_train.data.collate import LoadedPack
from keye_train.data.index import read_key
from keye_train.data.loader import ReadTask
from keye_train.data.plan import Pack
from keye_train.model.packed import PackedInputs
from keye_train.model.sample_encoder import WHOLE
from keye_train.settings import StorageSettings, TrainSettings

MAX_ROWS = 60
MAX_BORDERS = 40


@dataclass(frozen=True)
class Segment:
    """One sample in a bar."""

    colour: int  # number of the source
    share: float  # per cent of the budget
    title: str


@dataclass(frozen=True)
class PackRow:
    """One sample in the table of a pack."""

    colour: int
    source: str
    key: str
    task: str
    tokens: int
    patches: int
    learnt: int | None  # labelled tokens; None without the language objective
    change: str  # what data.overlong does to it, "" where nothing


@dataclass(frozen=True)
class PackView:
    """One pack."""

    title: str
    about: str
    bars: list[tuple[str, list[Segment]]]
    cu_seqlens: str
    vision_cu_seqlens: str
    rows: list[PackRow]
    rows_left_out: int
    skipped: list[tuple[str, str]]  # key and reason of samples that turned out unreadable


def pack_view(
    title: str,
    planned: Pack,
    tasks: Sequence[ReadTask],
    loaded: LoadedPack,
    settings: TrainSettings,
    sources: Sequence[str],
    mean_cost: float,
) -> PackView:
    """Describe a pack as it was planned and as it was read.

    Args:
        title: where it stands.
        planned, tasks, loaded: the same pack.
        settings: of the stage.
        sources: names behind the source numbers.
        mean_cost: of the packs of its global batch.
    """
    stage, inputs = settings.stage, loaded.inputs
    rows = _rows(tasks, loaded, settings.data.storage, sources)
    about = (
        f"{len(loaded.refs)} samples; {loaded.tokens:,} tokens, {100 * planned.tokens / stage.max_tokens:.2f} % of the "
        f"budget; {loaded.patches:,} patches, {100 * planned.patches / stage.max_patches:.1f} %; "
        f"cost {planned.cost / mean_cost:.3f} of the mean of its global batch ({planned.cost:.3g} FLOPs forward)"
    )
    if loaded.changed:
        about += f"; {loaded.changed} made to fit"
    if loaded.skipped:
        about += f"; {len(loaded.skipped)} could not be read"
    return PackView(
        title=title,
        about=about,
        bars=[
            ("tokens", _bar(rows, "tokens", stage.max_tokens)),
            ("patches", _bar(rows, "patches", stage.max_patches)),
        ],
        cu_seqlens=_numbers(inputs.cu_seqlens.tolist()) if isinstance(inputs, PackedInputs) else "–",
        vision_cu_seqlens=_numbers(inputs.vision.cu_seqlens.tolist()),
        rows=rows[:MAX_ROWS],
        rows_left_out=max(0, len(rows) - MAX_ROWS),
        skipped=[(printable(ref.key), printable(reason)) for ref, reason in loaded.skipped],
    )


def _rows(
    tasks: Sequence[ReadTask], loaded: LoadedPack, storage: StorageSettings, sources: Sequence[str]
) -> list[PackRow]:
    """What was read, sample by sample."""
    number = {name: place for place, name in enumerate(sources)}
    learnt: list[int | None] = [None] * len(loaded.refs)
    if isinstance(loaded.inputs, PackedInputs):
        learnt = list(np.bincount(loaded.inputs.loss_samples.numpy(), minlength=len(loaded.refs)).tolist())
    return [
        PackRow(
            number[ref.source],
            ref.source,
            printable(ref.key),
            printable(label),
            task.tokens,
            task.patches,
            count,
            "" if task.fit == WHOLE else str(task.fit),
        )
        for ref, label, task, count in zip(
            loaded.refs, loaded.tasks, _read_samples(tasks, loaded, storage), learnt, strict=True
        )
    ]


def _read_samples(tasks: Sequence[ReadTask], loaded: LoadedPack, storage: StorageSettings) -> list[ReadTask]:
    """Planned samples that were read, in their order."""
    if not loaded.skipped:
        return list(tasks)
    skipped = {(ref.shard, ref.key) for ref, _ in loaded.skipped}
    return [task for task in tasks if (task.shard, read_key(task.shard, task.row, storage)) not in skipped]


def _bar(rows: Sequence[PackRow], unit: str, budget: int) -> list[Segment]:
    return [
        Segment(row.colour, round(100 * size / budget, 4), f"{row.source} {row.key}: {size:,} {unit}")
        for row in rows
        if (size := getattr(row, unit))
    ]


def _numbers(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:MAX_BORDERS]))
    return f"[{shown}]" if len(values) <= MAX_BORDERS else f"[{shown}, … {values[-1]}] ({len(values)} numbers)"
