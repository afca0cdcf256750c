"""The words that may follow ``keye-merge``: what is asked about an average before it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye_train import runs
from keye_train.settings import CurveSettings, DiagnosisSettings, SoupSettings


@dataclass(frozen=True)
class Command:
    """One word; its primary recipe has the same name."""

    text: str  # help
    schema: type[Any]
    groups: tuple[str, ...]
    work: Callable[[Any], int]


DIAGNOSE_HELP = """\
Compare models before they are averaged: distances, cosines of their deltas to the common parent, sign conflict, by
module and layer. Reads each model once, in bounded memory; writes OUT/diagnosis.json and OUT/merge.html. A model is
whatever keye-merge takes. A diagnosis of the same models is kept.

  keye-merge diagnose models=[runs/a,runs/b,runs/c] base=runs/parent out=runs/diagnosis
  keye-merge diagnose models=[runs/a/checkpoints/step-900,runs/a/checkpoints/step-1000] out=runs/diagnosis
"""
CURVE_HELP = """\
Held-out loss along the line between two models, and behind its ends; no model is written. Points are kept, so the same
call with more points computes the new ones only. A model is whatever keye-merge takes, if it is a Keye model with its
tokenizer. Writes OUT/curve.json and OUT/merge.html.

  keye-merge curve data=demo models=[runs/a,runs/b] out=runs/curve
  keye-merge curve data=demo models=[runs/a,runs/b] out=runs/curve points=21 beyond=0.5 metric=score
"""
SEARCH_HELP = """\
Greedy soup and convex weights, searched on one part of the held-out samples and judged on another, where the gains over
the parts' mean and over the uniform average are reported with paired bootstrap intervals; the first decides. Accepted
soups are written to OUT/soup_greedy and OUT/soup_weights. Every value is kept: the same call goes on after a stop. A
model is whatever keye-merge takes, if it is a Keye model with its tokenizer. Writes OUT/soup.json and OUT/merge.html.

  keye-merge search data=demo models=[runs/a,runs/b,runs/c] out=runs/soup
  keye-merge search data=demo models=[runs/a,runs/b,runs/c] out=runs/soup budget=80 metric=score
"""


def _diagnose(settings: DiagnosisSettings) -> int:
    from keye_train.merging.diagnosis import diagnose
    from keye_train.report.lines import diagnosis_lines

    file = diagnose(settings)
    found = runs.read_json(file)
    print(diagnosis_lines(found, file))
    return _page(settings.out, "Diagnosis", diagnosis=found)


def _curve(settings: CurveSettings) -> int:
    from keye_train.report.lines import curve_lines
    from keye_train.soups import draw_curve

    file = draw_curve(settings)
    found = runs.read_json(file)
    print(curve_lines(found, file))
    return _page(settings.out, "Interpolation", curve=found)


def _search(settings: SoupSettings) -> int:
    from keye_train.report.lines import soup_lines
    from keye_train.soups import search_soup

    file = search_soup(settings)
    found = runs.read_json(file)
    print(soup_lines(found, file))
    return _page(settings.out, "Soup search", soup=found)


def _page(out: str, title: str, **parts: Any) -> int:
    from keye_train.report.merge_page import PAGE, write_merge_page

    print(f"page:    {write_merge_page(Path(out) / PAGE, title, **parts)}")
    return 0


COMMANDS = {
    "diagnose": Command(DIAGNOSE_HELP, DiagnosisSettings, (), _diagnose),
    "curve": Command(CURVE_HELP, CurveSettings, ("data",), _curve),
    "search": Command(SEARCH_HELP, SoupSettings, ("data",), _search),
}
