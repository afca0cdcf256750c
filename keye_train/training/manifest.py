"""The identity of a run folder: which recipe, from which parent, on which data, and whether it has finished.

Light on imports: the pipeline asks here whether a stage has finished without loading an engine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from keye_train import compose, runs
from keye_train.settings import SettingsError, TrainSettings

RUNNING, FINISHED = "running", "finished"

# Prefixes of the keys that a resumed run may change: none of them alters which samples are planned, and the loss only
# by rounding. Guards decide which updates are refused: whoever sees a run go wrong must be able to set them.
FREE_TO_CHANGE = (
    "run_dir",
    "logging.",
    "checkpoint.",
    "guards.",
    "evaluation.",
    "deepspeed.zero_stage",
    "deepspeed.offload_",
    "deepspeed.nvme_path",
    "deepspeed.overlap_comm",
    "deepspeed.bucket_elements",
    "deepspeed.param_persistence_threshold",
    "deepspeed.timeout_minutes",
    "data.workers",
    "data.prefetch_steps",
    "data.max_skipped_fraction",
    "data.decode_seconds",
    "data.decode_bytes",
    "data.heldout",
    "stage.activation_checkpointing",
)


def recipe_values(settings: TrainSettings) -> dict[str, Any]:
    """The resolved recipe as plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(settings), resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def recipe_sha256(settings: TrainSettings) -> str:
    """Hash of the part of a recipe that decides the result."""
    flat = {
        key: value for key, value in runs.flatten(recipe_values(settings)).items() if not key.startswith(FREE_TO_CHANGE)
    }
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def check_same_run(settings: TrainSettings) -> None:
    """Refuse to continue a run with another recipe, or from a parent that is another one by now. Changes nothing.

    Raises:
        SettingsError: names what differs.
        FileNotFoundError: the parent has no export.
    """
    run_dir = Path(settings.run_dir)
    path = run_dir / runs.RECIPE
    if path.exists() and (changed := _changes(compose.stored_values(path), settings)):
        raise SettingsError(
            f"run_dir={run_dir} belongs to another recipe ({changed}). Choose another run_dir, or restore these keys"
        )
    path = run_dir / runs.MANIFEST
    if path.exists():
        earlier, parent = runs.read_json(path)["parent"], describe_parent(settings)
        if earlier != parent:
            raise SettingsError(
                f"parent={settings.parent} has changed since the run in run_dir={run_dir} started from it (it was "
                f"{earlier}, it is {parent}): restore it, choose another run_dir, or delete this one to train again "
                "from the new parent"
            )


def foreign(settings: TrainSettings, manifest: Mapping[str, Any]) -> str | None:
    """Why a checkpoint that this manifest describes does not belong to a run of ``settings``; None where it does.

    It does with the same recipe, but for what a resumed run may change, and the same parent.
    """
    try:
        changed = _changes(manifest["recipe"], settings)
    except SettingsError as error:
        return f"its recipe does not compose: {error}"
    if changed:
        return changed
    parent = describe_parent(settings)
    if manifest["parent"] != parent:
        return f"its parent is {manifest['parent']}, not {parent}"
    return None


def _changes(recipe: Any, settings: TrainSettings) -> str:
    """The keys in which a stored recipe differs from ``settings``, and both values; empty where none matters."""
    stored = compose.to_settings(TrainSettings, recipe)
    before, now = runs.flatten(recipe_values(stored)), runs.flatten(recipe_values(settings))
    changed = [
        key for key in sorted(before | now) if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    listed = "; ".join(f"{key}: {before.get(key)} there, {now.get(key)} now" for key in changed[:8])
    return listed + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")


def is_finished(settings: TrainSettings) -> bool:
    """Whether ``settings.run_dir`` holds the finished run of this very recipe, from the parent as it is now."""
    path = Path(settings.run_dir) / runs.MANIFEST
    if not path.exists():
        return False
    manifest = runs.read_json(path)
    return (
        manifest["status"] == FINISHED
        and manifest["recipe_sha256"] == recipe_sha256(settings)
        and manifest["parent"] == describe_parent(settings)
    )


def describe_parent(settings: TrainSettings) -> dict[str, str] | None:
    """Path and fingerprint of the export that a run starts from; None where it has no parent.

    Raises:
        FileNotFoundError: the parent has no export.
    """
    if settings.parent is None:
        return None
    return {"path": settings.parent, "fingerprint": export_fingerprint(runs.export_dir(settings.parent, "parent"))}


def export_fingerprint(folder: Path) -> str:
    """SHA-256 that tells two exports apart, in time that does not grow with the model.

    See ``runs.sampled_sha256``. Any further training changes nearly every weight, so it changes nearly every block.
    """
    return runs.sampled_sha256(folder / "config.json", sorted(folder.glob("*.safetensors")))


def begin(
    settings: TrainSettings,
    data_fingerprint: str,
    data: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, int]],
    world_size: int,
) -> dict[str, Any]:
    """Write recipe.yaml and the manifest of a run that starts or resumes. Rank 0 only.

    Args:
        settings: of the run.
        data_fingerprint: of the plan.
        data: of each source, what there is of it; see ``Corpus.describe``.
        parameters: trained and frozen, by module.
        world_size: number of ranks.

    Raises:
        SettingsError: the parent changed since the run started.
    """
    check_same_run(settings)
    run_dir = Path(settings.run_dir)
    parent = describe_parent(settings)
    path = run_dir / runs.MANIFEST
    started = runs.read_json(path)["started"] if path.exists() else _now()
    manifest = {
        "status": RUNNING,
        "stage": settings.stage.name,
        "parent": parent,
        "start": asdict(settings.model.start),
        "recipe": recipe_values(settings),
        "recipe_sha256": recipe_sha256(settings),
        "seed": settings.seed,
        "data_fingerprint": data_fingerprint,
        "data": dict(data),
        "parameters": parameters,
        "world_size": world_size,
        "versions": runs.versions(),
        "commit": runs.commit(),
        "started": started,
    }
    runs.write_text_atomic(run_dir / runs.RECIPE, compose.to_yaml(settings))
    runs.write_json_atomic(path, manifest)
    return manifest


def finish(run_dir: Path, manifest: dict[str, Any], result: Mapping[str, Any]) -> None:
    """Mark a run as finished, in the run folder and beside its export. Rank 0 only, after the export is whole."""
    done = manifest | dict(result) | {"status": FINISHED, "finished": _now()}
    done["export_fingerprint"] = export_fingerprint(run_dir / runs.EXPORT)
    runs.write_json_atomic(run_dir / runs.EXPORT / runs.MANIFEST, done)
    runs.write_json_atomic(run_dir / runs.MANIFEST, done)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
