"""Which weights: greedy, and Nelder-Mead over the simplex. Both see selection samples only.

Both are deterministic, so a search that is repeated asks for the same candidates in the same order; those that are
kept cost nothing. That is what makes it resumable without a state of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from keye_train.settings import SoupMetric

DIGITS = 4  # of a weight: finer ones change no average that a held-out set could tell apart
_LEAN = 1.5  # log weight by which each corner of the first simplex leans towards one model


class BudgetSpentError(Exception):
    """No further candidate may be scored; ends a search, never a command."""


@dataclass(frozen=True)
class Trial:
    """One candidate that was scored on the selection samples."""

    phase: str  # part, uniform, greedy, weights
    weights: tuple[float, ...]  # they sum to 1
    metric: float


class Trials:
    """The candidates so far; each set of weights is scored once."""

    def __init__(
        self,
        score: Callable[[Sequence[float]], float],
        metric: SoupMetric,
        budget: int,
        deadline: float | None = None,
    ) -> None:
        """Args:
        score: metric of some weights on the selection samples.
        metric: tells whether less is better.
        budget: candidates that may be scored.
        deadline: of ``time.monotonic``; no candidate is begun after it.
        """
        self._score, self._sign = score, 1.0 if metric == SoupMetric.loss else -1.0
        self._budget, self._deadline = budget, deadline
        self.done: list[Trial] = []
        self.stopped = ""  # why the search ended before it was through

    def cost(self, phase: str, weights: Sequence[float]) -> float:
        """What is minimised: the loss, or the score with a minus.

        Raises:
            BudgetSpentError: it is new and may not be scored any more.
        """
        rounded = normalised(weights)
        known = next((trial for trial in self.done if trial.weights == rounded), None)
        if known is None:
            if len(self.done) >= self._budget:
                self.stopped = "budget"
                raise BudgetSpentError
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.stopped = "time"
                raise BudgetSpentError
            known = Trial(phase, rounded, self._score(rounded))
            self.done.append(known)
        return self._sign * known.metric

    def best(self) -> Trial:
        """The best candidate so far; of equal ones the first."""
        return min(self.done, key=lambda trial: self._sign * trial.metric)


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that sum to 1, rounded; equal ones stay equal."""
    total = sum(weights)
    return tuple(round(weight / total, DIGITS) for weight in weights)


def exact(weights: Sequence[float]) -> list[float]:
    """Weights as they enter a mean: 1 where all models that take part count alike.

    So a uniform or greedy soup is the plain mean, bit for bit, and not one with thirds rounded to four digits.
    """
    taking_part = {weight for weight in weights if weight}
    return [float(bool(weight)) for weight in weights] if len(taking_part) == 1 else list(weights)


def greedy(trials: Trials, models: int) -> tuple[float, ...]:
    """Greedy soup: Wortsman et al. 2022, "Model soups", recipe 1.

    Models in the order of their metric, the best first; each stays in where the mean of those that stayed is no worse
    with it.

    Returns:
        Weights, equal ones for those that stayed and 0 for the others.
    """
    single = [trials.cost("part", one_hot(i, models)) for i in range(models)]
    order = sorted(range(models), key=lambda i: single[i])
    inside, best = {order[0]}, single[order[0]]
    for model in order[1:]:
        try:
            cost = trials.cost("greedy", _indicator(inside | {model}, models))
        except BudgetSpentError:
            break
        if cost <= best:
            inside, best = inside | {model}, cost
    return normalised(_indicator(inside, models))


def nelder_mead(trials: Trials, models: int, tolerance: float) -> None:
    """Minimise over convex weights with Nelder and Mead 1965 (scipy), from the uniform mean.

    Weights are the softmax of K - 1 free numbers and a 0: every point is convex, none has to be refused. Corners and
    faces of the simplex, which a softmax only comes near, are what the single models and the greedy soup try.
    """

    def cost(free: np.ndarray) -> float:
        logits = np.append(free, 0.0)
        powers = np.exp(logits - logits.max())
        return trials.cost("weights", powers.tolist())

    start = np.zeros((models, models - 1))
    start[1:] = _LEAN * np.eye(models - 1)
    options = {"initial_simplex": start, "fatol": tolerance, "xatol": np.inf, "maxfev": 10_000}
    try:
        minimize(cost, start[0], method="Nelder-Mead", options=options)
    except BudgetSpentError:
        return


def one_hot(model: int, models: int) -> list[float]:
    """One model alone."""
    return _indicator({model}, models)


def _indicator(inside: set[int], models: int) -> list[float]:
    return [1.0 if i in inside else 0.0 for i in range(models)]
