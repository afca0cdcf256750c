"""``keye-merge verify``: is a merged model still what its manifest says, and are its parents what it was made of?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keye_train.merging.merge import tensors_digest
from keye_train.merging.methods import AVERAGED_DTYPES, all_finite
from keye_train.merging.places import ExportError, TensorPlace, tensor_places
from keye_train.merging.reading import PIECE_ELEMENTS, Files
from keye_train.merging.shard_file import PlannedTensor
from keye_train.runs import MANIFEST, WEIGHTS_INDEX, file_sha256, read_json
from keye_train.settings import SettingsError


@dataclass
class Verdict:
    """What was found."""

    faults: list[str] = field(default_factory=list)
    """Ways in which files and manifest disagree."""
    unchecked: list[str] = field(default_factory=list)
    """What could not be checked, and why; no fault of the merge."""
    checked: list[str] = field(default_factory=list)
    """What was, in words."""


def verify(out: str | Path) -> Verdict:
    """Check a merge: checksums of all files, tensor list, index, finiteness of all values, and its parents.

    Every byte of the result and of the parents that are still there is read once, files side by side. A parent that is
    gone cannot be checked, which is no fault; one that changed is.

    Raises:
        FileNotFoundError: there is no such folder.
        SettingsError: it is no finished merge.
    """
    folder = Path(out)
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: name the out=... of a keye-merge")
    manifest = read_json(path)
    if manifest.get("kind") != "merge" or manifest.get("status") != "finished":
        raise SettingsError(f"{path} is not that of a finished merge: name the out=... of a keye-merge")
    verdict = Verdict()
    places = _check_tensors(folder, manifest, verdict)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        _check_files(folder, manifest["files"], pool, verdict)
        by_file: dict[Path, list[TensorPlace]] = {}
        for place in places.values():
            by_file.setdefault(place.file, []).append(place)
        for faults in pool.map(_not_finite, by_file.values()):
            verdict.faults += faults
        if places:
            verdict.checked.append(f"{len(places)} tensors: names, types and shapes, all values finite")
        for parent in manifest["parents"]:
            _check_parent(parent, pool, verdict)
    return verdict


def _check_tensors(folder: Path, manifest: Mapping[str, Any], verdict: Verdict) -> dict[str, TensorPlace]:
    try:
        places = tensor_places(folder)
    except (ExportError, FileNotFoundError) as error:
        verdict.faults.append(str(error))
        return {}
    planned = [PlannedTensor(place.name, place.dtype, place.shape) for place in places.values()]
    digest = manifest.get("tensors_sha256")
    if len(planned) != manifest["tensors"] or (digest is not None and tensors_digest(planned) != digest):
        verdict.faults.append(f"{folder}: its tensors are not those that {MANIFEST} lists ({manifest['tensors']})")
    index = folder / WEIGHTS_INDEX
    if index.exists():
        promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if promised != {name: place.file.name for name, place in places.items()}:
            verdict.faults.append(f"{index} does not fit the files that it names")
    return places


def _check_files(folder: Path, files: Mapping[str, Any], pool: ThreadPoolExecutor, verdict: Verdict) -> None:
    for strange in sorted({path.name for path in folder.glob("*.safetensors")} - set(files)):
        verdict.faults.append(f"{folder / strange} is not listed in {MANIFEST}")
    tasks = [(folder / name, entry) for name, entry in files.items()]
    faults = [fault for fault in pool.map(lambda task: _fault(*task), tasks) if fault is not None]
    verdict.faults += faults
    verdict.checked.append(f"{len(files) - len(faults)} of {len(files)} files: SHA-256")


def _fault(path: Path, entry: Mapping[str, Any]) -> str | None:
    if not path.exists():
        return f"{path} is missing"
    n_bytes = entry.get("bytes", path.stat().st_size)
    if path.stat().st_size != n_bytes:
        return f"{path} has {path.stat().st_size} bytes, the manifest says {n_bytes}"
    if entry.get("sha256") is not None and file_sha256(path) != entry["sha256"]:
        return f"{path} does not match its checksum: it was changed or damaged"
    return None


def _not_finite(places: list[TensorPlace]) -> list[str]:
    """Tensors of one file that hold NaN or infinity."""
    files, found = Files(), []
    try:
        for place in places:
            if place.dtype not in AVERAGED_DTYPES:
                continue
            for begin in range(0, place.elements, PIECE_ELEMENTS):
                piece = torch.empty(min(PIECE_ELEMENTS, place.elements - begin), dtype=place.dtype)
                files.read(place, begin, piece)
                if not all_finite(piece):
                    found.append(f"{place.file}: {place.name} holds NaN or infinity")
                    break
    finally:
        files.close()
    return found


def _check_parent(parent: Mapping[str, Any], pool: ThreadPoolExecutor, verdict: Verdict) -> None:
    folder = Path(parent["path"])
    if not folder.exists():
        verdict.unchecked.append(f"parent {folder} is no longer there")
        return
    files = parent["files"]
    faults = [fault for fault in pool.map(lambda name: _fault(folder / name, files[name]), files) if fault is not None]
    verdict.faults += [f"parent {fault}" for fault in faults]
    unhashed = [name for name, entry in files.items() if entry["sha256"] is None]
    if unhashed:
        verdict.unchecked.append(
            f"parent {folder}: {len(unhashed)} files by size alone (merged with hash_inputs=false)"
        )
    if not faults:
        verdict.checked.append(f"parent {folder}: {len(files)} files")
