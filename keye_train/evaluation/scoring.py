"""Scores of generated answers, the score that a constant answer would get, and how sure both are.

======== ==================================================================== ============================
metric   score of one answer                                                  expected
======== ==================================================================== ============================
exact    1 where both texts are equal after ``normalise``                     ``answer``
box_iou  1 where each expected box meets one of its own with IoU >= 0.5       boxes in ``answer``
point    1 where the point lies in the box                                    ``box`` [x1, y1, x2, y2]
token_f1 harmonic mean of precision and recall over words                     ``answer``
edit     1 - Levenshtein distance / length of the longer text                 ``answer``
======== ==================================================================== ============================

Coordinates are thousandths of the image's sides, in [0, 1000).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from rapidfuzz.distance import Levenshtein

from keye_train.model.markup import GRID, Box, Point, format_boxes, parse_boxes, parse_points
from keye_train.sample import Sample, SampleError

IOU_THRESHOLD = 0.5
CORRECT_FROM = 0.5
"""Scores from here on count as correct where a sample is shown as right or wrong."""
_Z95 = 1.959963984540054
_BOOTSTRAP_DRAWS = 2000

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


class Metric(str, Enum):
    """How an answer is scored; every score lies in [0, 1]."""

    exact = "exact"
    box_iou = "box_iou"
    point = "point"
    token_f1 = "token_f1"
    edit = "edit"


@dataclass(frozen=True)
class Target:
    """What a held-out sample expects."""

    metric: Metric
    answer: str
    box: Box | None = None  # metric=point: the region that the point must hit

    @classmethod
    def of(cls, sample: Sample) -> Target:
        """Read ``answer``, ``metric`` and ``box`` of a sample's JSON.

        Raises:
            SampleError: they are missing or do not fit together.
        """
        name = sample.meta.get("metric", Metric.exact.value)
        if name not in Metric.__members__:
            raise SampleError(f"'metric' is {name!r}; known are {sorted(Metric.__members__)}")
        answer = sample.meta.get("answer")
        if not isinstance(answer, str) or not answer:
            raise SampleError("'answer' is missing: a held-out sample names the expected text")
        box = None
        if name == Metric.point.value:
            value = sample.meta.get("box")
            if not isinstance(value, list) or len(value) != 4:
                raise SampleError("'box' is missing: metric point needs [x1, y1, x2, y2] of the target")
            box = (float(value[0]), float(value[1]), float(value[2]), float(value[3]))
        if name == Metric.box_iou.value and not parse_boxes(answer):
            raise SampleError(f"'answer' {answer!r} holds no box, but metric is box_iou")
        return cls(Metric(name), answer, box)


def score(target: Target, generated: str) -> float:
    """Score in [0, 1] of a generated text; garbage scores 0 and never raises."""
    if target.metric == Metric.exact:
        return float(normalise(generated) == normalise(target.answer))
    if target.metric == Metric.box_iou:
        return float(_boxes_match(parse_boxes(generated), parse_boxes(target.answer)))
    if target.metric == Metric.point:
        assert target.box is not None
        points = parse_points(generated)
        return float(len(points) == 1 and _inside(points[0], target.box))
    if target.metric == Metric.token_f1:
        return token_f1(generated, target.answer)
    return edit_similarity(generated, target.answer)


def normalise(text: str) -> str:
    """Lower case, one form of each character (NFKC), single spaces, no full stop or quotes around."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .!\"'`。")


def iou(left: Box, right: Box) -> float:
    """Intersection over union of two boxes with an area."""
    width = min(left[2], right[2]) - max(left[0], right[0])
    height = min(left[3], right[3]) - max(left[1], right[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(left) + _area(right) - shared)


def token_f1(generated: str, expected: str) -> float:
    """F1 over the multisets of words; each Chinese or Japanese character is a word."""
    left, right = Counter(_words(generated)), Counter(_words(expected))
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total()) if shared else 0.0


def edit_similarity(generated: str, expected: str) -> float:
    """1 - Levenshtein distance / length of the longer text, after ``normalise``."""
    return float(Levenshtein.normalized_similarity(normalise(generated), normalise(expected)))


def chance_level(targets: Sequence[Target]) -> float:
    """Mean score of the best constant answer: what a model reaches that never looks at its input.

    Candidates: exact, token_f1 and edit try every expected text; box_iou tries every expected box, their mean and
    their median; point takes the best of all GRID x GRID points. Where a task mixes metrics, each metric gets its own
    constant answer, so the level is never too low.
    """
    total = 0.0
    for metric in Metric:
        group = [target for target in targets if target.metric == metric]
        if group:
            total += _best_constant(metric, group)
    return total / len(targets)


def _best_constant(metric: Metric, targets: Sequence[Target]) -> float:
    """Sum over ``targets`` of the scores of the best constant answer."""
    if metric == Metric.exact:
        return float(max(Counter(normalise(target.answer) for target in targets).values()))
    if metric == Metric.point:
        return float(_deepest_overlap([target.box for target in targets if target.box is not None]))
    candidates = list(dict.fromkeys(target.answer for target in targets))
    if metric == Metric.box_iou:
        boxes = np.array([box for target in targets for box in parse_boxes(target.answer)])
        middle = np.minimum([boxes.mean(axis=0), np.median(boxes, axis=0)], GRID - 1)
        candidates += [format_boxes([box]) for box in middle.tolist()]
    return max(sum(score(target, candidate) for target in targets) for candidate in candidates)


def _deepest_overlap(boxes: Sequence[Box]) -> int:
    """Largest number of boxes that one grid point lies in, by two-dimensional prefix sums."""
    depth = np.zeros((GRID + 1, GRID + 1), dtype=np.int64)
    for box in boxes:
        x1, y1 = math.ceil(max(box[0], 0)), math.ceil(max(box[1], 0))
        x2, y2 = math.floor(min(box[2], GRID - 1)) + 1, math.floor(min(box[3], GRID - 1)) + 1
        if x1 < x2 and y1 < y2:
            depth[y1, x1] += 1
            depth[y2, x2] += 1
            depth[y1, x2] -= 1
            depth[y2, x1] -= 1
    return int(depth.cumsum(axis=0).cumsum(axis=1).max())


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of ``scores`` in [0, 1].

    Wilson's interval (Wilson 1927) where all scores are 0 or 1; else the percentile bootstrap with a fixed seed.
    """
    values = np.asarray(scores, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        shrink = 1 + _Z95**2 / n
        centre = (mean + _Z95**2 / (2 * n)) / shrink
        half = _Z95 * math.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n * n)) / shrink
        # Rounding must not put the ends on the wrong side of 0 or 1.
        return (0.0 if mean == 0 else centre - half), (1.0 if mean == 1 else centre + half)
    draws = np.random.default_rng(0).choice(values, size=(_BOOTSTRAP_DRAWS, n)).mean(axis=1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def mean_interval(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % confidence interval of the mean over tasks of each task's mean score (normal approximation)."""
    means = [float(np.mean(scores)) for scores in tasks]
    variance = sum(float(np.var(scores)) / len(scores) for scores in tasks) / len(tasks) ** 2
    mean, half = float(np.mean(means)), _Z95 * math.sqrt(variance)
    return max(0.0, mean - half), min(1.0, mean + half)


def _boxes_match(found: list[Box], expected: list[Box]) -> bool:
    """As many boxes as expected, each the partner of one expected box."""
    if len(found) != len(expected):
        return False
    left = list(found)
    for box in expected:
        best = max(left, key=lambda candidate: iou(candidate, box))
        if iou(best, box) < IOU_THRESHOLD:
            return False
        left.remove(best)
    return True


def _inside(point: Point, box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))
