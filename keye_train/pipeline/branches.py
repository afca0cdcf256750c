"""Mixtures drawn for annealing branches: reproducible from their record, whatever becomes of the generator.

``OUT/branches.json`` keeps every draw with what it was drawn from. A later call takes the weights from there as long
as base, concentration and seed are the same; the recipe of each run holds its own weights as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keye_train import runs
from keye_train.settings import DrawnMixturesSettings

RECORD = "branches.json"
DIGITS = 6


def draw_mixture(base: Mapping[str, float], settings: DrawnMixturesSettings, number: int) -> dict[str, float]:
    """Weights of the mixture ``number``: Dirichlet(concentration * base / sum(base)).

    Depends on base, concentration, seed and number alone. Sources without a share in the base have none.
    """
    sources = sorted(source for source, weight in base.items() if weight > 0)
    shares = np.array([base[source] for source in sources])
    alpha = settings.concentration * shares / shares.sum()
    drawn = np.random.default_rng([settings.seed, number]).dirichlet(alpha)
    weights = {source: round(float(weight), DIGITS) for source, weight in zip(sources, drawn, strict=True)}
    return {source: weights.get(source, 0.0) for source in base}


def recorded_mixtures(
    out: Path, entry: str, base: Mapping[str, float], settings: DrawnMixturesSettings
) -> dict[str, dict[str, float]]:
    """Name -> weights of the mixtures of an entry, from the record where it has them; draws the others.

    Reads only; ``record`` writes.
    """
    known = _read(out).get(entry, {})
    kept = known.get("mixtures", {}) if known.get("drawn_from") == _drawn_from(base, settings) else {}
    names = [f"drawn{number}" for number in range(1, settings.count + 1)]
    return {name: kept.get(name) or draw_mixture(base, settings, n) for n, name in enumerate(names, 1)}


def record(out: Path, entry: str, base: Mapping[str, float], settings: DrawnMixturesSettings) -> None:
    """Keep the mixtures of an entry in ``OUT/branches.json``."""
    mixtures = recorded_mixtures(out, entry, base, settings)
    kept = {"base": settings.base, "drawn_from": _drawn_from(base, settings), "mixtures": mixtures}
    runs.write_json_atomic(out / RECORD, _read(out) | {entry: kept})


def _drawn_from(base: Mapping[str, float], settings: DrawnMixturesSettings) -> dict[str, Any]:
    return {"base_weights": dict(base), "concentration": settings.concentration, "seed": settings.seed}


def _read(out: Path) -> dict[str, Any]:
    return runs.read_json(out / RECORD) if (out / RECORD).exists() else {}
