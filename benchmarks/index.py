"""Indexing shards of image-text pairs against bare reading with sha256 of the same shards, one process.

    python -m benchmarks.index --tokenizer FOLDER

The shards are made for the run: JPEGs of 300 to 700 pixels a side with a caption and the JSON of img2dataset
(LAION-like), small PNGs with a short conversation (demo-like), and JPEGs with 2 to 8 exchanges (LLaVA-like). Both
passes find the shards in the page cache.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.results import Result
from data_tools.index_cmd import load_tokenizer
from data_tools.shards import sample_key, write_shard
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import build_index
from keye_train.data.paths import index_file, offsets_file, sizes_file
from keye_train.runs import file_sha256

WORDS = [
    "a",
    "photo",
    "of",
    "the",
    "old",
    "red",
    "lighthouse",
    "near",
    "two",
    "boats",
    "on",
    "quiet",
    "water",
    "with",
    "people",
    "and",
    "dogs",
    "in",
    "front",
    "of",
    "it",
]
Members = dict[str, bytes]


def picture(rng: np.random.Generator, width: int, height: int, kind: str) -> bytes:
    """Smooth blotches with grain, which compress like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24 + 1, width // 24 + 1, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels + rng.integers(-9, 10, pixels.shape), 0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def laion_like(count: int) -> Iterator[Members]:
    rng = np.random.default_rng(0)
    pictures = [picture(rng, *(int(side) for side in rng.integers(300, 700, 2)), "JPEG") for _ in range(40)]
    for number in range(count):
        caption = " ".join(rng.choice(WORDS, int(rng.integers(6, 25)))) + f" {number}"
        record = {
            "caption": caption,
            "url": f"http://example.com/{number}.jpg",
            "key": str(number),
            "status": "success",
        }
        record |= {"original_width": 640, "original_height": 480, "exif": "{}", "sha256": f"{number:064x}"}
        yield {"jpg": pictures[number % 40], "txt": caption.encode(), "json": json.dumps(record).encode()}


def demo_like(count: int) -> Iterator[Members]:
    rng = np.random.default_rng(1)
    pictures = [picture(rng, 56, 56, "PNG") for _ in range(40)]
    for number in range(count):
        asked = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "How many boats are there?"}]
        answer = {"role": "assistant", "content": f"There are {number}."}
        record = {"messages": [{"role": "user", "content": asked}, answer], "task": "count", "answer": str(number)}
        yield {"0.png": pictures[number % 40], "json": json.dumps(record).encode()}


def chat_like(count: int) -> Iterator[Members]:
    rng = np.random.default_rng(2)
    pictures = [picture(rng, *(int(side) for side in rng.integers(300, 700, 2)), "JPEG") for _ in range(40)]
    for number in range(count):
        turns: list[dict[str, str]] = []
        for turn in range(int(rng.integers(2, 9))):
            asked, answered = (" ".join(rng.choice(WORDS, int(rng.integers(2, most)))) for most in (20, 60))
            turns.append({"from": "human", "value": asked + "?" if turn else f"<image>\n{asked}?"})
            turns.append({"from": "gpt", "value": f"{answered} {number}."})
        yield {"jpg": pictures[number % 40], "json": json.dumps({"conversations": turns}).encode()}


def main() -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=5000)
    arguments = parser.parse_args()
    tokenizer, fingerprint = load_tokenizer(arguments.tokenizer), tokenizer_fingerprint(arguments.tokenizer)
    result = Result("index", __doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        for name, samples in (("LAION-like", laion_like), ("demo-like", demo_like), ("LLaVA-like", chat_like)):
            shard = Path(folder) / f"{name}.tar"
            keyed = ((sample_key(number), members) for number, members in enumerate(samples(arguments.samples)))
            size = write_shard(shard, keyed).size_bytes
            build_index(shard, tokenizer, fingerprint)  # caches of the tokenizer
            began, began_cpu = time.perf_counter(), time.process_time()
            build_index(shard, tokenizer, fingerprint)
            seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
            began = time.perf_counter()
            file_sha256(shard)
            bare = time.perf_counter() - began
            stored = sum(
                Path(name).stat().st_size for name in (index_file(shard), offsets_file(shard), sizes_file(shard))
            )
            result.add(
                {
                    "shard": name,
                    "bytes a sample": size // arguments.samples,
                    "index, samples/s": round(arguments.samples / seconds),
                    "index, MB/s": round(size / seconds / 1e6),
                    "index, us of CPU a sample": round(cpu / arguments.samples * 1e6),
                    "bare read + sha256, MB/s": round(size / bare / 1e6),
                    "share of bare reading": f"{bare / seconds:.0%}",
                    "index on disk, bytes a sample": round(stored / arguments.samples, 1),
                }
            )
    result.write()


if __name__ == "__main__":
    main()
