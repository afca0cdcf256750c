"""Line charts and interval charts as SVG text: small, sharp at every size, coloured by the page's style sheet.

Series are told apart by the CSS classes ``s0`` .. ``s9``; a raw series is drawn faintly below its smoothed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 230  # of a line chart; a page shows two or three side by side
LEFT, RIGHT, TOP, BOTTOM = 50, 18, 10, 28
INTERVAL_WIDTH = 640
COLOURS = 10
MAX_POINTS = 400
"""Points drawn for each series; longer ones are thinned so that extremes stay visible."""

Values = Sequence[float | None]
Formatter = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line."""

    label: str
    xs: Sequence[float]
    ys: Values  # None and non-finite values leave a gap
    colour: int = 0
    faint: bool = False  # drawn behind, without a legend entry


@dataclass(frozen=True)
class Estimate:
    """One row of an interval chart."""

    label: str
    value: float
    low: float
    high: float


def short(value: float) -> str:
    """A number in few characters: 0.0025, 12.5, 3.1k, 2M, 1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def amount(value: float) -> str:
    """Steps or epochs in at most 7 characters: 0.25, 9.81, 12.5, 133, 113,345, 5.7M."""
    if value >= 1e6:
        return short(value)
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def figure(value: float) -> str:
    """A statistic: whole where it counts something or is large, of shares four decimals."""
    return f"{value:.4f}" if value < 10 and isinstance(value, float) else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.3g} %"


def signed(value: float) -> str:
    """A difference with its sign and four decimals; what rounds to nothing has no sign."""
    text = f"{value:+.4f}"
    return text if float(text) else text[1:]


def smooth(ys: Values, share: float = 0.04) -> list[float | None]:
    """Exponential moving average without bias at the start; its memory is ``share`` of the series, 5 to 50 points."""
    memory = min(50.0, max(5.0, share * len(ys)))
    keep = 1 - 1 / memory
    total = weight = 0.0
    smoothed: list[float | None] = []
    for y in ys:
        if y is not None and math.isfinite(y):
            total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        smoothed.append(total / weight if weight else None)
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high] in about ``count`` steps of 1, 2 or 5 x 10^n."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    label: str,
    y_format: Formatter = short,
    y_range: tuple[float, float] | None = None,
    from_zero: bool = False,
) -> Markup:
    """An SVG figure with its legend; empty where no series has a finite value.

    Args:
        series: lines, in drawing order.
        label: what the vertical axis shows; also the figure's accessible name.
        y_format: text of a tick.
        y_range: fixed vertical range; None: that of the values.
        from_zero: let the range begin at 0.
    """
    drawn = [(one, points) for one in series if (points := _finite(one))]
    if not drawn:
        return Markup("")
    everything = [point for _, points in drawn for point in points]
    x_low, x_high = min(x for x, _ in everything), max(x for x, _ in everything)
    low, high = y_range or _padded(min(y for _, y in everything), max(y for _, y in everything), from_zero)
    x_high = x_high if x_high > x_low else x_low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        clipped = min(max(y, low), high)
        return across, HEIGHT - BOTTOM - (clipped - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    x_ticks = ticks(x_low, x_high, 6)
    if all(x == int(x) for x, _ in everything):  # steps or layers: there is nothing between them
        x_ticks = [tick for tick in x_ticks if tick == int(tick)]
    parts = [_axes(place, x_ticks, ticks(low, high), y_format)]
    for one, points in sorted(drawn, key=lambda pair: not pair[0].faint):
        style = f"line s{one.colour % COLOURS}" + (" faint" if one.faint else "")
        path = " ".join(
            f"{'M' if first else 'L'}{x:.1f} {y:.1f}"
            for first, (x, y) in ((i == 0, place(*point)) for i, point in enumerate(_thinned(points)))
        )
        parts.append(f'<path class="{style}" d="{path}"/>')
    named = [one for one, _ in drawn if not one.faint]
    return Markup(
        '<figure class="chart"><figcaption>{label}</figcaption>'
        '<svg viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{body}</svg>{legend}</figure>'
    ).format(label=label, w=WIDTH, h=HEIGHT, body=Markup("".join(parts)), legend=_legend(named))


def interval_chart(rows: Sequence[Estimate], label: str, chance: float | None = None) -> Markup:
    """One line for each estimate in [0, 1]: a dot with its interval, and a dashed line at the level of chance."""
    if not rows:
        return Markup("")
    step, left, right = 26, 150, 64
    height = TOP + step * len(rows) + 26
    span = INTERVAL_WIDTH - left - right

    def across(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * span

    body = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(tick)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 22}"/>')
        body.append(_text("tick", x, height - 6, "middle", f"{round(100 * tick)} %"))
    if chance is not None:
        x = across(chance)
        body.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 22}"/>')
    best = max(row.value for row in rows)
    for number, row in enumerate(rows):
        y = TOP + step * number + step / 2
        strong = " best" if row.value == best else ""
        body.append(_text(f"row{strong}", left - 10, y + 4, "end", row.label))
        body.append(
            f'<line class="whisker" x1="{across(row.low):.1f}" x2="{across(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        body.append(f'<circle class="dot{strong}" cx="{across(row.value):.1f}" cy="{y:.1f}" r="5"/>')
        body.append(_text(f"row{strong}", INTERVAL_WIDTH - right + 12, y + 4, "start", f"{100 * row.value:.1f} %"))
    return Markup(
        '<figure class="chart"><figcaption>{label}</figcaption>'
        '<svg viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{body}</svg></figure>'
    ).format(label=label, w=INTERVAL_WIDTH, h=height, body=Markup("".join(body)))


def _finite(series: Series) -> list[tuple[float, float]]:
    pairs = zip(series.xs, series.ys, strict=True)
    return [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]


def _padded(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """A little air around the values; never an empty range."""
    if from_zero:
        low = min(low, 0.0)
    air = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - air), high + air


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MAX_POINTS points: the lowest and the highest of each run of neighbours, in order."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        kept += sorted({min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])})
    return kept


def _text(style: str, x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axes(
    place: Callable[[float, float], tuple[float, float]],
    x_ticks: list[float],
    y_ticks: list[float],
    y_format: Formatter,
) -> str:
    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT - 8, y + 4, "end", y_format(tick)))
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts.append(_text("tick", x, HEIGHT - 10, "middle", short(tick)))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    return "".join(parts)


def _legend(named: Sequence[Series]) -> Markup:
    if len(named) < 2:
        return Markup("")
    items = [
        Markup('<li><span class="swatch s{}"></span>{}</li>').format(one.colour % COLOURS, one.label) for one in named
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
