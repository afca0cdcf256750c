"""``keye-eval``: several models, one set of held-out samples, one table.

A model's results are kept under ``OUT/cache``, named by the fingerprints of model, data and settings, so that a
second call computes only what is new. ``OUT/results.json`` is made anew each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from keye_train.data.heldout import Skipped, leave_out, read_drawn
from keye_train.evaluation.answers import Encoded, answer_all, encode_task
from keye_train.evaluation.exports import Export, compute_dtype, device, opened_exports
from keye_train.evaluation.fingerprints import FileHashes
from keye_train.evaluation.heldout import Heldout, Question, fingerprint, read_tasks
from keye_train.evaluation.loss import heldout_loss
from keye_train.evaluation.results import results_table, summarise, task_result
from keye_train.evaluation.retrieval import embed_pairs, retrieval_scores
from keye_train.evaluation.scoring import CORRECT_FROM, score
from keye_train.evaluation.zeroshot import ZeroshotTask, class_vectors, read_zeroshot, zeroshot_scores
from keye_train.model.pretrained import load_dual_encoder, load_export
from keye_train.model.sample_encoder import EncodedPair, SampleEncoder
from keye_train.runs import commit, read_json, versions, write_json_atomic
from keye_train.sample import Sample, SampleError
from keye_train.settings import EvaluationSettings, SettingsError

logger = logging.getLogger(__name__)

RESULTS = "results.json"
CACHE = "cache"
PLAIN_WIDTH = 160  # columns of the table where the output is no terminal
CACHE_VERSION = 2
"""Goes up whenever the same model and data would give another result."""


@dataclass
class Heldouts:
    """Everything that is asked."""

    tasks: dict[str, Heldout]
    pairs: list[Sample]
    zeroshot: dict[str, ZeroshotTask]
    fingerprint: str


def evaluate(settings: EvaluationSettings, progress: bool = True) -> Path:
    """Score every model of ``settings.models``, write ``OUT/results.json`` and print the table.

    Language models answer the tasks of ``data.heldout``; exports of Stage 0 match the pairs of ``data.heldout_pairs``
    and classify the images of ``data.zeroshot``.

    Returns:
        Path of results.json.

    Raises:
        SettingsError: impossible settings, or data that cannot be read.
        FileNotFoundError: a model is not there.
    """
    settings.check()
    out = Path(settings.out)
    asked = _read_heldouts(settings)
    with opened_exports(settings.named_models(), out) as exports:
        finished = _evaluate_all(settings, asked, exports, progress)
    results = {
        "data": settings.data.name,
        "data_fingerprint": asked.fingerprint,
        "settings": _asked_settings(settings),
        "tasks": summarise(finished),
        "models": finished,
        "versions": versions(),
        "commit": commit(),
    }
    write_json_atomic(out / RESULTS, results)
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(results_table(results))
    return out / RESULTS


def _evaluate_all(
    settings: EvaluationSettings, asked: Heldouts, exports: Mapping[str, Export], progress: bool
) -> list[dict[str, Any]]:
    """Results of each model, in the order of ``exports`` (what the user named -> export); what is new is computed."""
    evaluator = _Evaluator(settings, asked, progress)
    cache = Path(settings.out) / CACHE
    finished: list[dict[str, Any]] = []
    hashes = FileHashes(cache)
    began, computed = time.monotonic(), 0
    for number, (named, export) in enumerate(exports.items(), 1):
        kept = export.folder.is_relative_to(named)  # else it is a checkpoint's, and goes away
        identity = export.fingerprint(hashes if kept else FileHashes(export.folder.parent))
        cached = cache / f"{_cache_key(settings, asked, identity)}.json"
        if cached.exists():
            logger.info("%s: kept from an earlier evaluation", export.name)
            result = read_json(cached)
        else:
            result = evaluator.run(export)
            write_json_atomic(cached, result)
            computed += 1
            left_s = (time.monotonic() - began) / computed * (len(exports) - number)
            logger.info("%s: done, %d of %d, at most %.0f s left", export.name, number, len(exports), left_s)
        result["tasks"] = {task: result["tasks"][task] for task in asked.tasks if task in result["tasks"]}
        path = str(export.folder) if kept else named
        finished.append(result | {"name": export.name, "path": path, "fingerprint": identity})
    return finished


def _read_heldouts(settings: EvaluationSettings) -> Heldouts:
    if not settings.data.heldout and settings.data.heldout_pairs is None and not settings.data.zeroshot:
        raise SettingsError(
            f"data={settings.data.name} has no held-out samples: set data.heldout, data.heldout_pairs or data.zeroshot"
        )
    tasks = read_tasks(settings.data, settings.samples_per_task, settings.seed)
    pairs: list[Sample] = []
    if settings.data.heldout_pairs is not None:
        drawn = read_drawn(
            settings.data.heldout_pairs,
            settings.samples_per_task,
            settings.seed,
            "pairs",
            lambda sample: sample,
            settings.data.storage,
        )
        pairs = [sample for sample in drawn if not isinstance(sample, Skipped)]
        if not pairs:
            raise SettingsError(
                f"data.heldout_pairs: none of its samples can be read; check {settings.data.heldout_pairs.shards}"
            )
    zeroshot = read_zeroshot(settings.data, settings.samples_per_task, settings.seed)
    samples = [question.sample for heldout in tasks.values() for question in heldout.questions]
    classified = [sample for task in zeroshot.values() for sample in task.samples]
    return Heldouts(tasks, pairs, zeroshot, fingerprint([*samples, *pairs, *classified]))


def _asked_settings(settings: EvaluationSettings) -> dict[str, Any]:
    """The settings that decide the numbers."""
    return {
        "samples_per_task": settings.samples_per_task,
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "resolution": asdict(settings.data.resolution),
        "zeroshot": {name: asdict(task) for name, task in settings.data.zeroshot.items()},
    }


def _cache_key(settings: EvaluationSettings, asked: Heldouts, model: str) -> str:
    parts = [CACHE_VERSION, model, asked.fingerprint, list(asked.tasks), _asked_settings(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Evaluator:
    """Runs one model after the other; samples are encoded once for all models that share a tokenizer."""

    def __init__(self, settings: EvaluationSettings, asked: Heldouts, progress: bool) -> None:
        self._settings = settings
        self._asked = asked
        self._quiet = None if progress else True  # None: no bar where stderr is no terminal
        self._encoding_key = ""
        self._encoded: dict[str, list[Encoded]] = {}
        self._skipped: dict[str, list[Skipped]] = {}

    def run(self, export: Export) -> dict[str, Any]:
        """All results of one model."""
        began = time.monotonic()
        processor = export.processor(self._settings.data.resolution, self._settings.data.video_backend)
        result = self._towers(export, processor) if export.is_dual_encoder else self._answers(export, processor)
        return result | {"seconds": round(time.monotonic() - began, 2)}

    def _answers(self, export: Export, processor: SampleEncoder) -> dict[str, Any]:
        if export.encoding_key() != self._encoding_key:
            self._encode(processor)
            self._encoding_key = export.encoding_key()
        model = load_export(export.folder, compute_dtype())
        model.to(device())  # type: ignore[arg-type]
        tasks: dict[str, Any] = {}
        samples: list[dict[str, Any]] = []
        total = sum(len(encoded) for encoded in self._encoded.values())
        with tqdm(total=total, desc=f"evaluate {export.name}", unit="sample", disable=self._quiet) as bar:
            for task, encoded in self._encoded.items():
                answers = answer_all(
                    model, encoded, processor, self._settings.batch_size, self._settings.max_new_tokens, bar.update
                )
                loss = heldout_loss(model, [one.whole for one in encoded], export.settings())
                records = [_record(task, one.question, text) for one, text in zip(encoded, answers, strict=True)]
                tasks[task] = task_result([one.question.target for one in encoded], [r["score"] for r in records], loss)
                tasks[task]["skipped"] = [asdict(one) for one in self._skipped[task]]
                samples += records
        return {"kind": "keye", "tasks": tasks, "samples": samples, "retrieval": None, "zeroshot": None}

    def _encode(self, processor: SampleEncoder) -> None:
        self._encoded, self._skipped = {}, {}
        for task, heldout in self._asked.tasks.items():
            self._encoded[task], self._skipped[task] = encode_task(heldout, processor, self._quiet)

    def _towers(self, export: Export, processor: SampleEncoder) -> dict[str, Any]:
        model = load_dual_encoder(export.folder, compute_dtype()).to(device())
        retrieval = None
        pairs = _encode_pairs(processor, self._asked.pairs, "heldout_pairs")
        if pairs:
            encoded = list(pairs.values())
            images, texts = embed_pairs(model, encoded, export.settings(), device())
            retrieval = retrieval_scores(images, texts, [tuple(pair.text_ids.tolist()) for pair in encoded])
        zeroshot = {}
        for name, task in self._asked.zeroshot.items():
            shown = _encode_pairs(processor, task.samples, f"zeroshot.{name}")
            if shown:
                images, _ = embed_pairs(model, list(shown.values()), export.settings(), device())
                classes = class_vectors(model, processor, task.prompts)
                zeroshot[name] = zeroshot_scores(images, classes, [task.labels[number] for number in shown])
        return {
            "kind": "dual_encoder",
            "tasks": {},
            "samples": [],
            "retrieval": retrieval,
            "zeroshot": zeroshot or None,
        }


def _encode_pairs(processor: SampleEncoder, samples: Sequence[Sample], name: str) -> dict[int, EncodedPair]:
    """Pairs by the number of their sample; broken ones are left out.

    Args:
        name: key below ``data`` in the recipe.

    Raises:
        SettingsError: all of them are broken.
    """
    pairs = {}
    for number, sample in enumerate(samples):
        try:
            pairs[number] = processor.encode_pair(sample)
        except SampleError as error:
            leave_out(name, sample.ref, error)
    if samples and not pairs:
        raise SettingsError(f"data.{name}: none of its samples can be decoded; run keye-data check on its shards")
    return pairs


def _record(task: str, question: Question, generated: str) -> dict[str, Any]:
    """One answer, as the gallery of the report shows it."""
    value = score(question.target, generated)
    return {
        "task": task,
        "key": question.sample.ref.key,
        "shard": question.sample.ref.shard,
        "metric": question.target.metric.value,
        "question": question_text(question.sample),
        "expected": question.target.answer,
        "generated": generated,
        "score": value,
        "correct": value >= CORRECT_FROM,
    }


def question_text(sample: Sample) -> str:
    """Text of the last user turn; images and videos stand as ``[image]`` and ``[video]``."""
    content = next((m["content"] for m in reversed(sample.messages) if m["role"] == "user"), "")
    if isinstance(content, str):
        return content.strip()
    return " ".join(part["text"].strip() if part["type"] == "text" else f"[{part['type']}]" for part in content)
