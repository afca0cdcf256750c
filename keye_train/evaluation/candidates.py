"""Scores of weights that stand in no folder: one model in memory, filled again for each candidate.

The samples are decoded once. Of every sample there remain two numbers, so that means over tasks, and their bootstrap,
are computed afterwards and candidates are compared sample by sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from keye_train.evaluation.answers import answer_all, encode_task
from keye_train.evaluation.exports import Export, compute_dtype, device
from keye_train.evaluation.heldout import Heldout, fingerprint
from keye_train.evaluation.loss import sample_losses
from keye_train.evaluation.scoring import score
from keye_train.model.pretrained import empty_model, load_state, read_config, require_all
from keye_train.model.weight_files import NamedTensors
from keye_train.settings import DataSettings, ScoringSettings, SettingsError, SoupMetric

VERSION = 1
"""Goes up whenever the same weights and data would give other values."""


@dataclass(frozen=True)
class Values:
    """What one candidate reached on each sample of each task; the metric of a task is sum(value) / sum(weight)."""

    value: dict[str, np.ndarray]  # task -> [N] float64: loss of the answer's tokens, or score of the answer
    weight: dict[str, np.ndarray]  # task -> [N] float64: number of these tokens, or 1

    def mean(self) -> float:
        """Mean over tasks, as ``keye-eval`` reports it; to the last bit the same in any order of the tasks."""
        return float(np.mean([self.value[task].sum() / self.weight[task].sum() for task in sorted(self.value)]))

    def to_json(self) -> dict[str, dict[str, list[float]]]:
        """Plain values; ``from_json`` reads them back."""
        return {task: {"value": self.value[task].tolist(), "weight": self.weight[task].tolist()} for task in self.value}

    @classmethod
    def from_json(cls, stored: dict[str, dict[str, list[float]]]) -> Values:
        """What ``to_json`` gave."""
        pairs = {task: (np.array(one["value"]), np.array(one["weight"])) for task, one in stored.items()}
        return cls({task: pair[0] for task, pair in pairs.items()}, {task: pair[1] for task, pair in pairs.items()})


def scoring_fingerprint(
    export: Export, tasks: Mapping[str, Heldout], data: DataSettings, settings: ScoringSettings
) -> str:
    """SHA-256 of everything but the weights that decides the values of a candidate. Decodes nothing."""
    asked = [question.sample for heldout in tasks.values() for question in heldout.questions]
    parts: list[object] = [VERSION, fingerprint(asked), settings.metric.value, asdict(data.resolution)]
    parts += [export.encoding_key(), data.video_backend.value, str(compute_dtype()), device().type]
    if settings.metric == SoupMetric.score:
        parts += [settings.batch_size, settings.max_new_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class CandidateScorer:
    """Scores states of one architecture on fixed samples."""

    def __init__(
        self,
        export: Export,
        tasks: Mapping[str, Heldout],
        data: DataSettings,
        settings: ScoringSettings,
        progress: bool,
    ) -> None:
        """Args:
            export: the architecture, tokenizer and processor of all candidates.
            tasks: what is asked.

        Raises:
            SettingsError: an export of Stage 0, or samples none of which can be decoded.
        """
        if export.is_dual_encoder:
            raise SettingsError(f"{export.folder} is an export of Stage 0: it answers nothing; name language models")
        self._settings, self._model_settings = settings, export.settings()
        self._folder = export.folder
        self._processor = export.processor(data.resolution, data.video_backend)
        quiet = None if progress else True
        self._encoded = {task: encode_task(heldout, self._processor, quiet)[0] for task, heldout in tasks.items()}
        self._model = empty_model(read_config(export.folder, compute_dtype()))
        self._model.to(device()).eval()  # type: ignore[arg-type]

    @torch.inference_mode()
    def score(self, state: NamedTensors) -> Values:
        """Fill the model with ``state`` and ask it everything.

        Raises:
            ValueError: the state does not fit the model.
        """
        filled = load_state(self._model, state)
        require_all(self._model, filled, str(self._folder), allowed=lambda name: False)
        value, weight = {}, {}
        for task, encoded in self._encoded.items():
            if self._settings.metric == SoupMetric.loss:
                losses, tokens = sample_losses(self._model, [one.whole for one in encoded], self._model_settings)
                value[task], weight[task] = losses.numpy(), tokens.double().numpy()
            else:
                answers = answer_all(
                    self._model, encoded, self._processor, self._settings.batch_size, self._settings.max_new_tokens
                )
                scores = [score(one.question.target, text) for one, text in zip(encoded, answers, strict=True)]
                value[task], weight[task] = np.array(scores), np.ones(len(scores))
        return Values(value, weight)
