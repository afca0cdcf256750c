"""What a plan gives out: global batches of packs of samples, how ranks share them, and the position behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from keye_train.data.draw import DrawState
from keye_train.data.mixture import MixtureState, shuffled


class PlannedSample(NamedTuple):
    """One sample of a pack."""

    source: int  # number in Plan.sources
    row: int  # of that source
    tokens: int
    patches: int


class Pack:
    """What one rank reads in one micro-step.

    The plan of all ranks stays in columns, and a rank makes objects of the samples that it reads: those of thousands of
    other ranks would take longer than to plan them.
    """

    __slots__ = ("_columns", "_start", "_stop", "cost")

    def __init__(self, columns: np.ndarray, start: int, stop: int, cost: float) -> None:
        """Args:
        columns: [N, 4] int64: of the samples of a whole window, what ``PlannedSample`` has.
        start, stop: rows of this pack.
        cost: see ``data.cost``.
        """
        self._columns, self._start, self._stop, self.cost = columns, start, stop, cost

    def __len__(self) -> int:
        return self._stop - self._start

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pack) and (self.samples, self.cost) == (other.samples, other.cost)

    def __hash__(self) -> int:
        return hash((self.samples, self.cost))

    def __repr__(self) -> str:
        return f"Pack(samples={self.samples!r}, cost={self.cost!r})"

    @property
    def samples(self) -> tuple[PlannedSample, ...]:
        """Made anew each time that they are asked for."""
        return tuple(map(PlannedSample._make, self._columns[self._start : self._stop].tolist()))

    @property
    def tokens(self) -> int:
        """Language tokens."""
        return int(self._columns[self._start : self._stop, 2].sum())

    @property
    def patches(self) -> int:
        """Vision patches."""
        return int(self._columns[self._start : self._stop, 3].sum())


@dataclass(frozen=True)
class Dropped:
    """A sample that was drawn and will not be read."""

    source: int
    row: int
    reason: str


@dataclass(frozen=True)
class GlobalBatch:
    """What all ranks together read in one optimizer step."""

    step: int  # optimizer step, from 0
    packs: tuple[Pack, ...]
    dropped: tuple[Dropped, ...]  # drawn since the batch before, and given up
    seed: int  # of the order of its micro-steps
    filtered: tuple[int, ...] = ()  # of each source: passed over since the batch before, kept out by its filter


@dataclass(frozen=True)
class PlanState:
    """Position in a plan: what a checkpoint keeps of the data, 5 numbers a source and 6 more.

    The samples that the window before left over are not named: they follow from the draws of its main part, see
    ``window``.
    """

    plan: str  # fingerprint of the plan
    step: int  # global batches given out
    window: int  # windows finished
    batch: int  # global batches given out of the current window
    drawn: tuple[int, ...]  # places of each source's order passed before the current window
    filtered: tuple[int, ...]  # of the places passed: kept out by the filter of the source
    spent: tuple[int, ...]  # of each source in the unit of the mixture, since ``origin``
    origin: int  # drawn in all when a source last left the mixture
    before_drawn: tuple[int, ...]  # the same three numbers where the window before began
    before_spent: tuple[int, ...]
    before_origin: int
    ended: bool = False  # every source has had its last epoch, and all batches are given out

    def to_json(self) -> dict[str, Any]:
        """Plain value for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PlanState:
        """Inverse of ``to_json``, also after a round trip through a JSON file.

        Raises:
            ValueError: the value is of another version of this program.
        """
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            raise ValueError(
                "the checkpoint's data position was written by another version of this program, which plans otherwise "
                f"(it has {sorted(value)}, this one needs {sorted(names)}): go on with that version, or start a new "
                "run in another run_dir"
            )
        numbers: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
        return cls(**numbers)

    @property
    def draw(self) -> DrawState:
        """Position of the draw."""
        return DrawState(self.drawn, MixtureState(self.spent, self.origin))

    @property
    def draw_before(self) -> DrawState | None:
        """Position of the draw where the window before began; None in the first window."""
        if not self.window:
            return None
        return DrawState(self.before_drawn, MixtureState(self.before_spent, self.before_origin))


def assign(batch: GlobalBatch, world_size: int) -> list[list[Pack]]:
    """Spread a global batch over micro-steps and ranks: ``[micro-step][rank] -> pack``.

    Packs that run at the same time are neighbours in cost; the micro-steps and the ranks within them are shuffled.
    Which samples the batch has does not depend on ``world_size``.

    Raises:
        ValueError: the packs do not divide over the ranks.
    """
    if len(batch.packs) % world_size:
        raise ValueError(
            f"stage.global_batch_packs={len(batch.packs)} does not divide over {world_size} ranks: "
            "set it to a multiple of the number of ranks"
        )
    costs = np.array([pack.cost for pack in batch.packs])
    by_cost = np.argsort(-costs, kind="stable").reshape(-1, world_size)
    micro_steps = by_cost[shuffled(len(by_cost), batch.seed)].tolist()
    ranks = [shuffled(world_size, seed_of(batch.seed, number)).tolist() for number in range(len(micro_steps))]
    return [[batch.packs[packs[place]] for place in order] for packs, order in zip(micro_steps, ranks, strict=True)]


def balance(micro_steps: list[list[Pack]]) -> float:
    """Cost of the mean rank over that of the slowest, each summed over micro-steps: 1 where no rank waits for another.

    Args:
        micro_steps: ``[micro-step][rank] -> pack``, as ``assign`` gives them.
    """
    costs = np.array([[pack.cost for pack in packs] for packs in micro_steps])
    slowest = costs.max(axis=1).sum()
    return float(costs.mean(axis=1).sum() / slowest) if slowest else 1.0


def seed_of(*parts: object) -> int:
    """A seed of 64 bits from several values."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
