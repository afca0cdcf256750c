"""What a terminal shows of averages: differences with their intervals, never a minus before nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keye_train.merging.verdict import judge
from keye_train.report.charts import signed
from keye_train.report.lines import curve_lines, diagnosis_lines, soup_lines
from keye_train.report.merge_page import write_merge_page

FILE = Path("out/found.json")
SEEN = {"samples": 240, "fingerprint": "f"}


def row(name: str, weights: list[float], accepted: bool | None, against: str | None, *uniform: float) -> dict[str, Any]:
    over = {"gain": 0.0143, "low": 0.0120, "high": 0.0165}
    own = dict(zip(("gain", "low", "high"), uniform, strict=True))
    return {
        "name": name,
        "weights": weights,
        "metric": 0.4882,
        "low": 0.46,
        "high": 0.51,
        "gains": {"parts_mean": over, "best_part": over, "uniform": own},
        "accepted": accepted,
        "against_uniform": against,
    }


@pytest.fixture
def soup() -> dict[str, Any]:
    third = [0.3333] * 3
    return {
        "models": ["a", "b", "c"],
        "metric": "loss",
        "best_part": "a",
        "parts_mean": {"metric": 0.5025, "low": 0.48, "high": 0.52},
        "selection": SEEN,
        "confirmation": SEEN,
        "trials": [{"phase": "part", "weights": [1.0, 0.0, 0.0], "metric": 0.5}],
        "rows": [
            row("a", [1.0, 0.0, 0.0], None, None, -0.006, -0.0117, -0.00004),
            row("uniform", third, True, None, -0.0, -0.0, 0.0),
            row("soup_greedy", third, True, "same weights", -0.0, -0.0, 0.0),
            row("soup_weights", [0.5, 0.3, 0.2], True, "no difference", 0.00029, -0.00176, 0.00234),
        ],
        "written": {"soup_weights": "out/soup_weights"},
        "stopped": "budget",
    }


def test_a_soup_is_judged_beside_the_uniform_average_on_terminal_and_page(soup: dict[str, Any], tmp_path: Path) -> None:
    against = "over uniform +0.0003 (-0.0018 to +0.0023): no difference that these samples show"
    lines = soup_lines(soup, FILE).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["a", "uniform", "soup_greedy", "the"]
    assert lines[1].endswith(
        "over the parts' mean +0.0143 (95 %: +0.0120 to +0.0165)  accepted  [0.3333, 0.3333, 0.3333]"
    )
    assert lines[3].strip() == "the same weights as uniform"
    assert lines[5].strip() == against
    assert lines[6:] == [
        "soup_weights: out/soup_weights",
        "the search ended by its budget limit; raise it and run again to go on",
        "figures: out/found.json",
    ]
    page = write_merge_page(tmp_path / "merge.html", "T", soup=soup).read_text()
    assert f"{against}." in page
    assert "+0.0165); the same weights as uniform." in page
    assert "-0.0000" not in page
    for word in ("better", "worse"):
        soup["rows"][3]["against_uniform"] = word
        assert f"(-0.0018 to +0.0023): {word}\n" in soup_lines(soup, FILE)
    del soup["rows"][3]["against_uniform"]  # as an older search wrote it
    assert "over uniform" not in soup_lines(soup, FILE)


def test_a_curve_and_a_diagnosis_are_told_in_plain_words() -> None:
    barrier = {"t": 0.833333333, "height": -0.0059, "low": -0.0066, "high": -0.00001}
    assert curve_lines({"barrier": barrier}, FILE) == (
        "barrier: -0.0059 (95 %: -0.0066 to 0.0000) at t = 0.83\nfigures: out/found.json"
    )
    verdict = judge({"language": {"distance": [[0.0, 0.024], [0.024, 0.0]]}}, has_base=False)
    assert diagnosis_lines({"verdict": verdict}, FILE).splitlines() == [
        "largest distance of two models, over their norm: 0.024 in language, which says one basin "
        "(good: at most 0.3; doubtful: at most 0.7)",
        "verdict: one basin",
        "figures: out/found.json",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(-0.00004, "0.0000"), (0.0, "0.0000"), (-0.00006, "-0.0001"), (2, "+2.0000")]
)
def test_what_rounds_to_nothing_has_no_sign(value: float, text: str) -> None:
    assert signed(value) == text
