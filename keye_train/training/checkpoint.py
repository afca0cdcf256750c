"""What a run saves besides tensors, and the choice of the checkpoint that it goes on from.

The files are described in :mod:`keye_train.checkpoints`; :mod:`keye_train.training.saver` writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keye_train import runs
from keye_train.checkpoints import CheckpointReader, folder
from keye_train.checkpoints.layout import MANIFEST, STATE
from keye_train.settings import SettingsError
from keye_train.training.distributed import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Everything besides tensors that the next step depends on.

    Random numbers need no state: each step seeds its generators from (seed, step, rank).
    """

    step: int  # optimizer steps done
    updates: int  # of these, updates that were applied
    data: dict[str, Any]  # position in the data (keye_train.data.plan)
    refused_in_a_row: int = 0  # updates refused for a non-finite gradient, up to now
    refused_total: int = 0
    wall_s: float = 0.0  # time spent training, over all launches
    spikes: dict[str, Any] = field(default_factory=dict)  # losses so far (keye_train.training.spikes)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    folder: Path
    state: TrainState

    def reader(self) -> CheckpointReader:
        """Reader of its tensors."""
        return CheckpointReader(self.folder)


Foreign = Callable[[dict[str, Any]], str | None]


def newest_whole(
    run_dir: Path, world: World, foreign: Foreign | None = None, until: int | None = None
) -> Checkpoint | None:
    """The newest checkpoint that is whole and of this run; others are named in the log, renamed and passed over.

    Where whole ones are left and all are of another run, that is a mistake and no reason to begin anew: nothing is
    renamed then. The ranks share the reading that checksums need.

    Collective: every rank must reach this, while nobody saves.

    Args:
        run_dir: folder of the run.
        world: the ranks.
        foreign: why a checkpoint with this manifest.json is not of this run; None where it is.
        until: of at most so many steps; newer ones are left as they are. None: of any number.

    Raises:
        SettingsError: every whole checkpoint is of another run; names what differs.
        ValueError: a newer version wrote it.
    """
    place = run_dir / runs.CHECKPOINTS
    error: Exception | None = None
    if world.is_main:
        try:
            folder.clear_unfinished(place)
        except (OSError, ValueError) as caught:
            error = caught
    world.require_all(error, f"clearing {place}")
    found: Checkpoint | None = None
    refused: list[tuple[Path, str | None]] = []  # and why it is foreign; None: torn
    for step, path in folder.newest_first(place):
        if until is not None and step > until:
            continue
        fault = folder.fault(path, world.rank, world.size)
        if fault is not None:
            logger.warning("checkpoint %s is torn (%s)", path, fault)
        torn = world.sum_int([fault is not None])[0] > 0
        why = None
        if not torn and foreign is not None and (path / MANIFEST).exists():  # format 1 had none
            why = foreign(runs.read_json(path / MANIFEST))
        if not torn and why is None:
            found = Checkpoint(path, TrainState(**runs.read_json(path / STATE)))
            break
        refused.append((path, why))
    strangers = [(path, why) for path, why in refused if why is not None]
    if found is None and strangers:
        newest, why = strangers[0]
        raise SettingsError(
            f"run_dir={run_dir}: none of its {len(strangers)} whole checkpoints is of this run ({newest.name}: {why}). "
            f"Restore what differs, choose another run_dir, or delete {place} to begin anew"
        )
    world.barrier()  # all have listed and read them
    error = None
    if world.is_main:
        try:
            for path, why in refused:
                _set_aside(path, why)
        except OSError as caught:
            error = caught
    world.require_all(error, f"setting checkpoints of {place} aside")
    return found


def _set_aside(path: Path, why: str | None) -> None:
    kept = folder.set_aside(path, "torn" if why is None else "foreign")
    logger.warning(
        "checkpoint %s is %s; it is now %s, falling back to an older one",
        path.name,
        "torn" if why is None else f"of another run ({why})",
        kept.name,
    )


def newest_whole_until(run_dir: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint of at most ``step`` steps, for one process that only reads."""
    for found, path in folder.newest_first(run_dir / runs.CHECKPOINTS):
        if found <= step and folder.fault(path) is None:
            return Checkpoint(path, TrainState(**runs.read_json(path / STATE)))
    return None
