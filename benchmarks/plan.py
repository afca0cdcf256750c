"""Planning on a made-up index with Keye-like sizes: time, fill, balance. Metadata only, no model, no media.

    python -m benchmarks.plan

Balance is the mean cost of the packs of a micro-step over the most expensive one, 64 ranks and 4 micro-steps; beside it
the same packs in random order.
"""

from __future__ import annotations

import time
from itertools import islice

import numpy as np

from benchmarks.results import Result
from keye_train.data.corpus import Corpus, Sizes, Source
from keye_train.data.cost import language_cost
from keye_train.data.index import ShardHeader
from keye_train.data.packing import Budget
from keye_train.data.plan import Plan, assign
from keye_train.model.configuration import KeyeConfig
from keye_train.model.flops import FlopCoefficients
from keye_train.settings import ResolutionSettings

SHARES = {"caption": 0.45, "ocr": 0.2, "vqa": 0.15, "text": 0.12, "video": 0.08}
TEXT_LOG_MEAN = {"caption": 4.5, "ocr": 5.5, "vqa": 5.0, "text": 6.3, "video": 5.0}
VISION_LOG_MEAN = {"caption": 6.2, "ocr": 6.9, "vqa": 6.3, "text": None, "video": 8.4}
SAMPLES, RANKS, MICRO_STEPS, WINDOW, BATCHES = 300_000, 64, 4, 65_536, 12


def corpus(seed: int = 0) -> Corpus:
    """Sources of log-normal sizes; a video is one attention segment."""
    rng = np.random.default_rng(seed)
    sources = {}
    for name, share in SHARES.items():
        rows = int(SAMPLES * share)
        text = np.exp(rng.normal(TEXT_LOG_MEAN[name], 0.7, rows)).astype(np.int64) + 20
        log_mean = VISION_LOG_MEAN[name]
        vision = np.zeros(rows, dtype=np.int64) if log_mean is None else np.exp(rng.normal(log_mean, 0.8, rows))
        vision = np.minimum(vision, 12_000).astype(np.int64)
        tokens, patches = text + vision, 4 * vision
        sizes = Sizes(tokens, tokens**2, patches, patches**2)
        sources[name] = Source(name, (ShardHeader(name, rows, 1, "", ""),), np.array([0, rows]), sizes, {})
    return Corpus(sources, ResolutionSettings())


def main() -> None:
    """Print and store the table."""
    result = Result("plan", __doc__ or "")
    data = corpus()
    rng = np.random.default_rng(0)
    for tokens in (8_192, 32_768):
        packs = RANKS * MICRO_STEPS
        plan = Plan(
            data,
            SHARES,
            Budget(tokens, 4 * tokens),
            packs,
            WINDOW,
            0,
            language_cost(FlopCoefficients.of(KeyeConfig()).for_training()),
        )
        batches = plan.batches()
        began = time.process_time()
        first = next(batches)
        seconds = time.process_time() - began
        fill, balance, unordered = [], [], []
        for batch, _ in [first, *islice(batches, BATCHES)]:
            fill += [pack.tokens / tokens for pack in batch.packs]
            for micro_step in assign(batch, RANKS):
                costs = [pack.cost for pack in micro_step]
                balance.append(np.mean(costs) / max(costs))
            shuffled = rng.permutation([pack.cost for pack in batch.packs]).reshape(MICRO_STEPS, RANKS)
            unordered += (shuffled.mean(axis=1) / shuffled.max(axis=1)).tolist()
        result.add(
            {
                "pack tokens": tokens,
                "planning, us a sample": round(seconds / WINDOW * 1e6, 1),
                "fill": round(float(np.mean(fill)), 4),
                "balance": round(float(np.mean(balance)), 3),
                "balance in random order": round(float(np.mean(unordered)), 3),
            }
        )
    result.write()


if __name__ == "__main__":
    main()
