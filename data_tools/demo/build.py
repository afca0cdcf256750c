"""The demo's corpus on disk: shards in parallel, then the tokenizer on their texts, then their indexes.

::

    OUT/plan.json                     seed, scale and sizes; a second build with other ones is refused
    OUT/train/SOURCE-00000.tar        with .tar.idx and .tar.index.parquet beside each
    OUT/heldout/TASK-00000.tar        other scans, other parts of the photographs, other questions
    OUT/tokenizer/                    tokenizer.json, tokenizer_config.json
    OUT/manifest.json                 written last: its presence means that all is there

Every shard has a random stream of its own, so the bytes do not depend on the number of workers or on interruptions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_tools.demo import pairs, tasks_objects, tasks_video, tasks_words
from data_tools.demo.assets import PACKAGES, load_assets
from data_tools.demo.studio import Draft, Studio
from data_tools.demo.tokenizer import conversation_texts, train_tokenizer
from data_tools.shards import write_shard
from keye_train.data.index import ShardHeader, tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.opening import open_header
from keye_train.data.reader import walk_shard
from keye_train.runs import read_json, write_json_atomic

log = logging.getLogger(__name__)

VERSION = 2
"""Goes up whenever the same seed would give other samples."""

SHARD_SAMPLES = 500
MAKERS: dict[str, Callable[[Studio], Draft]] = {
    "shape": tasks_objects.shape,
    "digit": tasks_objects.digit,
    "count": tasks_objects.count,
    "ground": tasks_objects.ground,
    "compare": tasks_objects.compare,
    "caption": tasks_words.caption,
    "ocr": tasks_words.ocr,
    "text": tasks_words.text,
    "video": tasks_video.video,
    "pairs_objects": pairs.pairs_objects,
    "pairs_places": pairs.pairs_places,
    "pairs_counts": pairs.pairs_counts,
    "pairs_digits": pairs.pairs_digits,
    "pairs_words": pairs.pairs_words,
    "pairs_photos": pairs.pairs_photos,
}
TRAIN_SAMPLES = {
    "shape": 3500,
    "digit": 8000,
    "count": 3000,
    "ground": 5000,
    "compare": 1500,
    "caption": 1500,
    "ocr": 2500,
    "text": 2000,
    "video": 1200,
    "pairs_objects": 4500,
    "pairs_places": 5000,
    "pairs_counts": 4000,
    "pairs_digits": 6000,
    "pairs_words": 4000,
    "pairs_photos": 500,
}
HELDOUT_SAMPLES = 240  # of each task: half for the table, half for the search for a soup
HELDOUT_PAIRS = {
    "pairs_objects": 58,
    "pairs_places": 40,
    "pairs_counts": 30,
    "pairs_digits": 72,
    "pairs_words": 30,
    "pairs_photos": 10,
}
LEAST_SAMPLES = 16  # of a task, however small the scale


@dataclass(frozen=True)
class ShardPlan:
    """One shard before it is composed."""

    split: str  # "train" or "heldout"
    source: str  # its name in the recipe
    number: int
    makers: dict[str, int]  # task -> samples, in this order
    seed: int

    @property
    def path(self) -> str:
        """Path below the folder of the corpus."""
        return f"{self.split}/{self.source}-{self.number:05d}.tar"

    @property
    def samples(self) -> int:
        """How many samples it holds."""
        return sum(self.makers.values())


def plan_shards(scale: float, seed: int) -> list[ShardPlan]:
    """All shards of a build; ``scale`` multiplies the sizes, held-out sets grow no further from scale 1."""
    plans = []
    for source, full in TRAIN_SAMPLES.items():
        left = max(LEAST_SAMPLES, round(full * scale))
        for number in range(-(-left // SHARD_SAMPLES)):
            samples = min(SHARD_SAMPLES, left - number * SHARD_SAMPLES)
            plans.append(ShardPlan("train", source, number, {source: samples}, seed))
    small = min(1.0, scale)
    for task in TRAIN_SAMPLES:
        if task not in HELDOUT_PAIRS:
            samples = max(LEAST_SAMPLES, round(HELDOUT_SAMPLES * small))
            plans.append(ShardPlan("heldout", task, 0, {task: samples}, seed))
    kinds = {kind: max(LEAST_SAMPLES // 4, round(full * small)) for kind, full in HELDOUT_PAIRS.items()}
    plans.append(ShardPlan("heldout", "pairs", 0, kinds, seed))
    return plans


def compose(plan: ShardPlan) -> Iterator[Draft]:
    """The samples of one shard. Held-out samples differ from each other."""
    rng = np.random.default_rng([plan.seed, zlib.crc32(f"{plan.split}/{plan.source}".encode()), plan.number])
    studio = Studio(load_assets(), plan.split, rng)
    seen: set[str] = set()
    for maker, samples in plan.makers.items():
        wanted = len(seen) + samples
        if plan.split == "train":
            yield from (MAKERS[maker](studio) for _ in range(samples))
            continue
        while len(seen) < wanted:
            draft = MAKERS[maker](studio)
            identity = _identity(draft)
            if identity not in seen:
                seen.add(identity)
                yield draft


def _identity(draft: Draft) -> str:
    media = [hashlib.sha256(data).hexdigest() for data in draft.media.values()]
    return json.dumps([media or draft.parts])


def write_plan(out: Path, plan: ShardPlan) -> int:
    """Compose one shard and write it, whole or not at all; the number of its samples."""
    members: Iterable[tuple[str, dict[str, bytes]]] = (
        (
            f"{plan.source}-{plan.number:05d}-{row:04d}",
            {"json": json.dumps(draft.record(), ensure_ascii=False, separators=(",", ":")).encode(), **draft.media},
        )
        for row, draft in enumerate(compose(plan))
    )
    write_shard(out / plan.path, members)
    return plan.samples


def shard_texts(path: Path) -> Iterator[str]:
    """The texts of a shard for the tokenizer."""
    for raw in walk_shard(path):
        yield from conversation_texts(json.loads(raw.members["json"])["messages"])


def index_shard(path: Path, tokenizer_folder: Path) -> ShardHeader:
    """Write the index of a shard, or keep the one that fits."""
    fingerprint = tokenizer_fingerprint(tokenizer_folder)
    try:
        return open_header(str(path), tokenizer_folder, fingerprint)
    except ValueError as stale:
        log.debug("%s", stale)
        return build_index(path, _load_tokenizer(tokenizer_folder), fingerprint)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def build_demo(out: Path, scale: float = 1.0, seed: int = 0, workers: int = 2) -> dict[str, Any]:
    """Build the corpus in ``out`` and give its manifest. Finished shards of an earlier call are kept.

    Raises:
        ValueError: a package with assets is missing, ``out`` holds another build, or a value is out of range.
    """
    if scale <= 0 or workers < 1 or seed < 0:
        raise ValueError(f"scale={scale}, seed={seed}, workers={workers}: use scale > 0, seed >= 0 and workers >= 1")
    plans = plan_shards(scale, seed)
    described = {"version": VERSION, "seed": seed, "scale": scale, "shards": [asdict(plan) for plan in plans]}
    _claim(out, described)
    manifest = out / "manifest.json"
    if manifest.exists():
        log.info("%s is complete", out)
        return read_json(manifest)
    load_assets()  # a missing package is told before any process starts
    with _Pool(workers) as pool:
        todo = [plan for plan in plans if not (out / plan.path).exists()]
        total, done = sum(plan.samples for plan in plans), sum(plan.samples for plan in plans if plan not in todo)
        with tqdm(total=total, initial=done, desc="compose", unit="sample", unit_scale=True) as bar:
            for samples in pool.run(write_plan, [(out, plan) for plan in todo]):
                bar.update(samples)
        folder = out / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            paths = [out / plan.path for plan in plans if plan.split == "train"]
            texts = (text for path in tqdm(paths, desc="tokenizer", unit="shard") for text in shard_texts(path))
            train_tokenizer(texts, folder)
        jobs = [(out / plan.path, folder) for plan in plans]
        headers = list(tqdm(pool.run(index_shard, jobs), total=len(jobs), desc="index", unit="shard"))
    result = _manifest(described, plans, {str(Path(header.shard)): header for header in headers}, out)
    write_json_atomic(manifest, result)
    return result


def _claim(out: Path, described: dict[str, Any]) -> None:
    """Write the plan, or raise ValueError where the folder belongs to another one."""
    path = out / "plan.json"
    if path.exists() and read_json(path) != described:
        raise ValueError(f"{out} holds another build (see {path}): give another --out, or remove the folder")
    write_json_atomic(path, described)


def _manifest(
    described: dict[str, Any], plans: list[ShardPlan], headers: dict[str, ShardHeader], out: Path
) -> dict[str, Any]:
    samples: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    digest = hashlib.sha256()
    for plan in plans:
        header = headers[str(out / plan.path)]
        name = f"{plan.split}/{plan.source}"
        samples[name] += header.rows
        sizes[name] += header.shard_bytes
        digest.update(f"{plan.path} {header.sha256}\n".encode())
    return {
        "version": VERSION,
        "seed": described["seed"],
        "scale": described["scale"],
        "samples": dict(samples),
        "bytes": dict(sizes),
        "shards_sha256": digest.hexdigest(),
        "tokenizer_sha256": tokenizer_fingerprint(out / "tokenizer"),
        "packages": {name: metadata.version(name) for name, _ in PACKAGES.values()},
    }


class _Pool:
    """Calls a function on many arguments, here or in processes, and yields the results as they come."""

    def __init__(self, workers: int) -> None:
        self.executor: ProcessPoolExecutor | None = None
        if workers > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])  # imports once for all workers
            self.executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_interrupts_to_parent)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> Iterator[Any]:
        if self.executor is None:
            yield from (function(*job) for job in jobs)
            return
        futures: list[Future[Any]] = [self.executor.submit(function, *job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
