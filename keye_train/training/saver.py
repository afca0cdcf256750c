"""Saving beside the training: it waits for a copy into host memory, all else happens in a thread.

Each rank writes what it owns; no tensor travels. Three small agreements in the thread, over a gloo group of its own,
make the checkpoint whole or absent:

1. rank 0 has made the folder aside;
2. every rank has written, flushed and sealed its file, and has its part of the ledger on the disk;
3. rank 0 has written index and documents, and renamed the folder.

Where any rank fails for want of disk, the attempt is dropped on all, said loudly, and the training goes on: older
checkpoints are untouched, the next save tries again. Any other failure stops the run at the next save.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye_train import runs
from keye_train.checkpoints import WEIGHTS, NamedSlice, Slice, folder, write_index, write_slices
from keye_train.checkpoints.layout import INDEX, MANIFEST, PREFIX, STATE
from keye_train.settings import CheckpointSettings
from keye_train.training.checkpoint import TrainState
from keye_train.training.distributed import World
from keye_train.training.engine import Engine, HeldSlice

logger = logging.getLogger(__name__)

LISTING = "rank-{:05d}.files.json"


@dataclass(frozen=True)
class SaveFigures:
    """What the last whole checkpoint cost this rank."""

    step: int
    stall_s: float  # that the training waited
    write_s: float  # from the copy to the rename
    written_bytes: int


class Saver:
    """Writes the checkpoints of a run. Construction, ``save`` and ``wait`` are collective.

    With ``checkpoint.background`` each rank keeps room for a copy of what it owns in host memory
    (page-locked where there is a GPU): 12 bytes for each trained parameter over all ranks, 16 with an average.

    Args:
        run_dir: folder of the run.
        engine: what is saved.
        world: the ranks; all must see the same file system.
        settings: how many are kept, which are marked, whether to write in the background.
        manifest: becomes manifest.json of each checkpoint; read on rank 0 only.
    """

    def __init__(
        self, run_dir: Path, engine: Engine, world: World, settings: CheckpointSettings, manifest: Mapping[str, Any]
    ) -> None:
        self._folder = run_dir / runs.CHECKPOINTS
        self._engine, self._settings, self._manifest = engine, settings, manifest
        self._states = (WEIGHTS, *engine.moments)
        # The thread must not use the groups of the training: the order of collectives would differ between ranks.
        self._world = replace(world, host_group=world.another_group()) if settings.background else world
        self._thread: threading.Thread | None = None
        self._buffer: Tensor | None = None
        if settings.background:  # now, so that no save waits for the kernel to hand out the pages
            elements = sum(one.elements for one in engine.owned_slices()) * len(self._states)
            self._buffer = torch.empty(elements, pin_memory=torch.cuda.is_available()).zero_()
        self._fault: BaseException | None = None
        self._stall_s = 0.0
        self.saved_step: int | None = None
        """Step of the newest whole checkpoint that this launch wrote or, where the trainer says so, went on from."""
        self.figures: SaveFigures | None = None

    def save(self, state: TrainState, settle: Callable[[], None] = lambda: None) -> None:
        """Save the training as it stands. Returns once the state is copied; :meth:`wait` says what became of it.

        Args:
            state: all besides tensors.
            settle: has on the disk what this rank wrote elsewhere and no resumed run writes again, or raises OSError.
                Called before the checkpoint is whole, in the thread that writes it.

        Raises:
            RuntimeError: an earlier save failed for another reason than the disk.
        """
        began = time.monotonic()
        self.wait()
        owned = self._engine.owned_slices()
        slices = [NamedSlice(name, one.name, one.start, one.elements) for one in owned for name in self._states]
        if not self._settings.background:
            values = [one.values[kind] for one in owned for kind in self._states]
            self._write(state, slices, lambda number: values[number].to("cpu").contiguous(), settle, began)
            self._raise()
            return
        copied = self._copy(owned)
        self._stall_s = time.monotonic() - began
        self._thread = threading.Thread(
            target=self._write, args=(state, slices, copied.__getitem__, settle), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether this rank's part of a save is still under way. Not collective."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return once no save is under way.

        Raises:
            RuntimeError: it failed for another reason than the disk.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def close(self, patience_s: float) -> None:
        """Wait for a save under way, at most ``patience_s``: another rank may have died. Raises nothing."""
        if self._thread is not None:
            self._thread.join(patience_s)

    def _copy(self, owned: list[HeldSlice]) -> list[Tensor]:
        """Copy all states of the slices into the host buffer, in order."""
        assert self._buffer is not None
        copies, at = [], 0
        for one in owned:
            for state in self._states:
                copies.append(self._buffer[at : at + one.elements])
                copies[-1].copy_(one.values[state], non_blocking=True)
                at += one.elements
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(
        self,
        state: TrainState,
        slices: list[NamedSlice],
        values: Callable[[int], Tensor],
        settle: Callable[[], None],
        waiting_since: float | None = None,
    ) -> None:
        """Write one checkpoint; runs on every rank, in the thread or, without one, in its place.

        ``waiting_since``: on the clock of time.monotonic, where the training waits until it is written.
        """
        began = time.monotonic()
        final = self._folder / f"{PREFIX}{state.step}"
        aside = folder.aside(final)
        try:
            done = (
                self._agreed(lambda: _make_anew(aside), main_only=True)
                and self._agreed(lambda: self._write_own(aside, slices, values, settle))
                and self._agreed(lambda: self._commit(final, state), main_only=True)
            )
            if not done:
                self._drop(aside, state.step)
                return
            self.saved_step = state.step
            written = sum(one.elements for one in slices) * torch.float32.itemsize
            if waiting_since is not None:
                self._stall_s = time.monotonic() - waiting_since
            self.figures = SaveFigures(state.step, self._stall_s, time.monotonic() - began, written)
            if self._world.is_main:
                self._report(final, self.figures)
                self._delete_old(state.step)
        except BaseException as error:
            self._fault = error

    def _write_own(
        self, aside: Path, slices: list[NamedSlice], values: Callable[[int], Tensor], settle: Callable[[], None]
    ) -> None:
        settle()
        name = f"rank-{self._world.rank:05d}.safetensors"
        listing: dict[str, Any] = {"file": name, "slices": []}
        if slices:
            listing["seal"] = write_slices(aside / name, slices, values)
            listing["slices"] = [[one.name, one.start, one.stop] for one in slices if one.state == WEIGHTS]
        runs.write_json_atomic(aside / LISTING.format(self._world.rank), listing)

    def _commit(self, final: Path, state: TrainState) -> None:
        aside = folder.aside(final)
        seals: dict[str, Any] = {}
        held: dict[str, list[Slice]] = {}
        for rank in range(self._world.size):
            path = aside / LISTING.format(rank)
            listing = runs.read_json(path)
            path.unlink()
            if listing["slices"]:
                seals[listing["file"]] = listing["seal"]
            for name, start, stop in listing["slices"]:
                held.setdefault(name, []).append(Slice(start, stop, listing["file"]))
        shapes = {name: self._engine.shapes[name] for name in self._engine.trainable}
        write_index(aside, shapes, self._states, held)
        seals[INDEX] = folder.seal(aside / INDEX)
        every = self._settings.mark_every_steps
        marked = every > 0 and state.step % every == 0
        folder.commit(final, seals, {STATE: asdict(state), MANIFEST: dict(self._manifest)}, marked)

    def _agreed(self, work: Callable[[], None], main_only: bool = False) -> bool:
        """Do a part of a save; whether it succeeded on every rank. A disk that fails is no success, all else raises."""
        error: Exception | None = None
        if self._world.is_main or not main_only:
            try:
                work()
            except OSError as caught:
                error = caught
                logger.error("rank %d cannot write a checkpoint: %s", self._world.rank, caught)
        return self._world.sum_int([error is not None])[0] == 0

    def _drop(self, aside: Path, step: int) -> None:
        if self._world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            kept = [path.name for _, path in folder.newest_first(self._folder)]
            logger.error(
                "NO CHECKPOINT OF STEP %d: the disk of %s is full or fails (the reason stands above). Training goes "
                "on and the next save tries again; a crash now would go back to %s. Make room.",
                step,
                self._folder,
                kept[0] if kept else "the start of the run",
            )

    def _delete_old(self, step: int) -> None:
        try:
            folder.delete_old(self._folder, step, self._settings.keep)
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted, the next save tries again: %s", error)

    def _report(self, final: Path, figures: SaveFigures) -> None:
        logger.info(
            "checkpoint %s written: %.1f MB a rank in %.2f s, training waited %.3f s",
            final,
            figures.written_bytes / 1e6,
            figures.write_s,
            figures.stall_s,
        )

    def _raise(self) -> None:
        if self._fault is not None:
            raise RuntimeError("a checkpoint could not be written, and not for want of disk") from self._fault


def _make_anew(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
