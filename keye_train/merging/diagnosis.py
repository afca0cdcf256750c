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

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from keye_train.merging.compatibility import CONFIG, MergeError
from keye_train.merging.methods import AVERAGED_DTYPES
from keye_train.merging.places import TensorPlace
from keye_train.merging.reading import ExportReader
from keye_train.merging.sources import opened
from keye_train.merging.ties import drop_doubles
from keye_train.merging.verdict import judge, pairs
from keye_train.merging.windows import Windows
from keye_train.model.parameters import MODULE_PREFIXES, PACKING_TABLE, POOLING_HEAD
from keye_train.runs import commit, read_json, sampled_sha256, versions, write_json_atomic
from keye_train.settings import DiagnosisSettings, SettingsError, model_name

logger = logging.getLogger(__name__)

DIAGNOSIS = "diagnosis.json"
VERSION = 2
"""Goes up whenever the same models would give other figures or another verdict, or other words for them."""
TOTAL = "all"
UNREAD = (PACKING_TABLE, POOLING_HEAD)
"""Tensors that no language model reads. The merge averages them like all others; equal in all siblings, they would only
make distances look smaller."""
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
    """Compare the models ``settings.models`` and write ``OUT/diagnosis.json``; one about these very models is kept.

    Peak memory is bounded (two windows of 256 MiB) for any number and size of models; each input is read once.

    Returns:
        The file. ``keye_train.report.write_diagnosis`` makes a page of it.

    Raises:
        SettingsError: impossible settings.
        FileNotFoundError, ExportError: a model is absent or broken.
        MergeError: models without the same tensors, or values that are not finite; it lists every one.
    """
    settings.check()
    has_base = settings.base is not None
    out = Path(settings.out) / DIAGNOSIS
    with _opened(settings) as readers:
        request = _request(settings, readers)
        if _holds(out, request):
            logger.info("%s is about these very models: kept", out)
            return out
        _check_same_tensors(readers)
        by_tensor = _read_all(readers, has_base, progress)
        _check_finite(readers, by_tensor)
        unread = [name for name, place in readers[0].places.items() if _is_averaged(place) and name.startswith(UNREAD)]
        left_out = {*readers[0].places, *readers[0].left_out} - {*by_tensor, *unread}
    found = _groups(by_tensor, has_base)
    result = {
        "models": _names(settings.models),
        "paths": [str(reader.origin) for reader in readers[: len(settings.models)]],
        "base": model_name(settings.base) if settings.base else None,
        "unread": sorted(unread),  # averaged, not compared
        "left_out": sorted(left_out),  # neither
        **found,
        "verdict": judge(found["modules"], has_base),
        "request": request,
        "versions": versions(),
        "commit": commit(),
    }
    write_json_atomic(out, result)
    return out


def is_diagnosed(settings: DiagnosisSettings) -> bool:
    """Whether ``OUT/diagnosis.json`` is about these very models as they are now; reads a small part of them."""
    with _opened(settings) as readers:
        return _holds(Path(settings.out) / DIAGNOSIS, _request(settings, readers))


def _opened(settings: DiagnosisSettings) -> AbstractContextManager[list[ExportReader]]:
    """The models, and the parent, where there is one, last."""
    return opened([*settings.models, *([settings.base] if settings.base else [])])


def _request(settings: DiagnosisSettings, readers: Sequence[ExportReader]) -> dict[str, Any]:
    """What was asked, and of which models: equal requests have equal figures."""
    inputs = []
    for reader in readers:
        files = reader.weight_files()
        sampled = sampled_sha256(reader.folder / CONFIG, files)
        # The kernel sets the time of change: bytes between the samples that were changed under an old stamp show in it.
        times = [(file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in files]
        inputs.append({"sampled_sha256": sampled, "times_ns": [list(pair) for pair in times]})
    return {"version": VERSION, "models": settings.models, "base": settings.base, "inputs": inputs}


def _holds(file: Path, request: Mapping[str, Any]) -> bool:
    return file.exists() and read_json(file).get("request") == request


def _names(models: Sequence[str]) -> list[str]:
    """Names of runs for the tables; the whole path where two share one."""
    short = [model_name(model) for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def _check_same_tensors(readers: Sequence[ExportReader]) -> None:
    problems = [one.text for one in drop_doubles(readers)]
    first, *others = readers
    for other in others:
        for name in sorted(first.places.keys() ^ other.places.keys()):
            problems.append(f"{name} is in {(first if name in first.places else other).origin} only")
        for name in first.places.keys() & other.places.keys():
            mine, theirs = list(first.places[name].shape), list(other.places[name].shape)
            if mine != theirs:
                problems.append(f"{name} has the shape {theirs} in {other.origin} and {mine} in {first.origin}")
    if problems:
        raise MergeError(problems)
    if not any(_is_averaged(place) for place in first.places.values()):
        raise SettingsError(f"{first.origin} holds no tensor of floating point numbers: name exports of models")


def _is_averaged(place: TensorPlace) -> bool:
    """Whether the merge takes a mean of it: it holds values, of a type that is averaged."""
    return place.dtype in AVERAGED_DTYPES and place.elements > 0


def _read_all(readers: Sequence[ExportReader], has_base: bool, progress: bool) -> dict[str, Sums]:
    windows = Windows(readers)
    chosen = {
        name: place for name, place in readers[0].places.items() if _is_averaged(place) and not name.startswith(UNREAD)
    }
    models = len(readers) - has_base
    by_tensor = {}
    total = sum(place.elements for place in chosen.values()) * len(readers)
    quiet = None if progress else True  # None: no bar where stderr is no terminal
    with tqdm(total=total, unit=" values", unit_scale=True, desc="diagnose", disable=quiet) as bar:
        for name in chosen:
            sums = by_tensor[name] = Sums.zero(models)
            sums.tensors = 1
            for window in windows.read(name):
                sums.add(window[:models], window[-1] if has_base else window[0].clone())
                bar.update(window.numel())
    return by_tensor


def _check_finite(readers: Sequence[ExportReader], by_tensor: Mapping[str, Sums]) -> None:
    problems = []
    for name, sums in by_tensor.items():
        squares = zip(readers, sums.squares.tolist(), strict=False)  # the parent comes last and has its own
        broken = [reader for reader, square in squares if not np.isfinite(square)]
        if not np.isfinite(sums.origin_square) and not broken:
            broken = [readers[-1]]
        problems += [f"{reader.origin}: {name} holds NaN or infinity" for reader in broken]
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
