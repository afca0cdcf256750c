"""The methods of ``keye-merge``: formula, source and when to use each; ``--help`` shows this table."""

from __future__ import annotations

from dataclasses import dataclass

from keye_train.settings.basics import MergeMethod


@dataclass(frozen=True)
class MethodAbout:
    """What a user has to know about a method, and which settings it takes."""

    formula: str
    source: str
    when: str
    weights: str = "none"  # none: has none; share: >= 0, only their ratio counts; factor: any sign, used as they are
    needs: frozenset[str] = frozenset()  # settings without which it cannot run
    may: frozenset[str] = frozenset()  # settings that it understands besides


_BASE = frozenset({"base"})
_MODULES = frozenset({"modules"})

METHODS: dict[MergeMethod, MethodAbout] = {
    MergeMethod.uniform: MethodAbout(
        "sum of x_i / K",
        "Wortsman et al. 2022, Model soups, section 2",
        "branches annealed from one parent: Keye's last step",
        may=_MODULES,
    ),
    MergeMethod.weighted: MethodAbout(
        "sum of w_i x_i / sum of w_i",
        "the same",
        "weights found on held-out data (keye-merge search)",
        weights="share",
        may=_MODULES,
    ),
    MergeMethod.lawa: MethodAbout(
        "mean of the last K checkpoints of one run",
        "Kaddour 2022, Stop wasting my time!",
        "one run at a constant rate, instead of annealing it",
        needs=frozenset({"last"}),
    ),
    MergeMethod.wma: MethodAbout(
        "sum of i x_i / sum of i, i = 1, 2, ..., K, oldest first",
        "Li et al. 2025, Model merging in pre-training, WMA",
        "checkpoints of one run that still improves",
        may=frozenset({"last"}),
    ),
    MergeMethod.ema: MethodAbout(
        "a_1 = x_1, a_i = decay a_(i-1) + (1 - decay) x_i, oldest first",
        "Tarvainen and Valpola 2017, Mean teachers, equation 1",
        "checkpoints of one run whose rate still moves",
        needs=frozenset({"decay"}),
        may=frozenset({"last"}),
    ),
    MergeMethod.slerp: MethodAbout(
        "(sin((1 - t) Omega) x_1 + sin(t Omega) x_2) / sin Omega, t = w_2 / (w_1 + w_2)",
        "Shoemake 1985, section 3.3",
        "two models far apart, whose mean would lose norm",
        weights="share",
        may=_MODULES,
    ),
    MergeMethod.spherical: MethodAbout(
        "m on the unit sphere with sum of w_i log_m(x_i / |x_i|) = 0, times the mean norm",
        "Buss and Fillmore 2001, Spherical averages, algorithm A1",
        "more than two models far apart",
        weights="share",
        may=_MODULES,
    ),
    MergeMethod.task_arithmetic: MethodAbout(
        "b + sum of w_i (x_i - b)",
        "Ilharco et al. 2023, section 2",
        "to add what several trainings of one base learned, or (w < 0) to take it away",
        weights="factor",
        needs=_BASE,
        may=_MODULES,
    ),
    MergeMethod.ties: MethodAbout(
        "b + scale * mean of the trimmed deltas whose sign is the elected one",
        "Yadav et al. 2023, TIES-Merging, algorithm 1",
        "experts of one base whose deltas have conflicting signs",
        weights="share",
        needs=_BASE,
        may=frozenset({"modules", "density", "scale"}),
    ),
    MergeMethod.dare_linear: MethodAbout(
        "b + sum of w_i m_i (x_i - b) / density, m_i = 1 with probability density",
        "Yu et al. 2024, Language models are super Mario",
        "many experts with small deltas, so that they meet in few values",
        weights="factor",
        needs=frozenset({"base", "density"}),
        may=frozenset({"modules", "seed"}),
    ),
    MergeMethod.dare_ties: MethodAbout(
        "as ties, with m_i (x_i - b) / density in place of the trimmed deltas",
        "Yu et al. 2024 with Yadav et al. 2023",
        "as dare_linear, where signs conflict",
        weights="share",
        needs=frozenset({"base", "density"}),
        may=frozenset({"modules", "scale", "seed"}),
    ),
    MergeMethod.model_stock: MethodAbout(
        "t mean(x_i) + (1 - t) b, t = K c / (1 + (K - 1) c), c = mean cosine of the deltas",
        "Jang et al. 2024, Model stock, the ratio for N models",
        "two or three fine-tunings of one base, no held-out data",
        needs=_BASE,
    ),
}
"""x_i: a tensor of model i; b: of the base; K: number of models; w_i: weights."""


def method_table() -> str:
    """The table as indented text for ``keye-merge --help``."""
    lines = []
    for method, about in METHODS.items():
        lines.append(f"  merge={method.value}\n      {about.formula}\n      {about.source}; {about.when}")
        needs = ["weights"] * (about.weights != "none") + sorted(about.needs)
        words = [f"needs {', '.join(needs)}"] * bool(needs) + [f"may have {', '.join(sorted(about.may))}"] * bool(
            about.may
        )
        lines += [f"      {'; '.join(words)}"] * bool(words)
    return "\n".join(lines)
