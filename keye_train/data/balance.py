"""Packs of a window into global batches: packs that run at the same time cost alike, batches hold the recipe's mix.

1. *Groups*: packs in order of cost, cut every ``like_packs``. A world of ``like_packs`` ranks, or of a divisor, reads
   each group in whole micro-steps, so its ranks wait for nobody. A few places of each group go to the cheapest packs of
   the window: nobody waits for those, and they hold most of the long texts, which a group of them would heap up.
2. *Strata*: groups in order of cost, cut into as many strata as a batch has groups. A batch takes one group of each
   stratum, so all batches cost alike, too.
3. *Mix*: which group of a stratum goes to which batch is free. Dear packs have more video, cheap ones more text, and
   where chance would leave a batch with too much of a source, the choice brings it back.

Where a batch has fewer than ``MIXED_GROUPS`` groups, they cannot make up for each other, and balance and mix pull in
opposite directions: the sources of a dear batch are those of dear packs. Then packs count as equal within a tolerance
(see ``TOLERANCE``), groups are dealt evenly from equal packs, and the mix is made up for over a run of batches instead.

Whole numbers and stable sorts decide, so that every machine forms the same batches.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from keye_train.data.mixture import shuffled

MIXED_GROUPS = 4
"""Groups, of all strata, over which the mix of sources is made up for: those of one batch, or of a run of batches."""

TOLERANCE = 0.05
"""Packs cost the same if they differ by at most this share, over the square of the groups of a batch. On a Keye-like
mix of 8,192 tokens a pack without accumulation it leaves a balance of 0.954 at 1,024 ranks,
and the sources of a batch stray 40 times as much as in random order. An earlier packing had 0.953 and 44 times, and at
0.07 a balance of 0.948 and 42 times."""

FILLERS = Fraction(3, 64)
"""Share of each group that the cheapest packs of the window take. They cost about a hundredth of the balance; without
them the share of texts differs from batch to batch twice as much as chance would have it."""

SWEEPS = 2
"""How often each group's choice is made; the second time it knows all others. More change little."""

CHOICE = 64
"""Groups among which one choice is made: time grows with their number, and chance leaves little to make up for."""


def form_batches(costs: np.ndarray, mix: np.ndarray, batch_packs: int, like_packs: int, seed: int) -> np.ndarray:
    """Spread packs over global batches.

    Args:
        costs: [N] of each pack, in any unit; N is a multiple of ``batch_packs``.
        mix: [N, K] int64: samples of each source in each pack.
        batch_packs: packs of a global batch.
        like_packs: packs of a group; a divisor of ``batch_packs``.
        seed: of the order of the batches.

    Returns:
        [N / batch_packs, batch_packs] int64: every pack once.
    """
    assert batch_packs % like_packs == 0, "groups do not divide a batch"
    assert len(costs) % batch_packs == 0, "batches do not divide the packs"
    if not len(costs):
        return np.zeros((0, batch_packs), dtype=np.int64)
    per_batch = batch_packs // like_packs
    groups = _groups(costs, mix, like_packs, TOLERANCE / per_batch**2)
    per_run = per_batch * -(-MIXED_GROUPS // per_batch)  # strata: the groups of one batch, or of a run of batches
    runs = -(-len(groups) // per_run)
    strata = [np.arange(start, min(start + runs, len(groups))) for start in range(0, len(groups), runs)]
    surplus = _surplus(mix[groups].sum(axis=1))
    chosen = _choose(surplus, strata, runs, seed)
    order = chosen[shuffled(runs, seed)]
    if per_run > per_batch:  # else all of a run are in one batch
        for number, row in enumerate(order):
            order[number] = row[shuffled(len(row), seed + 1 + number)]
    return groups[order[order >= 0]].reshape(-1, batch_packs)


def _groups(costs: np.ndarray, mix: np.ndarray, like_packs: int, tolerance: float) -> np.ndarray:
    """Packs of like cost, the dearest first, and fillers behind them: [groups, like_packs]."""
    by_cost = np.argsort(-costs, kind="stable")
    fillers = int(like_packs * FILLERS)
    count = len(costs) // like_packs
    body = by_cost[: count * (like_packs - fillers)].reshape(count, -1)
    dearest, cheapest = costs[body[:, 0]], costs[body[:, -1]]
    groups = np.empty((count, like_packs), dtype=np.int64)
    groups[:, body.shape[1] :] = _deal(by_cost[body.size :], mix, count)
    start = 0
    while start < count:
        equal = cheapest[start:] >= (1 - tolerance) * dearest[start]
        stop = start + max(len(equal) if equal.all() else int(equal.argmin()), 1)
        groups[start:stop, : body.shape[1]] = _deal(body[start:stop].ravel(), mix, stop - start)
        start = stop
    return groups


def _deal(packs: np.ndarray, mix: np.ndarray, count: int) -> np.ndarray:
    """Packs in ``count`` equal parts of about the same mix: neighbours in mix go to different parts."""
    columns = tuple(mix[packs].T)
    return packs[np.lexsort(columns)].reshape(-1, count).T


def _surplus(counts: np.ndarray) -> np.ndarray:
    """Samples of each source above its share in each group, in units of what chance would do: [groups, K] int64."""
    total, of_source = int(counts.sum()), counts.sum(axis=0)
    above = counts * total - counts.sum(axis=1, keepdims=True) * of_source
    chance = np.sqrt(of_source / len(counts)) * total  # of counts with this mean, a standard deviation; sqrt is exact
    return np.rint(above * (256 / np.maximum(chance, 1))).astype(np.int64)


def _choose(surplus: np.ndarray, strata: list[np.ndarray], runs: int, seed: int) -> np.ndarray:
    """One group of each stratum for each run, so that the surplus of each run is small: [runs, strata], -1: none.

    Runs with the largest surplus choose first, each the group that brings it closest to zero.
    """
    chosen = np.full((runs, len(strata)), -1, dtype=np.int64)
    for number, groups in enumerate(strata):
        chosen[: len(groups), number] = groups[shuffled(len(groups), seed - 1 - number)]
    parts = [slice(start, start + CHOICE) for start in range(0, runs, CHOICE)]
    with_none = np.concatenate([surplus, np.zeros_like(surplus[:1])])  # group -1 adds nothing
    for part in parts:
        mine = chosen[part]
        sums = with_none[mine].sum(axis=1)
        for _ in range(SWEEPS):
            for number in range(len(strata)):
                free = mine[:, number].copy()
                offered = with_none[free]
                sums -= offered
                for run in np.argsort(-(sums**2).sum(axis=1), kind="stable").tolist():
                    take = int(((offered + sums[run]) ** 2).sum(axis=1).argmin())
                    mine[run, number] = free[take]
                    sums[run] += offered[take]
                    free[take], free = free[-1], free[:-1]
                    offered[take], offered = offered[-1], offered[:-1]
    return chosen
