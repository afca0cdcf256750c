"""The plan of a stage on a made-up index with Keye-like sizes: balance, mix, fill, time. No model, no media.

    python -m benchmarks.plan

Two mixes of 1,000,000 samples: "web" (45 % captions, 20 % OCR, 15 % VQA, 12 % text, 8 % video: mean 1,670 tokens, 1 %
above 12,000) and "video" (28 % video). A video is one segment of attention. Cost: forward and backward of the published
model, everything trained. Samples longer than a pack are left out ("too long"). Figures are those of the real plan:

- balance: mean cost of the packs of a micro-step over that of its slowest, mean over micro-steps; "random" has the same
  packs in random order. Where a rank has one micro-batch, data.balance_packs is the number of ranks; else the default.
- mix: how far the share of a source in a global batch strays from its mean, over how far it strays where the same packs
  come in random order (quadratic means over batches); the source for which this is worst.
- fill of the token budget, and of the one that is scarcer over all packs: where patches run out first ("video, few
  patches" has 3 a token of the budget instead of 4), packs cannot be full of tokens.
- time: what every rank spends to know its part of the plan, divided by all samples planned, not by its own: drawing,
  looking up sizes, packing, cost, balance, global batches, ``assign`` to the ranks, and the samples of rank 0 as named
  tuples. Processor time; "wall" is by the clock, longer where the machine does other things. Sizes are in memory:
  reading indexes is not in it (see ``index``). Memory: peak of the process above its resting one.

A window is 65,536 samples, or as many as eight global batches take.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.results import Result
from keye_train.data.corpus import Corpus, Sizes, Source
from keye_train.data.cost import language_cost
from keye_train.data.index import ShardHeader
from keye_train.data.packing import Budget
from keye_train.data.plan import Pack, Plan, assign
from keye_train.model.configuration import KeyeConfig
from keye_train.model.flops import FlopCoefficients
from keye_train.settings import ResolutionSettings

MIXES = {
    "web": {"caption": 0.45, "ocr": 0.2, "vqa": 0.15, "text": 0.12, "video": 0.08},
    "video": {"caption": 0.35, "ocr": 0.15, "vqa": 0.12, "text": 0.1, "video": 0.28},
}
TEXT_LOG_MEAN = {"caption": 4.5, "ocr": 5.5, "vqa": 5.0, "text": 6.3, "video": 5.0}
VISION_LOG = {"caption": (6.43, 0.7), "ocr": (7.13, 0.7), "vqa": (6.53, 0.7), "video": (8.8, 0.5)}  # mean, spread
MOST_VISION = {"caption": 6_000, "ocr": 6_000, "vqa": 6_000, "video": 16_000}
SAMPLES, WINDOW, LEAST_BATCHES = 1_000_000, 65_536, 8
MEASURED, MEASURED_SAMPLES = 40, 180_000  # global batches and samples at least: several windows
RANKS, MICRO_BATCHES, TOKENS = (64, 1024), (4, 1), (8_192, 32_768)


def corpus(shares: dict[str, float], seed: int = 0) -> Corpus:
    """Sources of log-normal sizes."""
    rng = np.random.default_rng(seed)
    sources = {}
    for name, share in shares.items():
        rows = int(SAMPLES * share)
        text = np.exp(rng.normal(TEXT_LOG_MEAN[name], 0.7, rows)).astype(np.int64) + 20
        vision = np.zeros(rows, dtype=np.int64)
        if name in VISION_LOG:
            vision = np.exp(rng.normal(*VISION_LOG[name], rows)).clip(max=MOST_VISION[name]).astype(np.int64)
        tokens, patches = text + vision, 4 * vision
        sizes = Sizes(tokens, tokens**2, patches, patches**2)
        sources[name] = Source(name, (ShardHeader(name, rows, 1, "", ""),), np.array([0, rows]), sizes, {})
    return Corpus(sources, ResolutionSettings())


def measure(mix: str, ranks: int, micro_batches: int, tokens: int, patches_a_token: int = 4) -> dict[str, object]:
    """Plan some windows in this process."""
    shares, data = MIXES[mix], corpus(MIXES[mix])
    packs = ranks * micro_batches
    budget = Budget(tokens, patches_a_token * tokens)
    sizes = Sizes.concatenate([source.sizes for source in data.sources.values()])
    lengths = sizes.tokens
    fit = lengths[budget.fits(sizes.tokens, sizes.patches)]
    samples = int(packs * tokens / fit.mean())  # of a global batch
    window = max(WINDOW, LEAST_BATCHES * samples)
    cost = language_cost(FlopCoefficients.of(KeyeConfig()).for_training())
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    resting = _resident_mb("VmRSS")
    like = ranks if micro_batches == 1 else None
    plan = Plan(data, shares, budget, packs, window, 0, cost, balance_packs=like)
    seconds, planned, figures = np.zeros(2), 0, _Figures(len(shares), budget)
    batches = plan.batches()
    while True:
        began = time.process_time(), time.perf_counter()
        batch, after = next(batches)
        micro_steps = assign(batch, ranks)
        for packs_of_ranks in micro_steps:
            _ = packs_of_ranks[0].samples
        seconds += time.process_time() - began[0], time.perf_counter() - began[1]
        planned += sum(len(pack) for pack in batch.packs)
        figures.add(micro_steps)
        least = 2 * LEAST_BATCHES if ranks > 64 else MEASURED
        if after.batch == 0 and batch.step + 1 >= least and planned >= MEASURED_SAMPLES:
            break
    return {
        "mix": mix if patches_a_token == 4 else f"{mix}, few patches",
        "ranks": ranks,
        "micro-batches": micro_batches,
        "pack tokens": tokens,
        "batches": batch.step + 1,
        "too long, %": round(100 * (1 - len(fit) / len(lengths)), 1),
        **figures.summary(ranks),
        "planning, us a sample": round(float(seconds[0]) / planned * 1e6, 2),
        "wall, us a sample": round(float(seconds[1]) / planned * 1e6, 2),
        "memory, MB": round(_resident_mb("VmHWM") - resting),
    }


class _Figures:
    def __init__(self, sources: int, budget: Budget) -> None:
        self._sources, self._budget = sources, budget
        self._balance: list[float] = []
        self._fill: list[np.ndarray] = []  # of each batch: mean over its packs of tokens, patches
        self._costs: list[list[float]] = []
        self._counts: list[np.ndarray] = []  # of each batch: [packs, sources] samples

    def add(self, micro_steps: list[list[Pack]]) -> None:
        packs = [pack for micro_step in micro_steps for pack in micro_step]
        costs = np.array([pack.cost for pack in packs]).reshape(len(micro_steps), -1)
        self._balance += (costs.mean(axis=1) / costs.max(axis=1)).tolist()
        self._costs.append(costs.ravel().tolist())
        of_pack = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        sources, _, tokens, patches = np.array([one for pack in packs for one in pack.samples]).T
        self._fill.append(np.array([tokens.sum() / self._budget.max_tokens, patches.sum() / self._budget.max_patches]))
        self._fill[-1] /= len(packs)
        counts = np.bincount(of_pack * self._sources + sources, minlength=len(packs) * self._sources)
        self._counts.append(counts.reshape(-1, self._sources))

    def summary(self, ranks: int) -> dict[str, object]:
        rng = np.random.default_rng(0)
        costs, counts = np.array(self._costs), np.stack(self._counts)
        plain = rng.permutation(costs.ravel()).reshape(-1, ranks)
        own, chance = _strays(counts.sum(axis=1)), []
        for _ in range(20):
            order = rng.permutation(counts.shape[0] * counts.shape[1])
            chance.append(_strays(counts.reshape(-1, self._sources)[order].reshape(counts.shape).sum(axis=1)))
        ratio = np.sqrt(own / np.mean(chance, axis=0))
        return {
            "balance": round(float(np.mean(self._balance)), 4),
            "random": round(float((plain.mean(axis=1) / plain.max(axis=1)).mean()), 3),
            "mix, x random": round(float(ratio.max()), 2),
            "fill, %": round(100 * float(np.mean(self._fill, axis=0)[0]), 3),
            "scarcer budget, %": round(100 * float(np.mean(self._fill, axis=0).max()), 3),
        }


def _strays(counts: np.ndarray) -> np.ndarray:
    """Mean square over batches of the share of each source less its mean: [sources]."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    return ((shares - counts.sum(axis=0) / counts.sum()) ** 2).mean(axis=0)


def _resident_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def main() -> None:
    """Print and store the table; a process for each row, so that memory is that of one."""
    result = Result("plan", __doc__ or "")
    cases: list[tuple[object, ...]] = [
        ("web", ranks, micro, tokens) for ranks in RANKS for micro in MICRO_BATCHES for tokens in TOKENS
    ]
    cases += [("video", 64, micro, tokens) for micro in MICRO_BATCHES for tokens in TOKENS]
    cases.append(("video", 64, 4, 8_192, 3))
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.plan", json.dumps(case)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        result.add(json.loads(found))
    result.write()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        main()
