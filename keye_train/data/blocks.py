"""The order of a source too large for a full shuffle: blocks of neighbouring rows, and rows within groups of blocks.

A full shuffle of a billion rows makes every window touch every shard. Here a *block* is ``block_rows`` neighbouring
rows, and the source is cut into *strata* of as many neighbouring blocks as there are groups. A *group* has one block of
each stratum, another one in each epoch, so it comes from all parts of the source. The rows of a group are permuted. A
window then touches the blocks of a group or two, all other rows stay on the disk, and the row at any position is still
found in constant time without a table.

How far that is from a full shuffle: a source of up to ``group_blocks`` shards gives every group some of each shard, so
the windows are as alike as those of a full shuffle. Of more shards, a group has some at random, and the windows that
share it share those: the mean of n draws then has the variance (within shards) / n + (between shards) * (1 /
group_blocks - 1 / shards). Rows of one block come within ``block_rows * group_blocks`` draws of each other instead of
anywhere in the epoch.
"""

from __future__ import annotations

import hashlib

import numpy as np

from keye_train.data.mixture import Shuffle, mixed


class BlockShuffle:
    """Endless epochs over the rows 0 .. size - 1 in the order of the module; same use as ``Shuffle``."""

    def __init__(self, size: int, seed: int, name: str, block_rows: int, group_blocks: int) -> None:
        """Args:
        size: rows, at least one block.
        seed, name: key of the order.
        block_rows, group_blocks: see the module.
        """
        assert size >= block_rows > 0, f"source {name} is smaller than a block"
        self.size = size
        self._block = block_rows
        full, self._tail = divmod(size, block_rows)  # full blocks, rows of the short one behind them
        self._groups = max(1, round(full / group_blocks))
        # Every group has a block of each whole stratum; those behind, the short one last, go to some groups only.
        self._strata, extra = divmod(full, self._groups)
        self._extra = extra + (self._tail > 0)
        self._blocks = Shuffle(self._groups, seed, f"{name}/blocks")
        self._rows = Shuffle((self._strata + 1) * block_rows, seed, f"{name}/rows")
        digest = hashlib.blake2b(f"{seed}/{name}/groups".encode(), digest_size=8).digest()
        self._key = np.uint64(int.from_bytes(digest, "little"))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows at the given positions of the endless order.

        Args:
            positions: [N] int64, 0 or more; position p belongs to epoch p // size.

        Returns:
            [N] int64.
        """
        rows = np.empty(len(positions), dtype=np.int64)
        epochs, places = np.divmod(positions, self.size)
        for epoch in np.unique(epochs).tolist():
            mine = np.flatnonzero(epochs == epoch)
            rows[mine] = self._of_epoch(epoch, places[mine])
        return rows

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        key = mixed(self._key + np.uint64(epoch))[0]
        turn = int(key % np.uint64(self._groups))  # which groups have the blocks behind the strata
        low, high = self._group_of(int(places.min()), turn), self._group_of(int(places.max()), turn)
        starts = np.array([self._start(group, turn) for group in range(low, high + 2)])
        group = low + np.searchsorted(starts, places, side="right") - 1
        first, behind = starts[group - low], starts[group - low + 1]
        own = mixed(key ^ group.astype(np.uint64))
        within = self._rows.permute((places - first).astype(np.uint64), own, (behind - first).astype(np.uint64))
        stratum, offset = np.divmod(within, self._block)
        # The block of the group in each stratum: a permutation of the groups, another one for each stratum and epoch.
        keys = mixed(mixed(key) + stratum.astype(np.uint64))
        size = np.full(len(group), self._groups, dtype=np.uint64)
        member = self._blocks.permute(group.astype(np.uint64), keys, size)
        member = np.where(stratum < self._strata, member, (group + turn) % self._groups)
        return (stratum * self._groups + member) * self._block + offset

    def _start(self, group: int, turn: int) -> int:
        """First position of a group."""
        rows = (group * self._strata + self._extras(turn + group) - self._extras(turn)) * self._block
        if self._tail and (self._extra - 1 - turn) % self._groups < group:  # the short block came before
            rows -= self._block - self._tail
        return rows

    def _extras(self, groups: int) -> int:
        """How many of the first so many groups, in endless turns, have a block behind the strata."""
        turns, rest = divmod(groups, self._groups)
        return turns * self._extra + min(rest, self._extra)

    def _group_of(self, place: int, turn: int) -> int:
        """Group of a position of the epoch."""
        low, high = 0, self._groups
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._start(middle, turn) <= place else (low, middle)
        return low


def row_order(size: int, seed: int, name: str, block_rows: int, group_blocks: int) -> Shuffle | BlockShuffle:
    """The order of a source: a full shuffle where it is no larger than a group."""
    if size <= block_rows * group_blocks:
        return Shuffle(size, seed, name)
    return BlockShuffle(size, seed, name, block_rows, group_blocks)
