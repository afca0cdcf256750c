"""Are these models siblings in one basin? Told from their weights alone, before anything is averaged.

Every tensor is read once, all models side by side, a window at a time. Of each window of K models x_i with the origin
o (the common parent, else the first model) there remain sums in float64:

- the Gram matrix G_ij = <x_i - o, x_j - o>: every distance |x_i - x_j|^2 = G_ii + G_jj - 2 G_ij, every norm of a delta
  and every cosine G_ij / sqrt(G_ii G_jj) of two deltas follows from it;
- the norms |x_i|^2 and |o|^2, to which distances are compared;
- the number of coordinates that two deltas move, and of those that they move in opposite directions (sign conflict;
  Yadav et al. 2023, "TIES-Merging", section 3);
- the mass of all deltas and of the minority sign at each coordinate: sum min(P, N) and sum P + N, where P and N are
  the sums of the positive and negative parts. What a mean cancels, half of it at most.

Sums of tensors are added up by layer, by module and in all, so memory does not grow with the models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from keye_train.merging.compatibility import MergeError
from keye_train.merging.methods import AVERAGED_DTYPES
from keye_train.merging.verdict import judge, pairs
from keye_train.merging.windows import Windows
from keye_train.model.parameters import MODULE_PREFIXES, PACKING_TABLE, POOLING_HEAD
from keye_train.runs import commit, export_dir, versions, write_json_atomic
from keye_train.settings import DiagnosisSettings, SettingsError

DIAGNOSIS = "diagnosis.json"
TOTAL = "all"
UNREAD = (PACKING_TABLE, POOLING_HEAD)
"""Tensors that no language model reads: equal in all siblings, they would only make distances look smaller."""
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass
class Sums:
    """What remains of the tensors of one group; K models."""

    gram: Tensor  # [K, K] float64, of the deltas
    squares: Tensor  # [K] float64, |x_i|^2
    origin_square: float  # |o|^2
    moved: Tensor  # [K, K] float64, coordinates that both deltas move
    opposed: Tensor  # [K, K] float64, of these, in opposite directions
    mass: float  # sum over coordinates of sum_i |x_i - o|
    minority: float  # of this, what has the minority sign of its coordinate
    elements: int
    tensors: int

    @classmethod
    def zero(cls, models: int) -> Sums:
        """Of no tensor."""
        gram, moved, opposed = (torch.zeros(models, models, dtype=torch.float64) for _ in range(3))
        return cls(gram, torch.zeros(models, dtype=torch.float64), 0.0, moved, opposed, 0.0, 0.0, 0, 0)

    def add(self, values: Tensor, origin: Tensor) -> None:
        """Count a window; values [K, N] and origin [N], float64."""
        deltas = values - origin
        self.gram += deltas @ deltas.T
        self.squares += values.square().sum(dim=1)
        self.origin_square += float(origin.square().sum())
        signs = deltas.sign().float()  # sums of at most 2^20 signs are exact
        agree_less_conflict = (signs @ signs.T).double()
        moved = (signs.abs() @ signs.abs().T).double()
        self.moved += moved
        self.opposed += (moved - agree_less_conflict) / 2
        total = deltas.abs().sum(dim=0)  # P + N
        lead = deltas.sum(dim=0).abs()  # |P - N|
        self.mass += float(total.sum())
        self.minority += float(((total - lead) / 2).sum())
        self.elements += values.shape[1]

    def merge(self, other: Sums) -> None:
        """Add the sums of another group."""
        for name in ("gram", "squares", "moved", "opposed"):
            getattr(self, name).add_(getattr(other, name))
        for name in ("origin_square", "mass", "minority", "elements", "tensors"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def diagnose(settings: DiagnosisSettings, progress: bool = True) -> Path:
    """Compare the exports ``settings.models`` and write ``OUT/diagnosis.json``.

    Peak memory is bounded (two windows of 256 MiB) for any number and size of models; each input is read once.

    Returns:
        The file. ``keye_train.report.write_diagnosis`` makes a page of it.

    Raises:
        SettingsError: impossible settings.
        FileNotFoundError, ExportError: a model is absent or broken.
        MergeError: models without the same tensors, or values that are not finite; it lists every one.
    """
    settings.check()
    folders = [export_dir(model) for model in settings.models]
    base = [export_dir(settings.base)] if settings.base else []
    with Windows([*folders, *base]) as windows:
        _check_same_tensors(windows)
        by_tensor = _read_all(windows, bool(base), progress)
    _check_finite(windows, by_tensor)
    found = _groups(by_tensor, bool(base))
    names = _names(settings.models)
    result = {
        "models": names,
        "paths": [str(folder) for folder in folders],
        "base": _names([settings.base])[0] if settings.base else None,
        "left_out": sorted(set(windows.places[0]) - set(by_tensor)),
        **found,
        "verdict": judge(found["modules"], bool(base)),
        "versions": versions(),
        "commit": commit(),
    }
    out = Path(settings.out) / DIAGNOSIS
    write_json_atomic(out, result)
    return out


def _names(models: Sequence[str]) -> list[str]:
    """Names of runs for the tables; the whole path where two share one."""
    short = [Path(m).parent.name if Path(m).name == "export" else Path(m).name for m in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def _check_same_tensors(windows: Windows) -> None:
    problems = []
    first, *others = zip(windows.folders, windows.places, strict=True)
    for folder, places in others:
        for name in sorted(first[1].keys() ^ places.keys()):
            problems.append(f"{name} is in {(first[0] if name in first[1] else folder)} only")
        for name in first[1].keys() & places.keys():
            if first[1][name].shape != places[name].shape:
                shapes = f"{list(places[name].shape)} in {folder} and {list(first[1][name].shape)} in {first[0]}"
                problems.append(f"{name} has the shape {shapes}")
    if problems:
        raise MergeError(problems)
    if not any(place.dtype in AVERAGED_DTYPES and place.elements for place in first[1].values()):
        raise SettingsError(f"{first[0]} holds no tensor of floating point numbers: name exports of models")


def _read_all(windows: Windows, has_base: bool, progress: bool) -> dict[str, Sums]:
    chosen = {
        name: place
        for name, place in windows.places[0].items()
        if place.dtype in AVERAGED_DTYPES and place.elements and not name.startswith(UNREAD)
    }
    models = len(windows.folders) - has_base
    by_tensor = {}
    total = sum(place.elements for place in chosen.values()) * len(windows.folders)
    quiet = None if progress else True  # None: no bar where stderr is no terminal
    with tqdm(total=total, unit=" values", unit_scale=True, desc="diagnose", disable=quiet) as bar:
        for name in chosen:
            sums = by_tensor[name] = Sums.zero(models)
            sums.tensors = 1
            for window in windows.read(name):
                sums.add(window[:models], window[-1] if has_base else window[0].clone())
                bar.update(window.numel())
    return by_tensor


def _check_finite(windows: Windows, by_tensor: Mapping[str, Sums]) -> None:
    problems = []
    for name, sums in by_tensor.items():
        squares = zip(windows.folders, sums.squares.tolist(), strict=False)  # the parent comes last and has its own
        broken = [folder for folder, square in squares if not np.isfinite(square)]
        if not np.isfinite(sums.origin_square) and not broken:
            broken = [windows.folders[-1]]
        problems += [f"{folder}: {name} holds NaN or infinity" for folder in broken]
    if problems:
        raise MergeError(problems)


def _groups(by_tensor: Mapping[str, Sums], has_base: bool) -> dict[str, Any]:
    modules: dict[str, Sums] = {}
    layers: dict[str, Sums] = {}
    for name, sums in by_tensor.items():
        module = module_of(name)
        number = _LAYER.search(name)
        layer = f"{module} {number.group(1)}" if number else f"{module}, outside its layers"
        for groups, key in ((modules, module), (modules, TOTAL), (layers, layer)):
            groups.setdefault(key, Sums.zero(len(sums.squares))).merge(sums)
    return {
        "modules": {name: describe(sums, has_base) for name, sums in modules.items()},
        "layers": {name: describe(sums, has_base) for name, sums in layers.items()},
        "tensors": {name: _summary(describe(sums, has_base)) for name, sums in by_tensor.items()},
    }


def module_of(name: str) -> str:
    """Module of a recipe that a tensor belongs to; ``other`` for names that are not Keye's."""
    return next((module for prefix, module in MODULE_PREFIXES.items() if name.startswith(prefix)), "other")


def describe(sums: Sums, has_base: bool) -> dict[str, Any]:
    """The figures of one group.

    Returns:
        ``distance`` [K][K], |x_i - x_j| over the geometric mean of |x_i| and |x_j|; and with a parent ``cosine``
        [K][K] of the deltas (None where one is zero), ``conflict`` [K][K] (share of the coordinates that both move),
        ``change`` [K], |x_i - o| / |o|, ``minority`` (share of the mass of the deltas that has the minority sign) and
        ``kept``, the norm of the mean delta over the mean norm of the deltas: 1 where all agree, 1 / sqrt(K) where
        they have nothing in common.
    """
    gram, norms = sums.gram, sums.squares.sqrt()
    square = gram.diagonal()
    apart = (square[:, None] + square[None, :] - 2 * gram).clamp(min=0).sqrt()
    scale = (norms[:, None] * norms[None, :]).sqrt()
    figures: dict[str, Any] = {
        "elements": sums.elements,
        "n_tensors": sums.tensors,
        "distance": _rounded(apart / scale),
    }
    if not has_base:
        return figures
    lengths = square.sqrt()
    mean_length = float(lengths.mean())
    kept = float(gram.sum().clamp(min=0).sqrt()) / len(lengths) / mean_length if mean_length else None
    return figures | {
        "cosine": _rounded(gram / (lengths[:, None] * lengths[None, :])),
        "conflict": _rounded(sums.opposed / sums.moved),
        "change": _rounded(lengths / sums.origin_square**0.5 if sums.origin_square else lengths * torch.nan),
        "minority": sums.minority / sums.mass if sums.mass else None,
        "kept": kept,
    }


def _summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of one tensor: the extremes over its pairs, so that the file stays small for many models."""
    kept: dict[str, Any] = {"elements": figures["elements"], "distance": max(pairs(figures["distance"]), default=None)}
    if "cosine" in figures:
        kept |= {
            "cosine": min(pairs(figures["cosine"]), default=None),
            "conflict": max(pairs(figures["conflict"]), default=None),
            "minority": figures["minority"],
        }
    return kept


def _rounded(values: Tensor) -> Any:
    """As JSON: six significant digits, None where a quotient does not exist."""

    def one(value: Any) -> Any:
        if isinstance(value, Iterable):
            return [one(inner) for inner in value]
        return float(f"{value:.6g}") if np.isfinite(value) else None

    return one(values.tolist())
