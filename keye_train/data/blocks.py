"""The order of a source too large for a full shuffle: blocks of neighbouring rows, and rows within groups of blocks.

A full shuffle of a billion rows makes every window touch every shard. Here a *block* is ``block_rows`` neighbouring
rows. The blocks of the whole source are permuted; ``group_blocks`` of them that follow each other form a *group*, and
the rows of a group are permuted. A window then touches the blocks of a group or two, all other rows stay on the disk,
and the row at any position is still found in constant time without a table.

How far that is from a full shuffle: a window sees rows from ``group_blocks`` places chosen at random, and the windows
that share a group share those places. Rows of one block (about a thousand neighbours of one shard) come within
``block_rows * group_blocks`` draws of each other instead of anywhere in the epoch.
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
        self._full, self._tail = divmod(size, block_rows)  # full blocks, rows of the short one
        self._places = self._full + (self._tail > 0)
        self._groups = max(1, round(self._places / group_blocks))  # of even size, so that none is a poor mix
        self._blocks = Shuffle(self._full, seed, f"{name}/blocks")
        self._rows = Shuffle(-(-self._places // self._groups) * block_rows, seed, f"{name}/rows")
        digest = hashlib.blake2b(f"{seed}/{name}/tail".encode(), digest_size=8).digest()
        self._key = np.uint64(int.from_bytes(digest, "little"))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Rows at the given positions of the endless order.

        Args:
            positions: [N] int64, 0 or more; position p belongs to epoch p // size.

        Returns:
            [N] int64.
        """
        epoch, position = np.divmod(positions, self.size)
        keys = mixed(self._key + epoch.astype(np.uint64))
        # The short block stands anywhere among the others, elsewhere in each epoch.
        short = (keys % np.uint64(self._full + 1)).astype(np.int64) if self._tail else np.full(len(epoch), self._places)
        place, _ = self._locate(position, short)
        group = ((place + 1) * self._groups - 1) // self._places
        first = self._start(group * self._places // self._groups, short)
        behind = self._start((group + 1) * self._places // self._groups, short)
        own = mixed(keys ^ group.astype(np.uint64))
        within = self._rows.permute((position - first).astype(np.uint64), own, (behind - first).astype(np.uint64))
        place, offset = self._locate(first + within, short)
        full = place != short
        rows = self._full * self._block + offset
        rows[full] = offset[full] + self._block * self._blocks.rows(
            epoch[full] * self._full + place[full] - (place[full] > short[full])
        )
        return rows

    def _locate(self, position: np.ndarray, short: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place of the block at a position of the epoch, and the offset in the block."""
        before, behind = short * self._block, short * self._block + self._tail
        place, offset = np.divmod(position - np.where(position >= behind, self._tail, 0), self._block)
        place += (position >= behind) & (self._tail > 0)
        in_short = (position >= before) & (position < behind)
        return np.where(in_short, short, place), np.where(in_short, position - before, offset)

    def _start(self, place: np.ndarray, short: np.ndarray) -> np.ndarray:
        """First position of the block at a place."""
        return place * self._block - np.where(place > short, self._block - self._tail, 0)


def row_order(size: int, seed: int, name: str, block_rows: int, group_blocks: int) -> Shuffle | BlockShuffle:
    """The order of a source: a full shuffle where it is no larger than a group."""
    if size <= block_rows * group_blocks:
        return Shuffle(size, seed, name)
    return BlockShuffle(size, seed, name, block_rows, group_blocks)
