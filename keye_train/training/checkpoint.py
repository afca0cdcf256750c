"""Checkpoints: the state of a training, whole or absent, readable at any world size and ZeRO stage.

::

    checkpoints/step-N/
      rank-00000-000.safetensors   fp32 weights ("<parameter>") and AdamW moments ("<parameter>#exp_avg", ...)
      state.json                   step, updates, position in the data, non-finite counts
      complete.json                size and SHA-256 of every other file; written last

Whole tensors are stored by parameter name. Each rank writes its share of the names, so host memory and disk traffic are
spread. Frozen parameters are not stored: they are rebuilt from where the run started. The folder is written under a
hidden name and renamed once every file is on the disk; all ranks must see the same file system. Nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from keye_train import runs
from keye_train.training.distributed import World
from keye_train.training.engine import Engine

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
STATE = "state.json"
PREFIX = "step-"
PART_BYTES = 2 << 30  # a rank holds at most this much of a checkpoint in host memory


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


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk."""

    folder: Path
    state: TrainState

    def tensors(self) -> TensorReader:
        """Reader of its tensors by name."""
        return TensorReader(self.folder)


class TensorReader:
    """Reads the tensors of a folder of safetensors (a checkpoint, an export) by name, one at a time, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 (not a dict)
        self._folder = folder

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def __call__(self, name: str) -> Tensor:
        """The whole tensor, as stored, on the CPU."""
        return self._file_of[name].get_tensor(name)

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless the checkpoint holds exactly the trainable parameters ``shapes``."""
        held = {name for name in self.names() if "#" not in name}
        odd = sorted(held ^ set(shapes))
        if odd:
            where = "only in the checkpoint" if odd[0] in held else "missing in the checkpoint"
            raise ValueError(
                f"{self._folder}: the set of trained parameters changed ({len(odd)} differ, first: {odd[0]}, {where}). "
                "Resume with the recipe that wrote it, or start a new run_dir with parent=<export>"
            )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"{self._folder}: {name} has shape {self.shape(name)}, this model has {shape}: another model"
                )


def save(run_dir: Path, engine: Engine, state: TrainState, world: World, keep: int) -> Path:
    """Write a checkpoint and delete those beyond the newest ``keep``. Collective: every rank must reach this.

    Raises:
        OSError: this rank could not write (on other ranks: RuntimeError). Older checkpoints are untouched.
    """
    final = run_dir / runs.CHECKPOINTS / f"{PREFIX}{state.step}"
    aside = final.with_name(f".{final.name}.tmp")
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    error: Exception | None = None
    written: dict[str, dict[str, Any]] = {}
    for part, tensors in enumerate(_own_parts(engine, world)):
        if error is None:  # a rank that cannot write still takes part in the gathers of the others
            try:
                path = aside / f"rank-{world.rank:05d}-{part:03d}.safetensors"
                save_file(tensors, path)
                runs.settle(path)
                written[path.name] = _seal(path)
            except (OSError, SafetensorError) as caught:  # the library wraps a full disk
                error = caught
    world.require_all(error, f"writing checkpoint {final}")
    runs.write_json_atomic(aside / f"rank-{world.rank:05d}.files.json", written)
    world.barrier()
    if world.is_main:
        _commit(aside, final, state)
        _delete_old(final.parent, state.step, keep)
        logger.info("checkpoint %s written", final)
    world.barrier()
    return final


def newest_whole(run_dir: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint that is whole; torn ones are named in the log and passed over.

    Rank 0 verifies sizes and checksums, the others follow its choice. Collective: every rank must reach this.
    """
    folder = run_dir / runs.CHECKPOINTS
    chosen = -1
    if world.is_main:
        for step in reversed(_steps(folder)):
            fault = _fault(folder / f"{PREFIX}{step}")
            if fault is None:
                chosen = step
                break
            logger.warning("checkpoint %s%d is torn (%s); falling back to an older one", PREFIX, step, fault)
    chosen = world.from_main(chosen)
    if chosen < 0:
        return None
    path = folder / f"{PREFIX}{chosen}"
    return Checkpoint(path, TrainState(**runs.read_json(path / STATE)))


def _own_parts(engine: Engine, world: World) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the tensors, in pieces of at most about PART_BYTES. All ranks gather every tensor together.

    Every rank takes the tensor for which it has been given the fewest elements so far; all compute the same choice.
    """
    given = [0] * world.size
    mine: dict[str, Tensor] = {}
    held_bytes = 0
    for name, tensor in engine.training_state():
        owner = given.index(min(given))
        given[owner] += tensor.numel()
        if owner == world.rank:
            # A copy: the gathered tensor may be DeepSpeed's own buffer, and may lie on the GPU.
            mine[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            held_bytes += mine[name].nbytes
        if held_bytes >= PART_BYTES:
            yield mine
            mine, held_bytes = {}, 0
    if mine:
        yield mine


def _commit(aside: Path, final: Path, state: TrainState) -> None:
    files: dict[str, Any] = {}
    for listing in sorted(aside.glob("rank-*.files.json")):
        files |= runs.read_json(listing)
        listing.unlink()
    runs.write_json_atomic(aside / STATE, asdict(state))
    files[STATE] = _seal(aside / STATE)
    runs.write_json_atomic(aside / COMPLETE, {"files": files})
    if final.exists():  # a torn one of the same step, or the same step reached again after a fall-back
        _remove(final)
    aside.rename(final)
    _sync(final.parent)


def _delete_old(folder: Path, saved: int, keep: int) -> None:
    """Keep the newest ``keep``; whatever stands above the one just saved is torn, since the run resumed below it."""
    steps = _steps(folder)
    for step in [step for step in steps if step > saved] + [step for step in steps if step <= saved][:-keep]:
        _remove(folder / f"{PREFIX}{step}")


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that an interrupted deletion never leaves something that looks like one."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, whole or not."""
    names = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*"))
    return sorted(int(name) for name in names if name.isdigit())


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where it is whole."""
    try:
        listed = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"no {COMPLETE}"
    except (ValueError, KeyError, TypeError):
        return f"{COMPLETE} is damaged"
    present = {path.name for path in folder.glob("*.safetensors")}
    if foreign := present - set(listed):
        return f"{sorted(foreign)[0]} does not belong to it"
    for name, seal in listed.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != seal["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {seal['bytes']}"
        if _sha256(path) != seal["sha256"]:
            return f"{name} does not match its checksum"
    return None


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to the disk; its size and checksum."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
