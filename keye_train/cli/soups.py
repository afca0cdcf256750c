"""The words that may follow ``keye-merge``: what is asked about an average before it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keye_train.settings import DiagnosisSettings


@dataclass(frozen=True)
class Command:
    """One word; its primary recipe has the same name."""

    text: str  # help
    schema: type[Any]
    groups: tuple[str, ...]
    work: Callable[[Any], int]


DIAGNOSE_HELP = """\
Compare models before they are averaged: distances, cosines of their deltas to the common parent, sign conflict, by
module and layer. Reads each model once, in bounded memory; writes OUT/diagnosis.json and OUT/merge.html.

  keye-merge diagnose models=[runs/a,runs/b,runs/c] base=runs/parent out=runs/diagnosis
"""


def _diagnose(settings: DiagnosisSettings) -> int:
    from keye_train import runs
    from keye_train.merging.diagnosis import diagnose
    from keye_train.report import write_merge_page
    from keye_train.report.merge_page import PAGE

    file = diagnose(settings)
    found = runs.read_json(file)
    for reason in found["verdict"]["reasons"]:
        print(f"{reason['label']}: {reason['value']:.3f} in {reason['module']} ({reason['level']}; {reason['bounds']})")
    print(f"verdict: {found['verdict']['verdict']}\nfigures: {file}")
    print(f"page:    {write_merge_page(Path(settings.out) / PAGE, 'Diagnosis', diagnosis=found)}")
    return 0


COMMANDS = {"diagnose": Command(DIAGNOSE_HELP, DiagnosisSettings, (), _diagnose)}
