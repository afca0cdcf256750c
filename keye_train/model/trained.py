"""The model that a checkpoint of a training stands for, a tensor at a time: no engine, no GPU, no second rank.

The same tensors, to the last bit, that the run itself would export at that step: trained parameters are the fp32
masters in the data type of the export, frozen ones are the parent's as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keye_train import compose, runs
from keye_train.checkpoints import AVERAGE, WEIGHTS, CheckpointReader, fault
from keye_train.checkpoints.layout import MANIFEST, STATE
from keye_train.model.configuration import KeyeConfig, keye_config
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.processor_files import trained_files
from keye_train.model.start import initial_dual_encoder, initial_model
from keye_train.model.weight_files import ExtraFiles, WeightReader
from keye_train.settings import Objective, Precision, TrainSettings


class TrainedModel:
    """A whole checkpoint as a model.

    Args:
        folder: ``RUN/checkpoints/step-N``.
        average: the moving average of the weights instead of the weights.
        verify: hash every file of the checkpoint first.

    Raises:
        FileNotFoundError: no checkpoint, or its parent or tokenizer is no longer where its recipe says.
        ValueError: the checkpoint is torn, of an older format without a manifest, or has no average.
    """

    def __init__(self, folder: str | Path, average: bool = False, verify: bool = True) -> None:
        self.folder = Path(folder)
        wrong = fault(self.folder) if verify else None
        if wrong is not None:
            raise ValueError(f"{folder} is no whole checkpoint ({wrong}): take another one")
        if not (self.folder / MANIFEST).exists():
            raise ValueError(
                f"{folder} has no {MANIFEST}: an older version wrote it. Resume the run, whose next checkpoint has one"
            )
        self.reader = CheckpointReader(self.folder)
        self.state = AVERAGE if average else WEIGHTS
        if self.state not in self.reader.states:
            raise ValueError(f"{folder} holds no moving average: stage.optimizer.ema_decay was 0")
        self.settings = compose.to_settings(TrainSettings, runs.read_json(self.folder / MANIFEST)["recipe"])
        parent = self.settings.parent
        self._parent_folder = None if parent is None else runs.export_dir(parent)
        self._parent = None if self._parent_folder is None else WeightReader(self._parent_folder)
        self.dtype = export_dtype(self.settings, self._parent)
        """Of the export."""
        with torch.device("meta"):
            self._model = _model_of(self.settings)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._model.named_parameters()}
        """Of all parameters, in the order of the export."""

    @property
    def config(self) -> KeyeConfig:
        """Becomes config.json."""
        return self._model.config

    def files(self) -> ExtraFiles:
        """What an export carries beside the weights; its manifest.json names the checkpoint."""
        state = runs.read_json(self.folder / STATE)
        origin = {"status": "checkpoint", "checkpoint": str(self.folder), "weights": self.state}
        done = {"steps": state["step"], "updates": state["updates"]}
        manifest: dict[str, Any] = runs.read_json(self.folder / MANIFEST) | origin | done
        beside = trained_files(Path(self.settings.model.tokenizer), self.settings.data.resolution)
        return {**beside, runs.MANIFEST: manifest}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters under their official names, one at a time, in the data type and order of the export."""
        trained = set(self.reader.names())
        for name in self.shapes:
            yield name, (self.reader.tensor(name, self.state) if name in trained else self._frozen(name)).to(self.dtype)

    def _frozen(self, name: str) -> Tensor:
        if self._parent is not None and name in self._parent:
            return self._parent(name)
        bf16 = self.settings.deepspeed.precision == Precision.bf16  # what the engine holds of it
        return self._first_weights[name].to(torch.bfloat16 if bf16 else torch.float32)

    @cached_property
    def _first_weights(self) -> dict[str, Tensor]:
        """Where no parent has them, the frozen parameters are those of ``model.start``; whole in memory, fp32."""
        settings = self.settings
        if settings.stage.objective == Objective.contrastive:
            captions = settings.stage.caption_weight > 0
            model: nn.Module = initial_dual_encoder(settings.model, settings.seed, captions=captions)
        else:
            model = initial_model(settings.model, settings.seed, self._parent_folder)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


def export_dtype(settings: TrainSettings, parent: WeightReader | None) -> torch.dtype:
    """bf16, as published, for a run whose weights and parent are bf16; else fp32, which loses nothing."""
    if settings.deepspeed.precision != Precision.bf16:
        return torch.float32
    if parent is None:
        return torch.bfloat16
    return torch.bfloat16 if parent(min(parent.names())).dtype == torch.bfloat16 else torch.float32


def _model_of(settings: TrainSettings) -> KeyeForConditionalGeneration | DualEncoder:
    config = keye_config(settings.model)
    if settings.stage.objective == Objective.contrastive:
        return DualEncoder(
            config, settings.model.text_tower, settings.model.caption_decoder if settings.stage.caption_weight else None
        )
    return KeyeForConditionalGeneration(config)
