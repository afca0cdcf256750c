"""The page of ``keye-data plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_tools.page import write_html
from data_tools.simulation import Distribution, Simulation
from data_tools.text import printable
from keye_train.report.charts import Series, amount, figure, line_chart, percent, short, smooth
from keye_train.report.collect import clock
from keye_train.report.histogram import histogram
from keye_train.report.tables import EMPTY, Cell, Table, TableRow

BINS = 40
DISTRIBUTION_HEADS = ("mean", "min", "p1", "p10", "p50", "p90", "p99", "max")


def write_page(out: Path, title: str, result: Simulation, described: dict[str, Any]) -> Path:
    """Write the page; ``described`` has the figures of ``result``. Returns ``out``."""
    # Here, not at the top: plan_cmd imports this module late, for the sake of a quick start.
    from data_tools.plan_cmd import DISTRIBUTIONS

    values = {
        "title": title,
        "about": (
            f"{result.steps:,} steps on {result.world_size} ranks, planned from the indexes; packs of at most "
            f"{result.max_tokens:,} tokens and {result.max_patches:,} patches"
        ),
        "tiles": _tiles(result, described),
        "distributions": Table(
            ["", *DISTRIBUTION_HEADS],
            [
                TableRow(label, [_figure(described["distributions"][name].get(head)) for head in DISTRIBUTION_HEADS])
                for name, label in DISTRIBUTIONS.items()
            ],
        ),
        "sources": _sources(described),
        "left_out": Table(
            ["source", "samples", "reason"],
            [
                TableRow(row["source"], [Cell(f"{row['samples']:,}"), Cell(printable(row["reason"]))])
                for row in described["left_out"][:100]
            ],
        ),
        "fill_charts": _fill_charts(result),
        "mix_charts": _mix_charts(result),
        "length_charts": _length_charts(result),
        "mix_deviation": f"{result.mix_deviation:.2f}",
        "loader": described["loader"],
        "short": short,
        "clock": clock,
    }
    return write_html(out, "plan.html", values)


def _tiles(result: Simulation, described: dict[str, Any]) -> list[dict[str, str]]:
    loader = described["loader"]
    left_out = result.drawn - result.samples
    return [
        _tile(
            "token fill", f"{100 * result.token_fill.mean:.2f} %", f"p1 {100 * result.token_fill.percentile(1):.1f} %"
        ),
        _tile(
            "patch fill", f"{100 * result.patch_fill.mean:.1f} %", f"p1 {100 * result.patch_fill.percentile(1):.1f} %"
        ),
        _tile("balance", f"{result.balance.mean:.3f}", f"mean / slowest rank; p1 {result.balance.percentile(1):.3f}"),
        _tile("samples", short(result.samples), f"{described['samples_per_step']:,.0f} a step"),
        _tile("tokens", short(result.tokens), f"{short(described['tokens_per_step'])} a step"),
        _tile("left out", f"{left_out:,}", f"{100 * left_out / max(1, result.drawn):.2f} % of the drawn"),
        _tile("loader", f"{short(loader['shard_bytes_per_s'])}B/s", f"{loader['samples_per_s']:,.0f} samples/s"),
        _tile("planning", f"{described['planning_us_per_sample']:.1f} us", "a sample"),
    ]


def _tile(label: str, value: str, note: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _sources(described: dict[str, Any]) -> Table:
    # Columns of zeros would push the last ones out of the page.
    counted = [name for name in ("filtered", "downscaled", "truncated") if any(s[name] for s in described["sources"])]
    heads = [
        "source",
        f"weight ({described['mixture_unit']}{', at the start' if described['curriculum'] else ''})",
        "samples",
        "tokens",
        "patches",
        "FLOPs",
        "mean tokens",
        "p99 tokens",
        *counted,
        "left out",
    ]
    rows = []
    for source in described["sources"]:
        shares = [source[f"share_{name}"] for name in ("samples", "tokens", "patches", "flops")]
        per_epoch = source["steps_per_epoch"]
        cells = [
            Cell(f"{100 * source['weight']:.1f} %"),
            *(Cell(f"{100 * share:.1f} %", heat=round(share, 3)) for share in shares),
            Cell(f"{source['mean_tokens']:,.0f}"),
            Cell(f"{source['p99_tokens']:,.0f}"),
            *(Cell(f"{source[name]:,}") for name in (*counted, "dropped")),
            EMPTY if per_epoch is None else Cell(amount(per_epoch), f"{source['rows']:,} samples"),
            Cell(amount(source["epochs_in_recipe"])),
        ]
        rows.append(TableRow(source["name"], cells))
    return Table([*heads, "steps/epoch", f"epochs in {described['recipe_steps']:,} steps"], rows)


def _fill_charts(result: Simulation) -> list[Markup]:
    return [
        _chart(result.token_fill, "Packs by fill of the token budget", percent, 0),
        _chart(result.patch_fill, "Packs by fill of the patch budget", percent, 1),
        _chart(result.balance, "Micro-steps by balance (mean / slowest rank)", short, 2),
        _chart(result.pack_cost, "Packs by cost, over the mean of their batch", short, 3),
        _chart(result.pack_samples, "Packs by number of samples", _power, 4),
    ]


def _mix_charts(result: Simulation) -> list[Markup]:
    steps = list(range(result.steps))
    sources = list(enumerate(result.sources))
    samples = [Series(source.name, steps, smooth(source.shares), number) for number, source in sources]
    tokens = [Series(source.name, steps, smooth(source.token_shares), number) for number, source in sources]
    return [
        line_chart(samples, "Share of the samples of each step by source, smoothed", percent, from_zero=True),
        line_chart(tokens, "Share of the tokens of each step by source, smoothed", percent, from_zero=True),
    ]


def _length_charts(result: Simulation) -> list[Markup]:
    charts = []
    for number, source in enumerate(result.sources):
        charts.append(_chart(source.token_lengths, f"{source.name}: samples by tokens", _power, number))
        charts.append(_chart(source.patch_lengths, f"{source.name}: samples with vision, by patches", _power, number))
    return [chart for chart in charts if chart]


def _chart(distribution: Distribution, label: str, x_format: Any, colour: int) -> Markup:
    edges, counts = distribution.histogram(BINS)
    return histogram(edges.tolist(), counts.tolist(), label, x_format, colour)


def _power(exponent: float) -> str:
    return short(round(2**exponent))  # of tokens, patches or samples: whole ones


def _figure(value: float | None) -> Cell:
    return EMPTY if value is None else Cell(figure(value))
