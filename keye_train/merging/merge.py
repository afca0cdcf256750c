"""``keye-merge``: K models in, their average out, in the official layout.

The output is written into a hidden folder beside its place and renamed when it is whole, so it exists whole or not at
all. Its manifest names the parents, their manifests and the SHA-256 of every file read and written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keye_train.merging.accounting import Accounts, account
from keye_train.merging.compatibility import CONFIG, check_seals, compared_files
from keye_train.merging.input_hashes import InputHashes
from keye_train.merging.output import check_room, partial_output
from keye_train.merging.reading import ExportReader
from keye_train.merging.rules import check_patterns, model_weights
from keye_train.merging.shard_file import PlannedTensor
from keye_train.merging.sources import last_checkpoints, opened
from keye_train.merging.streaming import plan_shards, write_index
from keye_train.merging.weights import merge_weights
from keye_train.runs import MANIFEST, commit, file_sha256, read_json, versions, write_json_atomic
from keye_train.settings import MergeMethod, MergeSettings, SettingsError

logger = logging.getLogger(__name__)


class OtherOutput(SettingsError):
    """``out`` exists and holds something else than this merge."""


Described = Callable[[], dict[str, Any]]
"""Size, time and SHA-256 of a file, once it is known."""

_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_UNREQUESTED = ("models", "out", "method", "base", "last", "threads", "hash_inputs")


def merge(settings: MergeSettings, progress: bool = True) -> Path:
    """Average the models ``settings.models`` into the folder ``settings.out``.

    A few pieces of one tensor at a time are in memory. Where the folder already holds this very merge, it is kept;
    where a merge was interrupted, it goes on behind the last whole file.

    Args:
        settings: what to merge; see ``open_model`` for what a model may be.
        progress: show a progress bar on stderr.

    Returns:
        The output folder.

    Raises:
        SettingsError: impossible settings.
        OtherOutput: ``out`` exists and is something else.
        FileNotFoundError: a model is not there, or lacks a file.
        ExportError: a file of a model is cut off.
        MergeError: the models differ, or hold values that are not finite; it lists every reason.
        DiskFull: there is no room for the result.
    """
    settings.check()
    if settings.last is not None:
        settings = replace(settings, models=last_checkpoints(settings.models[0], settings.last), last=None)
    # The base, where a method has one, comes last.
    with opened([*settings.models, *([settings.base] if settings.base else [])]) as readers:
        out = Path(settings.out)
        request = _request(settings, readers)
        if out.exists():
            _check_existing(out, request, readers)
            logger.info("%s already holds this merge", out)
            return out
        _merge(settings, readers, out, request, progress)
    logger.info("merged %d models into %s", len(readers), out)
    return out


def _merge(
    settings: MergeSettings, readers: Sequence[ExportReader], out: Path, request: dict[str, Any], progress: bool
) -> None:
    started = time.monotonic()
    chosen = getattr(torch, settings.dtype) if settings.dtype else None
    accounts = account(readers, settings.base is not None, settings.allow, chosen)
    for one in accounts.allowed:
        logger.warning("allowed: %s", one)
    check_patterns(settings, list(accounts.shares))
    shards = plan_shards([share.planned for share in accounts.shares.values()], settings.max_shard_bytes)
    inputs = [{name: list(_stat(file)) for name, file in files.items()} for files in _input_files(readers)]
    with partial_output(out, {"kind": "merge", "request": request, "inputs": inputs}) as output:
        left = {file: tensors for file, tensors in shards.items() if file not in output.files}
        check_room(out, sum(tensor.n_bytes for tensors in left.values() for tensor in tensors), output.files)
        hashers = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)), thread_name_prefix="hash")
        try:
            on_the_way = InputHashes(readers, [accounts.shares[one.name] for shard in left.values() for one in shard])
            hashes = _describe_inputs(readers, settings, on_the_way, hashers)
            for file, sha256 in merge_weights(output.folder, readers, left, accounts, settings, on_the_way, progress):
                output.add(file, sha256)
            write_index(output.folder, shards)
            _copy_companions(readers[0], output.folder, accounts)
            for path in sorted(output.folder.iterdir()):
                # Those of an interrupted merge have been written afresh.
                if path.name not in shards and path.name != MANIFEST:
                    output.add(path.name, file_sha256(path))
            by_reader = dict(zip(readers, hashes, strict=True))
            check_seals(readers, lambda reader, file: _sha256(by_reader[reader].get(_key(reader, file))))
            manifest = _manifest(settings, request, readers, hashes, accounts) | {"files": output.files}
        finally:
            hashers.shutdown(wait=True, cancel_futures=True)
        write_json_atomic(output.folder / MANIFEST, manifest | {"wall_s": round(time.monotonic() - started, 3)})


def _request(settings: MergeSettings, readers: Sequence[ExportReader]) -> dict[str, Any]:
    """What was asked for: two merges with the same request and the same inputs are the same merge."""
    values = asdict(settings)
    request = {
        "models": [str(reader.origin.resolve()) for reader in readers],
        "method": settings.method.value,
        "weights": values["weights"],
        "dtype": values["dtype"],
        "max_shard_bytes": values["max_shard_bytes"],
        "base": values["base"],
    }
    # Only where set, so that finished merges of earlier versions stay known.
    request |= {key: value for key, value in values.items() if key not in _UNREQUESTED and value}
    return {key: value for key, value in request.items() if key != "base" or value}


def _check_existing(out: Path, request: dict[str, Any], readers: Sequence[ExportReader]) -> None:
    """Pass where ``out`` is the finished result of this request on these inputs; raise OtherOutput elsewhere."""
    advice = f"remove {out} or choose another out=..."
    if not (out / MANIFEST).exists():
        raise OtherOutput(f"out={out} exists and is no merge of ours (it has no {MANIFEST}): {advice}")
    manifest = read_json(out / MANIFEST)
    if manifest.get("request") != request:
        raise OtherOutput(f"out={out} holds something else than this merge (see its {MANIFEST}): {advice}")
    for reader, files, parent in zip(readers, _input_files(readers), manifest["parents"], strict=True):
        written = parent["files"]
        for name in sorted(files.keys() | written.keys()):
            if name not in written or name not in files or not _same(files[name], written[name]):
                raise OtherOutput(f"out={out} was merged before {name} of {reader.origin} changed: {advice}")


def _same(file: Path, written: dict[str, Any]) -> bool:
    """Whether an input is the one that was merged."""
    if _stat(file) == (written["bytes"], written["mtime_ns"]):
        return True
    # A copied or touched file has another time stamp; only then are the bytes worth reading.
    return file_sha256(file) == written["sha256"]


def _copy_companions(first: ExportReader, folder: Path, accounts: Accounts) -> None:
    """Copy config, tokenizer and processor files of the first model; config.json says what the result is."""
    for file in _companions(first.folder):
        shutil.copyfile(file, folder / file.name)
    config = read_json(folder / CONFIG)
    known = json.dumps(config)
    types = {share.planned.dtype for share in accounts.shares.values() if share.merged}
    if len(types) == 1:
        (dtype,) = types
        for key in {"torch_dtype", "dtype"} & config.keys():
            config[key] = str(dtype).removeprefix("torch.")
    if accounts.untied:
        for fields in (config, *(value for value in config.values() if isinstance(value, dict))):
            if "tie_word_embeddings" in fields:
                fields["tie_word_embeddings"] = False
    if json.dumps(config) != known:
        write_json_atomic(folder / CONFIG, config)


def _manifest(
    settings: MergeSettings,
    request: dict[str, Any],
    readers: Sequence[ExportReader],
    hashes: Sequence[dict[str, Described]],
    accounts: Accounts,
) -> dict[str, Any]:
    given = model_weights(settings)
    shares: list[float | None]
    if settings.base is None:
        shares = [weight / sum(given) for weight in given]
    else:
        # What is left for the base in base + sum_i w_i * (model_i - base); elsewhere it differs from value to value.
        left = 1 - sum(given) if settings.method == MergeMethod.task_arithmetic else None
        shares = [*given, left]
    planned = [share.planned for share in accounts.shares.values()]
    parents = [
        {
            "path": str(reader.origin),
            "weight": share,
            "manifest_sha256": file_sha256(manifest) if manifest.exists() else None,
            "files": {name: described() for name, described in files.items()},
        }
        for reader, share, files, manifest in (
            (reader, share, files, reader.origin / MANIFEST)
            for reader, share, files in zip(readers, shares, hashes, strict=True)
        )
    ]
    return {
        "kind": "merge",
        "status": "finished",
        "request": request,
        "method": settings.method.value,
        "weights": [parent["weight"] for parent in parents],
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in planned}),
        "tensors": len(planned),
        "tensors_sha256": tensors_digest(planned),
        "bytes": sum(tensor.n_bytes for tensor in planned),
        "allowed": [str(one) for one in accounts.allowed],
        "dropped": accounts.dropped,
        "parents": parents,
        "versions": versions(),
        "commit": commit(),
    }


def tensors_digest(tensors: Sequence[PlannedTensor]) -> str:
    """SHA-256 of the sorted list of names, types and shapes."""
    listed = sorted([tensor.name, str(tensor.dtype), list(tensor.shape)] for tensor in tensors)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _describe_inputs(
    readers: Sequence[ExportReader], settings: MergeSettings, on_the_way: InputHashes, pool: ThreadPoolExecutor
) -> list[dict[str, Described]]:
    """Size, time and SHA-256 of each input; without ``hash_inputs`` no SHA-256 of weights that nobody sealed.

    Files that the merge reads from end to end are hashed ``on_the_way``: their hashes are there when it is done. The
    pool reads the others at the same time: one of the two finds the bytes in the page cache.
    """
    described: list[dict[str, Described]] = []
    for number, (reader, files) in enumerate(zip(readers, _input_files(readers), strict=True)):
        unsealed = set(reader.weight_files()) - reader.sealed.keys()
        described.append({})
        for name, file in files.items():
            if not settings.hash_inputs and file in unsealed:
                on_the_way.drop(number, file)
                described[-1][name] = partial(_description, _stat(file), lambda: None)
            elif (number, file) in on_the_way.files:
                described[-1][name] = partial(_description, _stat(file), on_the_way.files[number, file].sha256)
            else:
                described[-1][name] = partial(_description, _stat(file), pool.submit(file_sha256, file).result)
    return described


def _description(stat: tuple[int, int], sha256: Callable[[], str | None]) -> dict[str, Any]:
    n_bytes, mtime_ns = stat
    return {"bytes": n_bytes, "mtime_ns": mtime_ns, "sha256": sha256()}


def _sha256(described: Described | None) -> str | None:
    return None if described is None else described()["sha256"]


def _input_files(readers: Sequence[ExportReader]) -> list[dict[str, Path]]:
    """Of each model, by name in the manifest: every file that decides the result, copied and compared ones included."""
    inputs = []
    for number, reader in enumerate(readers):
        documents = reader.documents
        if documents is None:
            documents = compared_files(reader.folder) if number else _companions(reader.folder)
        inputs.append({_key(reader, file): file for file in [*reader.weight_files(), *documents]})
    return inputs


def _companions(folder: Path) -> list[Path]:
    """Config, tokenizer, processor and whatever else lies beside the weights; copied from the first model."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST and not file.name.endswith(_WEIGHT_SUFFIXES)
    ]


def _key(reader: ExportReader, file: Path) -> str:
    """Name of an input file in the manifest: relative to what the user named."""
    return os.path.relpath(file, reader.origin)


def _stat(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns
