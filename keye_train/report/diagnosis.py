"""A diagnosis as tables and charts: which modules of which models point where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keye_train.merging.verdict import pairs
from keye_train.report.charts import Series, line_chart, percent, short
from keye_train.report.tables import EMPTY, Cell, Table, TableRow
from keye_train.settings import MODULES

SHOWN_TENSORS = 12
KINDS = {"one basin": "right", "doubtful": "", "apart": "wrong"}


def diagnosis_section(found: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the page's section about ``diagnosis.json``."""
    has_base = found["base"] is not None
    verdict = found["verdict"]
    total = found["modules"]["all"]
    against = (
        f", against their parent {found['base']}." if has_base else "; no parent was named, so there are no deltas."
    )
    tensors = f"{total['n_tensors']} tensors with {short(total['elements'])} values in each"
    about = f"{len(found['models'])} models, {tensors}{against}"
    matrices = [_matrix("Distance of two models over their norm", found["models"], total["distance"], 1.0)]
    if has_base:
        matrices += [
            _matrix("Cosine of two deltas to the parent", found["models"], total["cosine"], 1.0),
            _matrix("Coordinates moved in opposite directions", found["models"], total["conflict"], 1.0, share=True),
        ]
    return {
        "about": about,
        "verdict": _verdict_text(verdict["verdict"]),
        "verdict_kind": KINDS[verdict["verdict"]],
        "reasons": Table(
            ["figure", "worst in", "value", "says", "bounds (ours)", "why"],
            [
                TableRow(
                    reason["label"],
                    [
                        Cell(text)
                        for text in (
                            reason["module"],
                            f"{reason['value']:.3f}",
                            reason["level"],
                            reason["bounds"],
                            reason["why"],
                        )
                    ],
                )
                for reason in verdict["reasons"]
            ],
        ),
        "matrices": matrices,
        "modules": _groups_table("module", _in_order(found["modules"]), has_base),
        "layers": _groups_table("layer", _in_order(found["layers"]), has_base),
        "charts": _layer_charts(found["layers"], has_base),
        "tensors": _tensors_table(found["tensors"], has_base),
        "unread": found.get("unread", []),  # absent from an older file
        "left_out": found["left_out"],
    }


def _in_order(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """As the model runs: modules in order, layers by number, the total last."""

    def place(name: str) -> tuple[int, str, int]:
        module = next((i for i, known in enumerate(MODULES) if name.startswith(known)), len(MODULES))
        number = name.rpartition(" ")[2]
        return module + (name == "all"), name.split(" ")[0], int(number) if number.isdigit() else -1

    return {name: groups[name] for name in sorted(groups, key=place)}


def _verdict_text(verdict: str) -> str:
    return {
        "one basin": "One basin: by their weights these are siblings whose mean is worth scoring.",
        "doubtful": "Doubtful: score the line between them before trusting a mean.",
        "apart": "Apart: a mean of these weights is likely to be worse than its parts.",
    }[verdict]


def _matrix(
    title: str, models: Sequence[str], values: Sequence[Sequence[float | None]], top: float, share: bool = False
) -> dict[str, Any]:
    """A square table whose tint grows with the value."""
    rows = []
    # Runs of one entry share a long beginning, which would make the columns wide.
    beginnings = {name.rpartition("_")[0] for name in models}
    names = [name.rpartition("_")[2] if len(beginnings) == 1 else name for name in models]
    for i, name in enumerate(names):
        cells = []
        for j, value in enumerate(values[i]):
            if i == j or value is None:
                cells.append(EMPTY)
            else:
                text = percent(value) if share else f"{value:.3f}"
                cells.append(Cell(text, heat=round(min(max(value / top, 0.0), 1.0), 3)))
        rows.append(TableRow(name, cells))
    return {"title": title, "table": Table(["", *names], rows)}


def _groups_table(head: str, groups: Mapping[str, Mapping[str, Any]], has_base: bool) -> Table:
    heads = [head, "values", "largest distance"]
    if has_base:
        heads += ["change from the parent", "smallest cosine", "largest sign conflict", "minority mass", "norm kept"]
    return Table(heads, [_group_row(name, figures, has_base) for name, figures in groups.items()])


def _group_row(name: str, figures: Mapping[str, Any], has_base: bool) -> TableRow:
    cells = [Cell(short(figures["elements"])), _number(max(pairs(figures["distance"]), default=None))]
    if has_base:
        changes = [value for value in figures["change"] if value is not None]
        low, high = (min(changes), max(changes)) if changes else (None, None)
        cells += [
            EMPTY if low is None or high is None else Cell(f"{low:.3f}–{high:.3f}"),
            _number(min(pairs(figures["cosine"]), default=None)),
            _share(max(pairs(figures["conflict"]), default=None)),
            _share(figures["minority"]),
            _number(figures["kept"]),
        ]
    return TableRow(name, cells, "merge" if name == "all" else "")


def _layer_charts(layers: Mapping[str, Mapping[str, Any]], has_base: bool) -> list[Any]:
    """Figures over the depth of each module; modules without layers have no line."""
    by_module: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for name, figures in layers.items():
        module, _, number = name.rpartition(" ")
        if number.isdigit():
            by_module.setdefault(module, []).append((int(number), figures))

    def lines(figure: str, pick: Any) -> list[Series]:
        found = []
        for colour, (module, members) in enumerate(by_module.items()):
            members = sorted(members, key=lambda member: member[0])
            values = [pick(pairs(figures[figure]), default=None) for _, figures in members]
            found.append(Series(module, [float(number) for number, _ in members], values, colour))
        return found

    charts = [line_chart(lines("distance", max), "Largest distance by layer", from_zero=True)]
    if has_base:
        charts += [
            line_chart(lines("cosine", min), "Smallest cosine of two deltas by layer", from_zero=True),
            line_chart(lines("conflict", max), "Largest sign conflict by layer", percent, from_zero=True),
        ]
    return [chart for chart in charts if chart]


def _tensors_table(tensors: Mapping[str, Mapping[str, Any]], has_base: bool) -> Table:
    """The tensors that differ most."""
    order = sorted(tensors.items(), key=lambda item: -(item[1]["distance"] or 0.0))[:SHOWN_TENSORS]
    heads = ["tensor", "values", "largest distance"] + ["smallest cosine", "largest sign conflict"] * has_base
    rows = []
    for name, figures in order:
        cells = [Cell(short(figures["elements"])), _number(figures["distance"])]
        if has_base:
            cells += [_number(figures["cosine"]), _share(figures["conflict"])]
        rows.append(TableRow(name, cells))
    return Table(heads, rows)


def _number(value: float | None) -> Cell:
    return EMPTY if value is None else Cell(f"{value:.3f}")


def _share(value: float | None) -> Cell:
    return EMPTY if value is None else Cell(percent(value))
