"""From the engine to a folder with the official layout, one parameter at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from keye_train import runs
from keye_train.model.configuration import KeyeConfig
from keye_train.model.pretrained import save_export
from keye_train.model.processor_files import trained_files
from keye_train.model.start import initial_model
from keye_train.model.trained import export_dtype
from keye_train.model.weight_files import WeightReader
from keye_train.settings import TrainSettings
from keye_train.training.distributed import World
from keye_train.training.engine import Engine

logger = logging.getLogger(__name__)


def write_export(
    engine: Engine,
    config: KeyeConfig,
    settings: TrainSettings,
    run_dir: Path,
    world: World,
    average: bool = False,
) -> Path:
    """Write ``RUN/export``, or the moving average of the weights as ``RUN/export_ema``.

    Collective: every rank must reach this; rank 0 writes.

    Trained parameters are the fp32 masters, in the data type of the export. Frozen ones are the parent's, bit for bit;
    should one have changed, the run is wrong and nothing is written.

    Returns:
        The export's folder.

    Raises:
        RuntimeError: a frozen parameter changed.
    """
    folder = run_dir / (runs.EXPORT_EMA if average else runs.EXPORT)
    parent = None if settings.parent is None else WeightReader(runs.export_dir(settings.parent, "parent"))
    dtype = export_dtype(settings, parent)
    tensors = _tensors(engine, parent, dtype, average)
    files = trained_files(Path(settings.model.tokenizer), settings.data.resolution)
    if world.is_main:
        save_export(tensors, config, folder, extra_files=files)
        logger.info("model exported to %s", folder)
    else:
        for _ in tensors:
            pass  # Collective: the gathers behind each tensor need every rank
    world.barrier()
    return folder


def write_start(settings: TrainSettings, folder: Path) -> Path:
    """Export the model as it stands before any training: what a chain is compared with.

    Its weights come from ``model.start`` and the seed, as those of the first language stage do. Kept when it is there
    and of the same model, seed and budgets.

    Returns:
        The export's folder, ``folder / export``.
    """
    export = folder / runs.EXPORT
    resolution = settings.data.resolution
    made_from = {"model": asdict(settings.model), "seed": settings.seed, "resolution": asdict(resolution)}
    origin = folder / "origin.json"
    if not (origin.exists() and runs.read_json(origin) == made_from):
        model = initial_model(settings.model, settings.seed)
        files = trained_files(Path(settings.model.tokenizer), resolution)
        save_export(model.state_dict().items(), model.config, export, extra_files=files)
        runs.write_json_atomic(origin, made_from)
    return export


def _tensors(
    engine: Engine, parent: WeightReader | None, dtype: torch.dtype, average: bool
) -> Iterator[tuple[str, Tensor]]:
    for name in engine.shapes:
        value = engine.full_average(name) if average else engine.full_parameter(name)
        if name in engine.frozen and parent is not None and name in parent:
            start = parent(name)
            if not torch.equal(start.to(value), value):
                raise RuntimeError(
                    f"{name} is frozen, but differs from the parent's: the trainer is at fault, not exported"
                )
            value = start
        yield name, value.to(dtype)
