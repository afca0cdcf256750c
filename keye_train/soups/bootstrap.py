"""How sure a difference between candidates is: the paired bootstrap over held-out samples.

Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13 (percentile interval). Samples are drawn with
replacement within each task, the same ones for every candidate, so what all find easy or hard cancels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keye_train.evaluation.candidates import Values

_COUNTS_BYTES = 64 * 2**20  # of the counts of one block of draws


def resample(candidates: Sequence[Values], draws: int, seed: int) -> np.ndarray:
    """Means over tasks on resampled samples: [draws, C] float64, column c of candidate c.

    Args:
        candidates: C candidates on the same samples.
        draws: resamples.
        seed: of the draw.
    """
    tasks = sorted(candidates[0].value)  # values that were kept come back in another order; draws must not
    means = np.zeros((draws, len(candidates)))
    for number, task in enumerate(tasks):
        value = np.stack([one.value[task] for one in candidates], axis=1)  # [N, C]
        weight = np.stack([one.weight[task] for one in candidates], axis=1)
        generator = np.random.default_rng([seed, number])
        size = len(value)
        block = max(1, _COUNTS_BYTES // (8 * size))
        for begin in range(0, draws, block):
            count = min(block, draws - begin)
            drawn = generator.integers(0, size, (count, size))
            counts = np.zeros((count, size))
            np.add.at(counts, (np.arange(count)[:, None], drawn), 1.0)
            means[begin : begin + count] += (counts @ value) / (counts @ weight)
    return means / len(tasks)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of ``values`` [draws]."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
