"""Layout and manifest of a run folder. Every part that reads or writes runs goes through this module.

::

    RUN/
      recipe.yaml            resolved settings
      manifest.json          parents, recipe, seed, data fingerprint, versions, commit, status
      metrics.jsonl          one line a step
      ledger.jsonl           one line for every sample that was planned and not trained on
      trained.jsonl          one line a step: how many samples it trained on, and their digest
      left_out.json          batches that a rollback left out, with the loss spike that was the reason
      heartbeats/            what each rank is doing, rewritten every few seconds
      hangs/                 where every process stood when the run was stuck
      flight/                the last steps of each rank
      checkpoints/step-N/    state of the training, whole or absent (keye_train.checkpoints)
      .lock                  held by every rank of the launch that trains here
      export/                the model in the official layout, with a manifest of its own
      export_ema/            the same of the moving average of the weights, where the recipe keeps one
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PARENT = os.getppid()
"""Who started this process. Taken here, before the heavy imports: a launcher that dies meanwhile must be missed too."""

RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
TRAINED = "trained.jsonl"
LEFT_OUT = "left_out.json"
HEARTBEATS = "heartbeats"
HANGS = "hangs"
FLIGHT = "flight"
CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
EXPORT = "export"
EXPORT_EMA = "export_ema"


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` aside, flush it to the disk, then rename: the file is whole or absent.

    Raises:
        OSError: it cannot be written; names ``path``, and nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        error.filename, error.filename2 = str(path), None
        raise


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def settle(path: Path) -> None:
    """Flush a file that a library wrote to the disk, and give it the access rights that the user's umask asks for.

    safetensors writes files that only their owner may read, whatever the umask.
    """
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or make it anew") from error


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_sha256(config: Path, weights: Sequence[Path]) -> str:
    """SHA-256 that tells two models apart, in time that does not grow with them.

    Covers the file ``config``, and of each weight file its name, size and 256 blocks of 64 KiB spread evenly over it
    (all of it where it is smaller).
    """
    digest = hashlib.sha256(config.read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        block, count = 1 << 16, 256
        stride = max(block, size // count)
        with path.open("rb") as handle:
            for start in range(0, size, stride):
                handle.seek(start)
                digest.update(handle.read(block))
    return digest.hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a last line cut off by a crash is left out, an absent file is empty."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not valid JSON ({error})") from error
    return rows


def keep_rows_until(path: Path, step: int) -> None:
    """Drop rows of a JSON-lines file whose ``step`` is above ``step``, and a last line cut off by a crash."""
    if not path.exists():
        return
    rows = [row for row in read_jsonl(path) if row["step"] <= step]
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values under one key each: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``. Empty mappings stay values."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def export_dir(path: str | Path, setting: str | None = None) -> Path:
    """The export that ``path``, a run folder or an export, stands for.

    Args:
        path: what the user named.
        setting: by which key of the recipe.

    Raises:
        FileNotFoundError: neither is there.
    """
    folder = Path(path)
    named = f"{setting}={folder}" if setting else str(folder)
    for candidate in (folder / EXPORT, folder):
        if (candidate / "config.json").exists():
            return candidate
    if not folder.exists():
        raise FileNotFoundError(f"{named} does not exist: name the folder of a finished run, or of an export")
    raise FileNotFoundError(
        f"{named} holds no export (no config.json in it or in {EXPORT}/): finish the run that should have written it; "
        f"keye-convert export RUN/{CHECKPOINTS}/step-N FOLDER makes one of a checkpoint"
    )


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    names = ("torch", "transformers", "deepspeed", "numpy", "pillow", "av", "keye_train")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """Git commit of the code that runs, with ``+changes`` where the tree differs; ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + ("+changes" if dirty else "")
