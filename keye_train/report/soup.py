"""The search for weights and the line between two models, as tables and charts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from keye_train.report.charts import Series, line_chart, signed
from keye_train.report.tables import EMPTY, Cell, Table, TableRow

REFERENCES = ("parts_mean", "best_part", "uniform")
AGAINST_UNIFORM = {
    "better": "better",
    "worse": "worse",
    "no difference": "no difference that these samples show",
}
"""Words for ``against_uniform`` of a row of soup.json."""


def soup_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the page's section about ``soup.json``."""
    metric = found["metric"]
    top = (min if metric == "loss" else max)(row["metric"] for row in found["rows"])
    rows = []
    for row in found["rows"]:
        if row["name"] == "uniform":
            mean = [EMPTY, _with_interval(found["parts_mean"]), EMPTY, EMPTY, EMPTY]
            rows.append(TableRow("mean of the parts", mean, "chance"))
        weights = ", ".join(f"{weight:.3g}" for weight in row["weights"])
        state = "" if row["accepted"] is None else "accepted" if row["accepted"] else "refused"
        cells = [Cell(weights, state), _with_interval(row, best=row["metric"] == top)]
        cells += [_gain(row["gains"][reference]) for reference in REFERENCES]
        rows.append(TableRow(row["name"], cells, "" if row["accepted"] is None else "merge"))
    heads = [
        "model",
        "weights",
        f"held-out {metric}",
        "gain over the parts' mean",
        "over the best part",
        "over uniform",
    ]
    stopped = f" It ended by its {found['stopped']} limit." if found["stopped"] else ""
    return {
        "about": (
            f"{len(found['trials'])} candidates were scored by held-out {metric} on {found['selection']['samples']:,} "
            f"selection samples.{stopped} The table is about {found['confirmation']['samples']:,} other samples, which "
            "the search has not seen; below each value its 95 % interval, of differences by paired bootstrap over the "
            "samples. A gain above 0 is better. A soup is accepted, and written, where the whole interval of its gain "
            "over the parts' mean lies above 0. Weights are those of "
            f"{', '.join(found['models'])}, in this order; the best part, by the selection samples, is "
            f"{found['best_part']}."
        ),
        "verdicts": soup_verdicts(found),
        "table": Table(heads, rows),
        "trace": _trace(found),
        "trials": _trials(found),
    }


def soup_verdicts(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """What ``soup.json`` says of each average: ``text``, and ``kind``, "right" where it was accepted, else "wrong"."""
    return [_verdict(found, row) for row in found["rows"] if row["accepted"] is not None]


def curve_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the page's section about ``curve.json``."""
    points, barrier, metric = found["points"], found["barrier"], found["metric"]
    ts = [point["t"] for point in points]
    left, right = (next(p["metric"] for p in points if p["t"] == end) for end in (0.0, 1.0))
    lines = [
        Series("low", ts, [p["low"] for p in points], 0, faint=True),
        Series("high", ts, [p["high"] for p in points], 0, faint=True),
        Series(f"held-out {metric}", ts, [p["metric"] for p in points], 0),
        Series("straight line between the ends", [0.0, 1.0], [left, right], 1),
    ]
    clear = barrier["low"] > 0
    way = "rises above" if barrier["height"] > 0 else "stays below"
    by = f"by at most {barrier['height']:.4f}" if barrier["height"] > 0 else f"by at least {-barrier['height']:.4f}"
    return {
        "about": (
            f"(1 - t) {found['models'][0]} + t {found['models'][1]}, scored on {found['samples']:,} held-out samples. "
            "Pale: ends of the 95 % interval."
        ),
        "verdict": (
            f"Between its ends the curve {way} the straight line {by}, at t = {barrier['t']:.2f} "
            f"({_ends(barrier, '95 %: ')}): "
            + ("a barrier between two basins." if clear else "no barrier that these samples can tell.")
        ),
        "verdict_kind": "wrong" if clear else "right",
        "charts": [
            line_chart(lines, f"Held-out {metric} along the line, over t"),
            line_chart(_less_start(points, ts), f"{metric.capitalize()} of each task less that at t = 0"),
        ],
    }


def _less_start(points: list[dict[str, Any]], ts: list[float]) -> list[Series]:
    """Each task against its own value at t = 0, so that tasks of unlike size share a chart."""
    start = next(point["tasks"] for point in points if point["t"] == 0.0)
    return [
        Series(task, ts, [point["tasks"][task] - start[task] for point in points], colour)
        for colour, task in enumerate(start)
    ]


def _with_interval(value: Mapping[str, float], best: bool = False) -> Cell:
    return Cell(f"{value['metric']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}", best)


def _gain(gain: Mapping[str, float]) -> Cell:
    if gain["gain"] == gain["low"] == gain["high"] == 0:  # a model against itself
        return EMPTY
    return Cell(signed(gain["gain"]), _ends(gain))


def _ends(bounds: Mapping[str, float], before: str = "") -> str:
    return f"{before}{signed(bounds['low'])} to {signed(bounds['high'])}"


def with_ends(value: float, bounds: Mapping[str, float], before: str = "") -> str:
    """A difference with its interval: +0.0003 (-0.0018 to +0.0023).

    Args:
        value: the difference.
        bounds: ``low`` and ``high`` of its interval.
        before: put before the interval.
    """
    return f"{signed(value)} ({_ends(bounds, before)})"


def over_uniform(row: Mapping[str, Any]) -> str:
    """What the samples say of a searched soup beside the uniform average; empty for the parts and that average."""
    against = row.get("against_uniform")  # absent from the file of an older search
    if against is None:
        return ""
    if against == "same weights":
        return "the same weights as uniform"
    gain = row["gains"]["uniform"]
    return f"over uniform {with_ends(gain['gain'], gain)}: {AGAINST_UNIFORM[against]}"


def _verdict(found: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    gain = row["gains"]["parts_mean"]
    text = (
        f"{row['name']}: {'accepted' if row['accepted'] else 'refused'}; {found['metric']} {row['metric']:.4f} against "
        f"{found['parts_mean']['metric']:.4f} of the parts' mean, a gain of "
        f"{with_ends(gain['gain'], gain, '95 %: ')}"
    )
    against = over_uniform(row)
    text += f"; {against}." if against else "."
    return {"text": text, "kind": "right" if row["accepted"] else "wrong"}


def _trace(found: Mapping[str, Any]) -> Markup:
    """Each candidate and the best so far, in the order in which they were scored."""
    better = min if found["metric"] == "loss" else max
    values = [trial["metric"] for trial in found["trials"]]
    numbers = [float(number) for number in range(1, len(values) + 1)]
    so_far = [better(values[: number + 1]) for number in range(len(values))]
    lines = [Series("each candidate", numbers, values, 1), Series("best so far", numbers, so_far, 0)]
    return line_chart(lines, f"Selection {found['metric']} of each candidate, in the order of the search")


def _trials(found: Mapping[str, Any]) -> Table:
    rows = [
        TableRow(str(n), [Cell(t["phase"]), *(Cell(f"{w:.3f}") for w in t["weights"]), Cell(f"{t['metric']:.5f}")])
        for n, t in enumerate(found["trials"], 1)
    ]
    return Table(["candidate", "phase", *found["models"], f"selection {found['metric']}"], rows)
