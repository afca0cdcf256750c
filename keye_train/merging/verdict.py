"""From the figures of a diagnosis to a verdict. All thresholds are ours.

They say where an average is promising, not that it works: only held-out loss along the line between two models does
(``keye-merge curve``). Random directions in n dimensions have cosines of about 1 / sqrt(n), and two deltas that have
nothing in common oppose each other in half of the coordinates that both move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ONE_BASIN, DOUBTFUL, APART = "one basin", "doubtful", "apart"


@dataclass(frozen=True)
class Criterion:
    """One figure with the bounds between good, doubtful and bad; ``high`` says that higher is better."""

    figure: str
    label: str
    good: float
    bad: float
    high: bool
    why: str

    def level(self, value: float) -> int:
        """0 good, 1 doubtful, 2 bad."""
        sign = 1 if self.high else -1
        return 0 if sign * value >= sign * self.good else 1 if sign * value >= sign * self.bad else 2


CRITERIA = (
    Criterion(
        "distance",
        "largest distance of two models, over their norm",
        0.3,
        0.7,
        False,
        "unrelated models of one norm lie 1.41 apart; the mean of two that lie d apart has lost d^2 / 8 of its norm",
    ),
    Criterion(
        "cosine",
        "smallest cosine of two deltas",
        0.05,
        0.0,
        True,
        "below 0 the mean takes back what either has learned",
    ),
    Criterion(
        "conflict",
        "largest share of coordinates moved in opposite directions",
        0.5,
        0.55,
        False,
        "0.5 is that of deltas with nothing in common",
    ),
)


def judge(modules: Mapping[str, Mapping[str, Any]], has_base: bool) -> dict[str, Any]:
    """The verdict over all modules: that of the worst criterion in the worst module.

    Args:
        modules: name -> figures of ``diagnosis.describe``.
        has_base: whether there are deltas to a parent; without, the distance alone decides.

    Returns:
        ``verdict``, ``reasons`` (one line for each criterion: the worst module, its value, the bounds) and
        ``criteria`` (the bounds, for the page).
    """
    worst_level, reasons = 0, []
    for criterion in CRITERIA:
        if not has_base and criterion.figure != "distance":
            continue
        values = {}
        for module, figures in modules.items():
            found = pairs(figures[criterion.figure])
            if found:
                values[module] = min(found) if criterion.high else max(found)
        if not values:  # no model differs from the parent
            continue
        pick = min if criterion.high else max
        module = pick(values, key=lambda name: values[name])
        level = criterion.level(values[module])
        worst_level = max(worst_level, level)
        bound = "at least" if criterion.high else "at most"
        reasons.append(
            {
                "figure": criterion.figure,
                "label": criterion.label,
                "module": module,
                "value": values[module],
                "level": (ONE_BASIN, DOUBTFUL, APART)[level],
                "bounds": f"good: {bound} {criterion.good:g}; {DOUBTFUL}: {bound} {criterion.bad:g}",
                "why": criterion.why,
            }
        )
    return {"verdict": (ONE_BASIN, DOUBTFUL, APART)[worst_level], "reasons": reasons}


def pairs(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    """Values of a symmetric matrix above its diagonal that exist."""
    return [value for i, row in enumerate(matrix) for value in row[i + 1 :] if value is not None]
