"""``keye-merge``: K exports in, their average out, in the official layout.

The output is written into a hidden folder beside its place and renamed when it is whole, so it exists whole or not at
all. Its manifest names the parents, their manifests and the SHA-256 of every file read and written.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from keye_train.merging.compatibility import CONFIG, MergeError, differences, value_problems
from keye_train.merging.methods import AVERAGED_DTYPES
from keye_train.merging.rules import Rule, check_patterns, model_weights, rule_for
from keye_train.merging.streaming import (
    ExportReader,
    PlannedTensor,
    ShardWriter,
    plan_shards,
    sha256_of,
    weight_files,
    write_index,
)
from keye_train.runs import MANIFEST, commit, export_dir, read_json, versions, write_json_atomic
from keye_train.settings import MergeSettings, SettingsError

logger = logging.getLogger(__name__)

_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth")


def merge(settings: MergeSettings, progress: bool = True) -> Path:
    """Average the exports ``settings.models`` into the folder ``settings.out``.

    One piece of one tensor at a time is in memory. Where the folder already holds this very merge, it is kept.

    Args:
        settings: what to merge; run folders stand for their exports.
        progress: show a progress bar on stderr.

    Returns:
        The output folder.

    Raises:
        SettingsError: impossible settings, or ``out`` exists and is something else.
        FileNotFoundError: a model is not there, or lacks a file.
        ExportError: a file of a model is cut off.
        MergeError: the models differ, or hold values that are not finite; it lists every reason.
    """
    settings.check()
    # The base, where a method has one, comes last.
    folders = [export_dir(model) for model in [*settings.models, *([settings.base] if settings.base else [])]]
    out = Path(settings.out)
    request = _request(settings, folders)
    if out.exists():
        _check_existing(out, request, folders)
        logger.info("%s already holds this merge", out)
        return out
    readers = [ExportReader(folder) for folder in folders]
    try:
        problems = differences(readers)
        if problems:
            # The values are read as well, so that one run names everything there is to mend.
            shared = [name for name in readers[0].places if _alike(readers, name)]
            raise MergeError(problems + value_problems(readers, shared))
        check_patterns(settings, list(readers[0].places))
        with _written_beside(out) as folder, ThreadPoolExecutor(max_workers=1) as hasher:
            started = time.monotonic()
            # The hashes of the inputs are taken while the merge reads the same bytes: they come from the page cache.
            hashes = [hasher.submit(_describe_files, parent) for parent in folders]
            shards = _plan(readers, settings)
            outputs = _write_weights(folder, readers, shards, settings, progress)
            write_index(folder, shards)
            _copy_companions(folders[0], folder, settings.dtype)
            manifest = _manifest(settings, request, folders, hashes, outputs, shards)
            write_json_atomic(folder / MANIFEST, manifest | {"wall_s": round(time.monotonic() - started, 3)})
    finally:
        for reader in readers:
            reader.close()
    logger.info("merged %d models into %s", len(folders), out)
    return out


def _request(settings: MergeSettings, folders: Sequence[Path]) -> dict[str, Any]:
    """What was asked for: two merges with the same request and the same inputs are the same merge."""
    values = asdict(settings)
    request = {
        "models": [str(folder.resolve()) for folder in folders],
        "method": settings.method.value,
        "weights": values["weights"],
        "dtype": values["dtype"],
        "max_shard_bytes": values["max_shard_bytes"],
    }
    # Only where set, so that finished merges of earlier versions stay known.
    return request | {key: values[key] for key in ("modules", "decay", "base") if values[key]}


def _check_existing(out: Path, request: dict[str, Any], folders: Sequence[Path]) -> None:
    """Pass where ``out`` is the finished result of this request on these inputs; raise SettingsError elsewhere."""
    advice = f"remove {out} or choose another out=..."
    if not (out / MANIFEST).exists():
        raise SettingsError(f"out={out} exists and is no merge of ours (it has no {MANIFEST}): {advice}")
    manifest = read_json(out / MANIFEST)
    if manifest.get("request") != request:
        raise SettingsError(f"out={out} holds something else than this merge (see its {MANIFEST}): {advice}")
    for folder, parent in zip(folders, manifest["parents"], strict=True):
        found = {file.name: _stat(file) for file in _input_files(folder)}
        written = {name: (entry["bytes"], entry["mtime_ns"]) for name, entry in parent["files"].items()}
        # A copied or touched file has another time stamp; only then are the bytes worth reading.
        if found != written and any(
            sha256_of(folder / name) != parent["files"].get(name, {}).get("sha256") for name in found
        ):
            raise SettingsError(f"out={out} was merged before {folder} changed: {advice}")


def _alike(readers: Sequence[ExportReader], name: str) -> bool:
    first = readers[0].places[name]
    twins = [reader.places.get(name) for reader in readers]
    return all(twin is not None and (twin.dtype, twin.shape) == (first.dtype, first.shape) for twin in twins)


def _plan(readers: Sequence[ExportReader], settings: MergeSettings) -> dict[str, list[PlannedTensor]]:
    """The output's tensors and files, in the order in which the first model lies on the disk."""
    chosen = getattr(torch, settings.dtype) if settings.dtype else None
    tensors = [
        PlannedTensor(name, (chosen or place.dtype) if place.dtype in AVERAGED_DTYPES else place.dtype, place.shape)
        for name, place in readers[0].places.items()
    ]
    return plan_shards(tensors, settings.max_shard_bytes)


def _write_weights(
    folder: Path,
    readers: Sequence[ExportReader],
    shards: dict[str, list[PlannedTensor]],
    settings: MergeSettings,
    progress: bool,
) -> dict[str, str]:
    """Write every shard; returns file name -> SHA-256.

    Raises:
        MergeError: values that are not finite, or unequal tensors of a type that is not averaged.
    """
    n_bytes = sum(place.n_bytes for reader in readers for place in reader.places.values())
    outputs: dict[str, str] = {}
    quiet = None if progress else True  # None: no bar where stderr is no terminal
    with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="merge", disable=quiet) as bar:
        for file, tensors in shards.items():
            with ShardWriter(folder / file, tensors) as writer:
                for tensor in tensors:
                    rule = rule_for(settings, readers, tensor.name) if tensor.dtype in AVERAGED_DTYPES else None
                    for pieces in _aligned_pieces(readers, tensor.name):
                        merged = _merge_pieces(pieces, rule, tensor.dtype)
                        if merged is None:
                            raise MergeError(_reasons(readers, tensor))
                        writer.append(merged)
                        bar.update(sum(piece.nbytes for piece in pieces))
            outputs[file] = writer.sha256
    return outputs


def _aligned_pieces(readers: Sequence[ExportReader], name: str) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(reader.pieces(name) for reader in readers), strict=True)


def _merge_pieces(pieces: Sequence[Tensor], rule: Rule | None, dtype: torch.dtype) -> Tensor | None:
    """One piece of the output; None where the values forbid it."""
    if rule is None:
        return pieces[0] if all(torch.equal(pieces[0], piece) for piece in pieces[1:]) else None
    merged = rule(pieces, dtype)
    return merged if bool(torch.isfinite(merged).all()) else None


def _reasons(readers: Sequence[ExportReader], failed: PlannedTensor) -> list[str]:
    """Why the values cannot be averaged, for all tensors and not only for the one that failed first."""
    return value_problems(readers, list(readers[0].places)) or [
        f"{failed.name}: its average does not fit {failed.dtype}: choose dtype=float32 or dtype=bfloat16"
    ]


def _copy_companions(parent: Path, folder: Path, dtype: str | None) -> None:
    """Copy config, tokenizer and processor files of the first model; config.json names the new dtype."""
    for file in sorted(parent.iterdir()):
        if file.is_file() and file.name != MANIFEST and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(file, folder / file.name)
    if dtype is not None:
        config = read_json(folder / CONFIG)
        for key in {"torch_dtype", "dtype"} & config.keys():
            config[key] = dtype
        write_json_atomic(folder / CONFIG, config)


def _manifest(
    settings: MergeSettings,
    request: dict[str, Any],
    folders: Sequence[Path],
    hashes: Sequence[Future[dict[str, dict[str, Any]]]],
    outputs: dict[str, str],
    shards: dict[str, list[PlannedTensor]],
) -> dict[str, Any]:
    shares = model_weights(settings)
    if settings.base is None:
        shares = [share / sum(shares) for share in shares]
    else:
        shares.append(1 - sum(shares))  # what is left for the base in base + sum_i w_i * (model_i - base)
    planned = [tensor for shard in shards.values() for tensor in shard]
    parents = [
        {
            "path": str(folder),
            "weight": share,
            "manifest_sha256": sha256_of(folder / MANIFEST) if (folder / MANIFEST).exists() else None,
            "files": described.result(),
        }
        for folder, share, described in zip(folders, shares, hashes, strict=True)
    ]
    return {
        "kind": "merge",
        "status": "finished",
        "request": request,
        "method": settings.method.value,
        "weights": [parent["weight"] for parent in parents],
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in planned}),
        "tensors": len(planned),
        "bytes": sum(tensor.n_bytes for tensor in planned),
        "parents": parents,
        "files": {file: {"sha256": digest} for file, digest in outputs.items()},
        "versions": versions(),
        "commit": commit(),
    }


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    described = {}
    for file in _input_files(folder):
        n_bytes, mtime_ns = _stat(file)
        described[file.name] = {"bytes": n_bytes, "mtime_ns": mtime_ns, "sha256": sha256_of(file)}
    return described


def _input_files(folder: Path) -> list[Path]:
    return [*weight_files(folder), folder / CONFIG]


def _stat(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _written_beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` when the block ends well and is removed when it does not.

    What a killed merge left there is removed first; the kernel drops the lock of a dead process, so a folder that is
    still locked belongs to a merge that is still running.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(f"out={out} is being written by another merge: wait for it or end it") from error
        try:
            for file in partial.iterdir():
                file.unlink()
            yield partial
            for file in partial.iterdir():
                _sync(file)
            _sync(partial)
            partial.rename(out)
            _sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
