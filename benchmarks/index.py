"""Indexing shards against bare reading with sha256 of the same shards, and against the tokenizer alone; one process.

    python -m benchmarks.index --tokenizer FOLDER

The shards are made for the run: JPEGs of 300 to 700 pixels a side with a caption and the JSON of img2dataset
(LAION-like), small PNGs with a short conversation (demo-like), and JPEGs with 2 to 8 exchanges (LLaVA-like): in 21
words; in a vocabulary of 50,000 words, each as frequent as one over its rank; and in Chinese characters without spaces.

Every shard is indexed once, after another one of its kind: words of the kind have been counted before, these texts have
not. The shards are in the page cache, and the tokenizer has one thread, as in the processes of ``keye-data index``.
Alone it encodes the same texts, equal ones of 128 samples once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from benchmarks.results import Result
from data_tools.index_cmd import load_tokenizer
from data_tools.shards import sample_key, write_shard
from keye_train.data.formats import parse_with_turns
from keye_train.data.index import tokenizer_fingerprint
from keye_train.data.indexing import BATCH_SAMPLES, build_index
from keye_train.data.paths import index_file, offsets_file, sizes_file
from keye_train.data.tar import walk_shard
from keye_train.runs import file_sha256
from keye_train.sample import SampleRef

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
SYLLABLES = [first + vowel + last for first in "bdfglmnprst" for vowel in "aeiou" for last in ("", "n", "r", "st")]
Members = dict[str, bytes]
Writer = Callable[[np.random.Generator, int], str]
"""So many words, or characters, of text."""
VOCABULARY = 50_000


def few_words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, count))


def many_words(rng: np.random.Generator, count: int) -> str:
    """Words made of syllables; the density of the logarithm of their rank is even, as Zipf found."""
    ranks = np.exp(rng.uniform(0, np.log(VOCABULARY), count)).astype(int)
    return " ".join(map(invented_word, ranks.tolist()))


@cache
def invented_word(rank: int) -> str:
    rng = np.random.default_rng(rank)
    return "".join(rng.choice(SYLLABLES, 1 + len(str(rank)) // 2))


def chinese(rng: np.random.Generator, count: int) -> str:
    """Characters of the first 3,000, a comma behind each tenth or so."""
    text = [chr(0x4E00 + int(3000 * place)) for place in rng.uniform(0, 1, 2 * count)]
    return "".join(one + ("，" if rng.uniform() < 0.1 else "") for one in text)


def picture(rng: np.random.Generator, width: int, height: int, kind: str) -> bytes:
    """Smooth blotches with grain, which compress like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24 + 1, width // 24 + 1, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels + rng.integers(-9, 10, pixels.shape), 0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def laion_like(count: int, seed: int) -> Iterator[Members]:
    rng = np.random.default_rng(seed)
    pictures = [picture(rng, *(int(side) for side in rng.integers(300, 700, 2)), "JPEG") for _ in range(40)]
    for number in range(seed * count, (seed + 1) * count):
        caption = f"{few_words(rng, int(rng.integers(6, 25)))} {number}"
        record = {
            "caption": caption,
            "url": f"http://example.com/{number}.jpg",
            "key": str(number),
            "status": "success",
        }
        record |= {"original_width": 640, "original_height": 480, "exif": "{}", "sha256": f"{number:064x}"}
        yield {"jpg": pictures[number % 40], "txt": caption.encode(), "json": json.dumps(record).encode()}


def demo_like(count: int, seed: int) -> Iterator[Members]:
    rng = np.random.default_rng(seed)
    pictures = [picture(rng, 56, 56, "PNG") for _ in range(40)]
    for number in range(seed * count, (seed + 1) * count):
        asked = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "How many boats are there?"}]
        answer = {"role": "assistant", "content": f"There are {number}."}
        record = {"messages": [{"role": "user", "content": asked}, answer], "task": "count", "answer": str(number)}
        yield {"0.png": pictures[number % 40], "json": json.dumps(record).encode()}


def chat_like(write: Writer, count: int, seed: int) -> Iterator[Members]:
    rng = np.random.default_rng(seed)
    pictures = [picture(rng, *(int(side) for side in rng.integers(300, 700, 2)), "JPEG") for _ in range(40)]
    for number in range(seed * count, (seed + 1) * count):
        turns: list[dict[str, str]] = []
        for turn in range(int(rng.integers(2, 9))):
            asked, answered = (write(rng, int(rng.integers(2, most))) for most in (20, 60))
            turns.append({"from": "human", "value": asked + "?" if turn else f"<image>\n{asked}?"})
            turns.append({"from": "gpt", "value": f"{answered} {number}."})
        yield {"jpg": pictures[number % 40], "json": json.dumps({"conversations": turns}).encode()}


KINDS: dict[str, Callable[[int, int], Iterator[Members]]] = {
    "LAION-like": laion_like,
    "demo-like": demo_like,
    "LLaVA-like, 21 words": partial(chat_like, few_words),
    "LLaVA-like, 50,000 words": partial(chat_like, many_words),
    "LLaVA-like, Chinese": partial(chat_like, chinese),
}


def tokenizer_alone(tokenizer: PreTrainedTokenizerBase, shard: Path) -> float:
    """Seconds in which the tokenizer encodes the texts of a shard, equal ones of ``BATCH_SAMPLES`` once."""
    core = tokenizer.backend_tokenizer
    raws = [parse_with_turns(SampleRef("", "", raw.key), raw.members)[1] for raw in walk_shard(shard)]
    seconds = 0.0
    for start in range(0, len(raws), BATCH_SAMPLES):
        turns = [turn for own in raws[start : start + BATCH_SAMPLES] for turn in own]
        texts = dict.fromkeys(part for turn in turns for part in turn.content if isinstance(part, str))
        began = time.perf_counter()
        core.encode_batch_fast([*texts], add_special_tokens=False)
        seconds += time.perf_counter() - began
    return seconds


def measured(
    name: str, folder: Path, samples: int, tokenizer: PreTrainedTokenizerBase, fingerprint: str
) -> dict[str, str | int | float]:
    """The row of one kind of shard."""
    size, times = 0, np.zeros(4)
    for seed in range(3):
        shard = folder / f"{seed}.tar"
        keyed = ((sample_key(number), members) for number, members in enumerate(KINDS[name](samples, seed)))
        size = write_shard(shard, keyed).size_bytes
        began, began_cpu = time.perf_counter(), time.process_time()
        build_index(shard, tokenizer, fingerprint)
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        began = time.perf_counter()
        file_sha256(shard)
        bare = time.perf_counter() - began
        own = np.array([seconds, cpu, bare, tokenizer_alone(tokenizer, shard)])
        if seed == 1 or (seed > 1 and seconds < times[0]):  # the first is for words to be known
            times = own
    seconds, cpu, bare, alone = times.tolist()
    stored = sum(Path(file).stat().st_size for file in (index_file(shard), offsets_file(shard), sizes_file(shard)))
    return {
        "shard": name,
        "bytes a sample": size // samples,
        "index, samples/s": round(samples / seconds),
        "index, MB/s": round(size / seconds / 1e6),
        "index, us of CPU a sample": round(cpu / samples * 1e6),
        "bare read + sha256, MB/s": round(size / bare / 1e6),
        "share of bare reading": f"{bare / seconds:.0%}",
        "tokenizer alone, samples/s": round(samples / alone),
        "index on disk, bytes a sample": round(stored / samples, 1),
    }


def main() -> None:
    """Print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=3000)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, fingerprint = load_tokenizer(arguments.tokenizer), tokenizer_fingerprint(arguments.tokenizer)
    result = Result("index", __doc__ or "")
    for name in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            result.add(measured(name, Path(folder), arguments.samples, tokenizer, fingerprint))
    result.write()


if __name__ == "__main__":
    main()
