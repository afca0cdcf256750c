"""Diagnosis, curve and soup search on a terminal: the chain and the commands of ``keye-merge`` print the same lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keye_train.report.soup import over_uniform, with_ends

STATES = {True: "accepted", False: "refused", None: "part"}


def diagnosis_lines(found: Mapping[str, Any], file: Path) -> str:
    """Each criterion in its worst module, and the verdict.

    Args:
        found: content of diagnosis.json.
        file: where it stands.
    """
    lines = []
    for reason in found["verdict"]["reasons"]:
        worst = f"{reason['value']:.3f} in {reason['module']}"
        lines.append(f"{reason['label']}: {worst}, which says {reason['level']} ({reason['bounds']})")
    return "\n".join([*lines, f"verdict: {found['verdict']['verdict']}", f"figures: {file}"])


def curve_lines(found: Mapping[str, Any], file: Path) -> str:
    """The barrier between the two models; arguments as those of ``diagnosis_lines``."""
    barrier = found["barrier"]
    height = with_ends(barrier["height"], barrier, "95 %: ")
    return f"barrier: {height} at t = {barrier['t']:.2f}\nfigures: {file}"


def soup_lines(found: Mapping[str, Any], file: Path) -> str:
    """Each part and average with its gain, and what was written; arguments as those of ``diagnosis_lines``."""
    lines = []
    for row in found["rows"]:
        gain = row["gains"]["parts_mean"]
        weights = ", ".join(f"{weight:g}" for weight in row["weights"])
        lines.append(
            f"{row['name']:<24} {row['metric']:.4f}  over the parts' mean {with_ends(gain['gain'], gain, '95 %: ')}  "
            f"{STATES[row['accepted']]}  [{weights}]"
        )
        if against := over_uniform(row):
            lines.append(f"{'':<24} {against}")
    lines += [f"{name}: {folder}" for name, folder in found["written"].items()]
    if found["stopped"]:
        lines.append(f"the search ended by its {found['stopped']} limit; raise it and run again to go on")
    return "\n".join([*lines, f"figures: {file}"])
