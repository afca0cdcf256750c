"""Checkpoints as folders: sealing, committing, verifying, finding and deleting them. Whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keye_train import runs
from keye_train.checkpoints.layout import COMPLETE, FORMAT, KEEP, PREFIX


def aside(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.with_name(f".{final.name}.tmp")


def commit(final: Path, seals: Mapping[str, Mapping[str, Any]], documents: Mapping[str, Any], marked: bool) -> None:
    """Make the checkpoint that lies aside whole and put it in its place.

    Args:
        final: folder to become; its files lie in :func:`aside`, flushed.
        seals: size and SHA-256 of each file there.
        documents: JSON files to add: name -> value.
        marked: whether it is kept for ever; so is one in whose place it comes.

    Raises:
        OSError: the disk is full, or fails; nothing has changed then.
    """
    folder = aside(final)
    for name, value in documents.items():
        runs.write_json_atomic(folder / name, value)
    listed = {**seals, **{name: seal(folder / name) for name in documents}}
    if marked or _marked(final):
        (folder / KEEP).touch()
    runs.write_json_atomic(folder / COMPLETE, {"format": FORMAT, "files": listed})
    runs.sync(folder)
    if not final.exists():
        folder.rename(final)
        runs.sync(final.parent)
        return
    # The same step again, after a fall-back. At every moment one of the two is whole: the one that still lies aside
    # when the process dies between the renames is put in place by clear_unfinished.
    old = _doomed(final)
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    try:
        folder.rename(final)
    except OSError:
        old.rename(final)
        raise
    runs.sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def seal(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": runs.file_sha256(path)}


def newest_first(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of the checkpoints in ``RUN/checkpoints``, newest first, whole or not."""
    names = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*"))
    steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)
    return [(step, folder / f"{PREFIX}{step}") for step in steps]


def fault(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint; None where it is whole.

    Args:
        folder: of the checkpoint.
        part, parts: only every ``parts``-th file from ``part`` on is read and hashed, so that ranks share the work.

    Raises:
        ValueError: a newer version wrote it.
    """
    try:
        sealed = runs.read_json(folder / COMPLETE)
        listed = {name: (one["bytes"], one["sha256"]) for name, one in sealed["files"].items()}
        version = sealed.get("format", 1)
    except FileNotFoundError:
        return f"no {COMPLETE}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{COMPLETE} is damaged"
    if version not in (1, FORMAT):
        raise ValueError(
            f"{folder} has format {version}; this version of keye_train reads up to {FORMAT}: use a newer one"
        )
    if strange := {path.name for path in folder.glob("*.safetensors")} - set(listed):
        return f"{min(strange)} does not belong to it"
    for name in sorted(listed)[part::parts]:
        size, sha256 = listed[name]
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if runs.file_sha256(path) != sha256:
            return f"{name} does not match its checksum"
    return None


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint that no run shall load: ``step-8`` becomes ``step-8.torn``. Nothing is deleted."""
    target = folder.with_name(f"{folder.name}.{why}")
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    return target


def clear_unfinished(folder: Path) -> None:
    """Remove what killed saves and deletions left behind. Only while nobody else saves there.

    A save that was killed when it was whole already, and had only to be renamed, is put in its place.
    """
    for left in folder.glob(f".{PREFIX}*.tmp"):
        final = left.with_name(left.name.removeprefix(".").removesuffix(".tmp"))
        if not final.exists() and (left / COMPLETE).exists() and fault(left) is None:
            left.rename(final)
            runs.sync(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob(f".{PREFIX}*.deleted"):
        shutil.rmtree(left, ignore_errors=True)


def delete_old(folder: Path, saved: int, keep: int) -> None:
    """Delete what is neither marked nor among the newest ``keep`` up to the step ``saved``.

    What stands above that step belongs to a future that the run left by going back: it goes too, or aside where marked.
    """
    found = newest_first(folder)
    for _, path in [(step, path) for step, path in found if step > saved]:
        if _marked(path):
            set_aside(path, "abandoned")
        else:
            remove(path)
    for _, path in [(step, path) for step, path in found if step <= saved][keep:]:
        if not _marked(path):
            remove(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that an interrupted deletion never leaves something that looks like one."""
    doomed = _doomed(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _doomed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.deleted")


def _marked(folder: Path) -> bool:
    return (folder / KEEP).exists()
