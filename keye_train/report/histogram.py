"""Histograms as SVG text, in the style of the line charts."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from keye_train.report.charts import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Formatter, short, ticks

TICKS = 6


def histogram(
    edges: Sequence[float], counts: Sequence[int], label: str, x_format: Formatter = short, colour: int = 0
) -> Markup:
    """An SVG figure with a bar for each bin; empty where nothing was counted.

    Args:
        edges: [B + 1] borders of the bins, ascending.
        counts: [B] of values in each.
        label: what is counted; also the figure's accessible name.
        x_format: text of a border.
        colour: class ``s0`` .. ``s9`` of the bars.
    """
    assert len(edges) == len(counts) + 1, "a border before and behind each bin"
    highest = max(counts, default=0)
    if not highest:
        return Markup("")
    low, span = edges[0], edges[-1] - edges[0]
    floor = HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - low) / span * (WIDTH - LEFT - RIGHT)

    def up(count: float) -> float:
        return floor - count / highest * (floor - TOP)

    body = []
    for tick in ticks(0, highest, 4):
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        body.append(_label(LEFT - 8, up(tick) + 4, "end", short(tick)))
    for number, count in enumerate(counts):
        if count:
            left, right = across(edges[number]), across(edges[number + 1])
            width = max(right - left - 1, 1)
            bar = f'x="{left + 0.5:.1f}" y="{up(count):.1f}" width="{width:.1f}" height="{floor - up(count):.1f}"'
            body.append(f'<rect class="bar s{colour % COLOURS}" {bar}/>')
    for tick in ticks(edges[0], edges[-1], TICKS):
        body.append(_label(across(tick), HEIGHT - 10, "middle", x_format(tick)))
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    return Markup(
        '<figure class="chart"><figcaption>{label}</figcaption>'
        '<svg viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{body}</svg></figure>'
    ).format(label=label, w=WIDTH, h=HEIGHT, body=Markup("".join(body)))


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
