"""The draw on an index of a billion samples: start-up, first batch, memory; and how well its order mixes.

    python -m benchmarks.draw

The index is real in its format and simulated in its size: five sources, whose shards are links to one index of 50,000
rows each, a billion rows in all, opened and read by the code that a run uses. "Position" is how many samples have been
drawn; behind the first window, it goes on as from a checkpoint in the middle of a run, where the main part of the
window before is planned once more. At 1,000,000,000 every source begins another epoch: no block of the window before is
of use to the next one, the worst case. The next window is planned and given out in the same process, which has the
blocks of the one before. Memory is what the process has more than after its imports: resident, at its peak.
Shards of a source are links to one, which the system holds in memory: with as many files as shards, the disk's part
comes on top. Processor time tells more than seconds do where other programs run.

Mixing compares windows of 65,536 draws of the largest source with a full shuffle of it: from how many blocks of
neighbouring rows a window comes, how often draws that follow each other come from the same block (1 = as by chance in a
full shuffle of the group), and how far the mean length of a window strays from the mean of the source, in units of what
a full shuffle strays, on rows whose length depends on their shard (spread between shards = spread within).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.results import Result
from keye_train.data.blocks import BlockShuffle
from keye_train.data.corpus import Corpus
from keye_train.data.cost import language_cost
from keye_train.data.draw import DrawRules
from keye_train.data.index import INDEX_VERSION, ROW_GROUP, SCHEMA, ShardHeader, tokenizer_fingerprint
from keye_train.data.indexing import add_sizes
from keye_train.data.mixture import mixed
from keye_train.data.packing import Budget
from keye_train.data.paths import index_path, offsets_path, sizes_file
from keye_train.data.plan import Plan, PlanState
from keye_train.model.configuration import KeyeConfig
from keye_train.model.flops import FlopCoefficients
from keye_train.settings import MixtureUnit, ResolutionSettings, SourceSettings

SHARES = {"caption": 0.45, "ocr": 0.2, "vqa": 0.15, "text": 0.12, "video": 0.08}
SHARDS, SHARD_ROWS = 20_000, 50_000
WINDOW, TOKENS, PACKS = 65_536, 16_384, 256
POSITIONS = (0, 5 * 10**8, 10**9)
GROUPS = ((1024, 256), (1024, 1024), (256, 4096), (128, 8192))  # rows of a block, blocks of a group
MIXED_SHARDS = (500, 9000, 45_000)
MIXING_WINDOWS = 40


def write_index(folder: Path) -> None:
    """The shards of all sources: for each one real shard's index, and links to it."""
    (folder / "tokenizer.json").write_text("{}")
    for number, (name, share) in enumerate(SHARES.items()):
        rng = np.random.default_rng(number)
        (folder / name).mkdir()
        first = folder / name / "00000.tar"
        first.write_bytes(b"\0" * 10240)
        offsets_path(first).write_bytes(np.arange(SHARD_ROWS + 1, dtype="<u8").tobytes())
        sides = np.exp(rng.normal(6.4, 0.4, (SHARD_ROWS, 2))).astype(int).tolist()
        video = {"kind": "video", "frames": 300, "fps": 25.0}
        image = {"kind": "image", "frames": 1, "fps": 0.0}
        medium = {"text": None, "video": video}.get(name, image)
        rows = {
            "key": [f"{row:09d}" for row in range(SHARD_ROWS)],
            "offset": range(SHARD_ROWS),
            "size": [1] * SHARD_ROWS,
            "text_tokens": np.exp(rng.normal(5, 0.7, SHARD_ROWS)).astype(int) + 20,
            "media": [[medium | {"width": w, "height": h}] if medium else [] for w, h in sides],
            "cuts": [[] for _ in sides],
            "task": [name] * SHARD_ROWS,
            "error": [None] * SHARD_ROWS,
        }
        columns = {field.name: rows.get(field.name, [None] * SHARD_ROWS) for field in SCHEMA}
        metadata = {"version": INDEX_VERSION, "shard_bytes": "10240", "shard_sha256": name}
        metadata["tokenizer"] = tokenizer_fingerprint(folder)
        metadata["layout"] = ""
        table = pa.Table.from_pydict(columns, schema=SCHEMA.with_metadata(metadata))
        pq.write_table(table, index_path(first), compression="zstd", row_group_size=ROW_GROUP)
        add_sizes(ShardHeader(str(first), SHARD_ROWS, 10240, name, metadata["tokenizer"]))
        for shard in range(1, round(SHARDS * share)):
            link = folder / name / f"{shard:05d}.tar"
            for path_of in (Path, offsets_path, index_path, sizes_file):
                os.link(path_of(first), path_of(link))


def measure_start(folder: Path, position: int, unit: MixtureUnit) -> dict[str, object]:
    """Open the corpus and plan the first batches behind ``position``, in this process."""
    resting = _resident_mb()
    began, processor = time.perf_counter(), time.process_time()
    sources = {name: SourceSettings([str(folder / name / "*.tar")]) for name in SHARES}
    resolution = ResolutionSettings(image_max_tokens=2048, video_max_tokens=8192)
    corpus = Corpus.open(sources, folder, resolution)
    opened = time.perf_counter()
    budget = Budget(TOKENS, 4 * TOKENS)
    plan = Plan(
        corpus,
        SHARES,
        budget,
        PACKS,
        WINDOW,
        0,
        language_cost(FlopCoefficients.of(KeyeConfig()).for_training()),
        DrawRules(unit),
    )
    drawn, before = (
        tuple(max(round(at * SHARES[name]), 0) for name in plan.sources) for at in (position, position - WINDOW)
    )
    each = 1 if unit == MixtureUnit.samples else 1000
    spent, before_spent = (tuple(each * count for count in counts) for counts in (drawn, before))
    window, none = position // WINDOW, (0,) * len(drawn)
    state = PlanState(plan.fingerprint, 0, window, 0, drawn, none, spent, 0, before, before_spent, 0)
    batches = plan.batches(state)
    _, after = next(batches)
    first, processor = time.perf_counter(), time.process_time() - processor
    while after.batch:  # 0 behind the last batch of a window
        _, after = next(batches)
    again, again_processor, samples = time.perf_counter(), time.process_time(), 0
    while not samples or after.batch:
        batch, after = next(batches)
        samples += sum(len(pack.samples) for pack in batch.packs)
    seconds, busy = time.perf_counter() - again, time.process_time() - again_processor
    return {
        "rows": sum(len(source) for source in corpus.sources.values()),
        "open, s": round(opened - began, 1),
        "first batch, s": round(first - opened, 1),
        "processor time of both, s": round(processor, 1),
        "next window, us a sample": round(seconds / samples * 1e6, 1),
        "its processor time, us a sample": round(busy / samples * 1e6, 1),
        "memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - resting),
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_mixing(shards: int, block_rows: int, group_blocks: int) -> dict[str, object]:
    """How far windows of one source are from a full shuffle; pairs of windows all over its epoch."""
    size = round(SHARDS * SHARES["caption"]) * SHARD_ROWS
    order = BlockShuffle(size, 0, "caption", block_rows, group_blocks)
    share = round(WINDOW * SHARES["caption"])
    of_shard = _normal(np.arange(shards))  # a standard normal number of the shard, another of the row
    touched, together, strays = [], [], []
    for window in range(MIXING_WINDOWS):
        start = window // 2 * (size // (MIXING_WINDOWS // 2 + 1)) + window % 2 * share
        rows = order.rows(start + np.arange(share))
        touched.append(len(np.unique(rows // block_rows)))
        together.append((np.diff(rows // block_rows) == 0).mean() * group_blocks)
        strays.append((of_shard[rows // (size // shards)] - of_shard.mean() + _normal(rows + size)).mean())
    means = np.array(strays)
    stray = float(np.sqrt((means**2).mean()))
    return {
        "shards": shards,
        "block, rows": block_rows,
        "group, blocks": group_blocks,
        "blocks a window comes from": round(float(np.mean(touched))),
        "same block as the draw before, x chance": round(float(np.mean(together)), 2),
        "stray of a window's mean, x full shuffle": round(stray / float(np.sqrt(2 / share)), 2),
        "the same, in % of a sample's spread": round(stray / float(np.sqrt(2)) * 100, 2),
        "correlation with the next window": round(float(np.corrcoef(means[::2], means[1::2])[0, 1]), 2),
    }


def _normal(numbers: np.ndarray) -> np.ndarray:
    """A standard normal number for each whole number (Box and Muller)."""
    halves = [mixed(numbers.astype(np.uint64) * np.uint64(2) + np.uint64(half)) / 2**64 for half in (0, 1)]
    return np.sqrt(-2 * np.log(halves[0] + 1e-18)) * np.cos(2 * np.pi * halves[1])


def main() -> None:
    """Print and store both tables."""
    result = Result("draw", __doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_index(folder)
        units = (MixtureUnit.samples, MixtureUnit.tokens)
        cases = [(unit, position) for unit in units for position in POSITIONS]
        for unit, position in cases:
            arguments = json.dumps([name, position, unit.value])
            command = [sys.executable, "-m", "benchmarks.draw", arguments]  # a process each: memory is that of one
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            result.add({"position": position, "mixture by": unit.value, **json.loads(found)})
    mixing = Result("draw_mixing", __doc__ or "")
    for shards, group in product(MIXED_SHARDS, GROUPS):
        mixing.add(measure_mixing(shards, *group))
    result.write()
    mixing.write()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        where, at, what = json.loads(sys.argv[1])
        print(json.dumps(measure_start(Path(where), at, MixtureUnit(what))))
    else:
        main()
