"""Samples a second of the loader against a bare decode loop over the same files, and against megatron-energon.

    python -m benchmarks.loader
    python -m benchmarks.loader --energon ENVIRONMENT/lib/python3.11/site-packages

Image-caption chats with JPEGs of 640 x 480. The bare loop opens the tars in order, decodes each picture, resizes it and
cuts it into patches with the very functions that the loader calls, each time into new memory as malloc gives it; it
knows no text and no pack. "bare, memory kept" is the same loop where malloc keeps what is freed, as the loader's
readers let it (``keye_train.data.memory``). With 0 workers all sides run in one process, and share that. The encoding
loop reads in order, too, and makes the tensors of each sample with its text, but no packs. The loader draws, packs,
reads by byte range, makes the same tensors and lays out packs. Energon reads the same shards in order, shuffles in a
buffer, encodes with the same encoder and lays out packs of the same token budget.

Workers are processes beside the one that measures; 0: all in one. Each line is the best of several rounds, the sides in
turns. Processor time is that of all processes of a side; on a machine with other work it is the figure to trust. The
folder given to --energon is put behind this environment's own packages, so all sides use the same libraries.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from benchmarks.results import Result
from data_tools.demo.tokenizer import conversation_texts, train_tokenizer
from data_tools.shards import sample_key, write_shard
from keye_train.compose import load_settings
from keye_train.data.cost import training_cost
from keye_train.data.formats import parse_sample
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.loader import Loader
from keye_train.data.memory import keep_freed_memory
from keye_train.data.plan import Plan
from keye_train.data.reader import walk_shard
from keye_train.model.images import decode_image
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.sample import SampleRef
from keye_train.settings import ResolutionSettings, SourceSettings, TrainSettings

SHARDS, SHARD_SAMPLES = 6, 64
MAX_TOKENS = 4096
ROUNDS, SECONDS = 6, 2.5
BARE, BARE_KEPT, ENCODING = "bare loop", "bare, memory kept", "encoding loop"
WORDS = "a small red boat lies on the grey stones of the quiet shore before many old houses in evening light"

Measured = tuple[float, float]  # samples a second, processor milliseconds a sample


def write_corpus(folder: Path) -> TrainSettings:
    """Write shards, indexes and a tokenizer; the settings that read them."""
    rng = np.random.default_rng(0)
    samples = [_sample(rng) for _ in range(SHARDS * SHARD_SAMPLES)]
    chats = [json.loads(sample["json"]) for sample in samples]
    train_tokenizer([text for chat in chats for text in conversation_texts(chat["messages"])], folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    for number in range(SHARDS):
        shard = folder / f"images-{number}.tar"
        own = samples[number * SHARD_SAMPLES : (number + 1) * SHARD_SAMPLES]
        write_shard(shard, ((sample_key(number * SHARD_SAMPLES + i), members) for i, members in enumerate(own)))
        build_index(shard, tokenizer, tokenizer_fingerprint(folder / "tokenizer"))
    settings = load_settings(TrainSettings, "train", ["stage=2_multitask", "model=tiny", "data=demo"])
    settings.model.tokenizer = str(folder / "tokenizer")
    settings.data.sources = {"images": SourceSettings([str(folder / "images-*.tar")])}
    settings.data.mixtures = {"multitask": {"images": 1.0}}
    settings.data.resolution = ResolutionSettings(image_max_tokens=1280)
    settings.data.window_samples = 2048
    settings.stage.max_tokens, settings.stage.max_patches = MAX_TOKENS, 4 * MAX_TOKENS
    settings.stage.global_batch_packs = 2
    settings.stage.steps = 10**9
    return settings


def _sample(rng: np.random.Generator) -> dict[str, bytes]:
    """A picture with structure at many scales, as photographs have, and a caption of 10 to 60 words."""
    layers = [rng.integers(0, 256, (6 * 2**k, 8 * 2**k, 3)).astype(np.uint8) for k in range(0, 7, 2)]
    pixels = sum(
        np.asarray(Image.fromarray(layer).resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32) / 2**k
        for k, layer in enumerate(layers)
    )
    buffer = io.BytesIO()
    Image.fromarray((pixels / 2).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    question = [{"type": "image", "image": "0.jpg"}, {"type": "text", "text": "Describe the picture."}]
    answer = " ".join(rng.choice(WORDS.split(), int(rng.integers(10, 60))))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"0.jpg": buffer.getvalue(), "json": json.dumps({"messages": messages, "task": "caption"}).encode()}


# ------------------------------------------------------------------------------------------------------- the sides


def bare_loop(shards: list[str], resolution: ResolutionSettings) -> Iterator[int]:
    """Decode every picture, over and over; yields 1 for each."""
    while True:
        for shard in shards:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        file = tar.extractfile(member)
                        assert file is not None
                        decode_image(file.read(), resolution)
                        yield 1


def encoding_loop(shards: list[str], settings: TrainSettings) -> Iterator[int]:
    """Encode every sample, over and over; yields 1 for each."""
    encoder = SampleEncoder.from_settings(settings.model, settings.data.resolution)
    while True:
        for shard in shards:
            for raw in walk_shard(shard):
                encoder.encode(parse_sample(SampleRef("images", shard, raw.key), raw.members))
                yield 1


@contextmanager
def loader(settings: TrainSettings, workers: int) -> Iterator[Iterator[int]]:
    """The loader; yields the samples of each step."""
    settings.data.workers = workers
    plan = Plan.from_settings(settings, training_cost(settings))
    encoder = SampleEncoder.from_settings(settings.model, settings.data.resolution)
    with Loader(plan, encoder, 0, 1, settings) as steps:
        yield (sum(len(pack.refs) for pack in step.packs) for step in steps)


def measure(counts: Iterator[int], seconds: float) -> Measured:
    """Samples a second and processor time after a start that does not count: what is read ahead is so at both ends."""
    for _ in range(4):
        next(counts)
    began, busy, samples = time.perf_counter(), _processor_s(), 0
    while time.perf_counter() - began < seconds:
        samples += next(counts)
    passed = time.perf_counter() - began
    return samples / passed, (_processor_s() - busy) / samples * 1e3


def _processor_s() -> float:
    """Processor time of this process and its children so far."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _loop_process(kind: str, shards: list[str], settings: TrainSettings, seconds: float) -> Measured:
    torch.set_num_threads(1)
    if kind == BARE_KEPT:
        keep_freed_memory()
    counts = encoding_loop(shards, settings) if kind == ENCODING else bare_loop(shards, settings.data.resolution)
    return measure(counts, seconds)


def loop(kind: str, settings: TrainSettings, processes: int, seconds: float) -> Measured:
    """A loop in this process (0) or in several, each on its share of the shards."""
    folder = Path(settings.data.sources["images"].shards[0]).parent
    shards = sorted(map(str, folder.glob("*.tar")))
    if not processes:
        return _loop_process(kind, shards, settings, seconds)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = [(kind, shards[number::processes], settings, seconds) for number in range(processes)]
        measured = pool.starmap(_loop_process, parts)
    return sum(rate for rate, _ in measured), float(np.mean([busy for _, busy in measured]))


def ours(settings: TrainSettings, workers: int, seconds: float) -> Measured:
    """Our loader."""
    with loader(settings, workers) as counts:
        return measure(counts, seconds)


def main(argv: list[str] | None = None) -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--energon", metavar="DIR", help="site-packages that hold megatron-energon")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2], help="reader processes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each side (%(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    sides: dict[str, Callable[[TrainSettings, int, float], Measured]] = {
        BARE: partial(loop, BARE),
        BARE_KEPT: partial(loop, BARE_KEPT),
        ENCODING: partial(loop, ENCODING),
        "loader": ours,
    }
    with tempfile.TemporaryDirectory() as name:
        settings = write_corpus(Path(name))
        if arguments.energon:
            sys.path.append(arguments.energon)
            from benchmarks.loader_energon import energon, prepare

            prepare(Path(name))
            sides["energon"] = energon
        result = Result("loader", __doc__ or "")
        for workers in arguments.workers:
            found: dict[str, list[Measured]] = {side: [] for side in sides}
            for _ in range(arguments.rounds):
                for side, run in sides.items():
                    found[side].append(run(settings, workers, arguments.seconds))
            best = {side: (max(r for r, _ in some), min(b for _, b in some)) for side, some in found.items()}
            for side, (rate, busy) in best.items():
                row: dict[str, Any] = {
                    "workers": workers,
                    "side": side,
                    "samples/s": round(rate, 1),
                    "processor ms a sample": round(busy, 2),
                    "samples/s, loader over this": round(best["loader"][0] / rate, 3),
                    "processor time, this over loader": round(busy / best["loader"][1], 3),
                }
                result.add(row)
    result.write()


if __name__ == "__main__":
    main()
