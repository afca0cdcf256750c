"""Zero-shot classification with Stage 0's two towers: an image belongs to the class whose prompts are nearest.

Classes and prompts come from the data recipe (``data.zeroshot``). The prompts of a class are averaged, as CLIP and
SigLIP do. Legend: N images, K classes, R prompts of a class, L caption tokens, C width of the vectors.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from keye_train.data.heldout import Skipped, read_rows, shard_rows
from keye_train.evaluation.retrieval import BATCH_PAIRS
from keye_train.evaluation.scoring import interval
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.sample_encoder import SampleEncoder
from keye_train.sample import Sample
from keye_train.settings import DataSettings, SettingsError, SourceSettings, StorageSettings, ZeroshotSettings


@dataclass(frozen=True)
class ZeroshotTask:
    """Samples of one image each, with the class that each belongs to."""

    classes: list[str]
    prompts: list[list[str]]  # of each class
    samples: list[Sample]
    labels: list[int]  # number of each sample's class


def read_zeroshot(data: DataSettings, samples_per_task: int, seed: int) -> dict[str, ZeroshotTask]:
    """Draw at most ``samples_per_task`` samples of each task of ``data.zeroshot``, of those that show one class.

    Every shard of a task is read whole, since which class a sample shows stands in its JSON only; the media of the
    samples that were drawn are read again, and no others are kept.

    Raises:
        SettingsError: a shard or its index is missing, or no sample shows one of the classes.
    """
    return {name: _read_task(name, task, samples_per_task, seed, data.storage) for name, task in data.zeroshot.items()}


def _read_task(
    name: str, settings: ZeroshotSettings, samples_per_task: int, seed: int, storage: StorageSettings
) -> ZeroshotTask:
    classes = list(settings.classes)
    prompts = [[prompt.format(word) for prompt in settings.prompts for word in settings.classes[c]] for c in classes]
    rows = shard_rows(SourceSettings(settings.shards), storage)
    found: list[tuple[tuple[str, int], int]] = []  # row and class; the media of a whole task would fill the memory
    labels = read_rows(
        rows, f"zeroshot.{name}", lambda sample: _values(sample.meta, settings.label.split(".")), storage
    )
    for row, values in zip(rows, labels, strict=True):
        if isinstance(values, Skipped):
            continue
        shown = {str(value) for value in values}
        if len(shown) == 1 and (label := shown.pop()) in settings.classes:
            found.append((row, classes.index(label)))
    if not found:
        raise SettingsError(
            f"data.zeroshot.{name}: no sample of {settings.shards} has one of the classes {classes} under "
            f"'{settings.label}'; check label and classes against the samples' JSON"
        )
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(found))[:samples_per_task]
    drawn = [found[number] for number in sorted(order.tolist())]
    samples = read_rows((row for row, _ in drawn), f"zeroshot.{name}", lambda sample: sample, storage)
    # Read a moment ago; one that cannot be read now is left out with its class.
    kept = [(one, label) for one, (_, label) in zip(samples, drawn, strict=True) if not isinstance(one, Skipped)]
    return ZeroshotTask(classes, prompts, [one for one, _ in kept], [label for _, label in kept])


def _values(record: Any, path: Sequence[str]) -> list[Any]:
    """All values under a path of keys; lists on the way are walked through."""
    if isinstance(record, list):
        return [value for part in record for value in _values(part, path)]
    if not path:
        return [record]
    return _values(record[path[0]], path[1:]) if isinstance(record, dict) and path[0] in record else []


@torch.inference_mode()
def class_vectors(model: DualEncoder, processor: SampleEncoder, prompts: Sequence[Sequence[str]]) -> Tensor:
    """The mean vector of each class's prompts, of length 1: [K, C] float32 on the CPU."""
    device = next(model.parameters()).device
    ids = processor.text_ids([prompt for group in prompts for prompt in group])
    vectors = [model.text_model(part.to(device)).float().cpu() for part in ids.split(BATCH_PAIRS)]
    groups = F.normalize(torch.cat(vectors), dim=-1).split([len(group) for group in prompts])
    return F.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)


def zeroshot_scores(images: Tensor, classes: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Accuracy with its interval and the level of chance.

    Args:
        images: [N, C], rows of length 1.
        classes: [K, C], rows of length 1.
        labels: class of each image.

    Returns:
        ``score``, ``low``, ``high``, ``n``, ``classes`` (K) and ``chance``, the share of the most frequent class.
    """
    similarity = images @ classes.T  # [N, K]
    own = torch.tensor(labels)[:, None]
    others = similarity.scatter(1, own, -torch.inf)
    # Ties count against the model: one that finds everything alike classifies nothing.
    hits = (similarity.gather(1, own)[:, 0] > others.amax(dim=1)).double().tolist()
    low, high = interval(hits)
    return {
        "score": sum(hits) / len(hits),
        "low": low,
        "high": high,
        "n": len(hits),
        "classes": len(classes),
        "chance": max(Counter(labels).values()) / len(labels),
    }
