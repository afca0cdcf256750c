"""Values of weighted means on one set of held-out samples, each computed once and kept.

A value is named by the fingerprints of the models with their weights, whatever their order, and of everything else
that decides it. It is on the disk before the next candidate begins, so a search that is stopped goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from keye_train.evaluation.candidates import CandidateScorer, Values, scoring_fingerprint
from keye_train.evaluation.exports import Export
from keye_train.evaluation.fingerprints import FileHashes
from keye_train.evaluation.heldout import Heldout
from keye_train.merging.blend import Blend
from keye_train.merging.compatibility import check_seals
from keye_train.merging.reading import ExportReader
from keye_train.merging.sources import opened
from keye_train.runs import read_json, write_json_atomic
from keye_train.settings import DataSettings, ScoringSettings, SettingsError
from keye_train.soups.search import exact

logger = logging.getLogger(__name__)

CACHE = "cache"


class Models:
    """The models that are mixed."""

    def __init__(self, names: Sequence[str], readers: Sequence[ExportReader], cache: Path) -> None:
        """Args:
            names: in the tables.
            readers: stay open as long as values are asked for.
            cache: where hashes of their files are kept.

        Raises:
            SettingsError: one cannot answer held-out samples; it lists what each lacks.
            MergeError: they cannot be averaged, or a file of a checkpoint is damaged.
        """
        self.exports = [
            Export(name, reader.folder, read_json(reader.folder / "config.json"))
            for name, reader in zip(names, readers, strict=True)
        ]
        self.paths = [str(reader.origin) for reader in readers]
        self._require_answers()
        self.blend = Blend(readers)
        hashes = FileHashes(cache)
        weights = {reader: reader.weight_files() for reader in readers}
        check_seals(readers, lambda reader, file: hashes(file) if file in weights[reader] else None)
        self.fingerprints = [
            export.fingerprint(hashes, files) for export, files in zip(self.exports, weights.values(), strict=True)
        ]

    def _require_answers(self) -> None:
        lacking = [
            f"- {path}: {', '.join(missing)}"
            for path, export in zip(self.paths, self.exports, strict=True)
            if (missing := export.lacking())
        ]
        if lacking:
            raise SettingsError(
                "models: these cannot answer held-out samples, by which curve and search score. Put what is missing "
                "beside the weights, or name other models (keye-merge and keye-merge diagnose need none of it):\n"
                + "\n".join(lacking)
            )

    @property
    def names(self) -> list[str]:
        """Names in the tables."""
        return [export.name for export in self.exports]


@contextmanager
def opened_models(names: Mapping[str, str], out: Path) -> Iterator[Models]:
    """The models of a command that scores, open inside the block.

    Args:
        names: name in the tables -> whatever ``keye-merge`` takes for a model.
        out: folder of the results.

    Raises:
        FileNotFoundError, ExportError: one is absent or broken.
        SettingsError, MergeError: as ``Models``.
    """
    with opened(names.values()) as readers:
        yield Models(list(names), readers, out / CACHE)


class Scoreboard:
    """Scores weights of some models on some samples."""

    def __init__(
        self,
        models: Models,
        tasks: Mapping[str, Heldout],
        data: DataSettings,
        settings: ScoringSettings,
        folder: Path,
        progress: bool = True,
    ) -> None:
        """Args:
        tasks: what is asked.
        folder: values are kept in ``folder / "cache"``.
        progress: show a progress bar while samples are decoded.
        """
        self._models, self._tasks, self._data, self._settings = models, tasks, data, settings
        self._folder, self._progress = folder / CACHE, progress
        self._scorer: CandidateScorer | None = None  # decodes the samples when the first value is missing
        self.fingerprint = scoring_fingerprint(models.exports[0], tasks, data, settings)
        self.computed = 0

    @property
    def samples(self) -> int:
        """Samples that are asked."""
        return sum(len(heldout.questions) for heldout in self._tasks.values())

    def values(self, weights: Sequence[float]) -> Values:
        """Values of sum_i w_i x_i / sum_i w_i.

        Raises:
            SettingsError: the candidate's loss is not finite.
        """
        file = self._folder / f"{self._key(weights)}.json"
        if file.exists():
            return Values.from_json(read_json(file))
        if self._scorer is None:
            first = self._models.exports[0]
            self._scorer = CandidateScorer(first, self._tasks, self._data, self._settings, self._progress)
        found = self._scorer.score(self._models.blend.tensors(exact(weights)))
        self.computed += 1
        write_json_atomic(file, found.to_json())
        return found

    def _key(self, weights: Sequence[float]) -> str:
        total = sum(weights)
        if len(weights) != len(self._models.fingerprints) or not total > 0:
            raise SettingsError(f"weights {list(weights)}: one for each model, with a sum above 0")
        pairs = zip(self._models.fingerprints, weights, strict=True)
        parts = sorted((model, f"{weight / total:.9f}") for model, weight in pairs if weight)
        return hashlib.sha256(json.dumps([self.fingerprint, parts]).encode()).hexdigest()
