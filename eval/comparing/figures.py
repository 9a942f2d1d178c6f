"""The report's figures as inline SVG: the interval bar of a table row, and the overview of all headline scores."""

from collections.abc import Sequence
from itertools import count

from eval.comparing.bootstrap import Difference
from eval.comparing.comparison import Measure
from eval.comparing.summary import number

RUN_COLOURS = ("#8b93a5", "#3553c9", "#c2571a", "#0f766e", "#8a3ea8")  # the baseline is grey
VERDICT_COLOURS = {
    "better": "#1b7f4b",
    "worse": "#c0392b",
    "differs": "#a36f00",
    "within noise": "#6a7080",
    "few images": "#6a7080",
}
WIDTH = 1000
LABEL, BARS, FOREST = 192, (205, 545), (630, 965)  # where the labels end, and the two plots' left and right ends
STEP = 20  # height of one bar


def run_colour(run: int) -> str:
    """The colour of a run in all figures."""
    return RUN_COLOURS[run % len(RUN_COLOURS)]


def interval_bar(one: Difference, ceiling: float, reach: float) -> str:
    """A difference and its interval around a zero line; the half width of the picture is `reach` x `ceiling`."""
    if one.low is None or one.high is None:
        return ""
    low, value, high = (80 + 74 * edge / ceiling / (reach or 1) for edge in (one.low, one.value, one.high))
    colour = VERDICT_COLOURS[one.verdict]
    return (
        f'<svg width="160" height="22" viewBox="0 0 160 22" aria-hidden="true">'
        f'<line x1="80" y1="1" x2="80" y2="21" stroke="#1c1e24"/>{_whisker(low, value, high, 11, colour)}</svg>'
    )


def overview(rows: Sequence[tuple[str, Measure]], names: Sequence[str]) -> str:
    """Left the scores of all arms, right each one's difference to the first; both as shares of the perfect score.

    The labels are markup.
    """
    height_of_row = STEP * len(names) + 22
    height = height_of_row * len(rows) + 44
    reach = _round_up(max(_edges(rows), default=0.0))
    parts = [
        _axis(BARS, [0, 0.5, 1], 0, 1, height, "score"),
        _axis(FOREST, [-reach, 0, reach], -reach, reach, height, "difference"),
    ]
    for at, (label, measure) in enumerate(rows):
        top = 30 + at * height_of_row
        middle = top + STEP * len(names) / 2
        parts.append(
            f'<text x="{LABEL}" y="{middle + 5:.1f}" text-anchor="end" font-size="14.5" font-weight="600">'
            f"{label}</text>"
        )
        for run, score in enumerate(measure.scores):
            share = max(0.0, score / measure.ceiling)
            y, width = top + run * STEP, share * (BARS[1] - BARS[0])
            parts.append(
                f'<rect x="{BARS[0]}" y="{y + 2}" width="{width:.1f}" height="{STEP - 4}" fill="{run_colour(run)}"/>'
                f'<text x="{BARS[0] + width + 6:.1f}" y="{y + 15}" font-size="13">{number(measure, score)}</text>'
            )
        for run, one in enumerate(measure.differences, 1):
            if one.low is not None and one.high is not None:
                low, value, high = (
                    _place(FOREST, edge / measure.ceiling, -reach, reach) for edge in (one.low, one.value, one.high)
                )
                y_of_run = middle if len(names) == 2 else top + (run + 0.5) * STEP
                parts.append(_whisker(low, value, high, y_of_run, VERDICT_COLOURS[one.verdict]))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="scores and differences; the tables below hold the '
        f'same numbers">{"".join(parts)}</svg>'
    )


def _axis(ends: tuple[int, int], ticks: Sequence[float], low: float, high: float, height: int, title: str) -> str:
    parts = []
    for tick in ticks:
        x = _place(ends, tick, low, high)
        colour = "#1c1e24" if tick == 0 else "#dcd8ce"
        text = f"{100 * tick:+.3g} %" if low < 0 and tick else f"{100 * tick:.3g} %"
        parts.append(
            f'<line x1="{x:.1f}" y1="22" x2="{x:.1f}" y2="{height - 20}" stroke="{colour}"/>'
            f'<text class="soft" x="{x:.1f}" y="{height - 4}" font-size="12" text-anchor="middle">'
            f"{text.replace('-', '−')}</text>"
        )
    middle = sum(ends) / 2
    parts.append(f'<text class="soft" x="{middle}" y="12" font-size="13" text-anchor="middle">{title}</text>')
    return "".join(parts)


def _whisker(low: float, value: float, high: float, y: float, colour: str) -> str:
    return (
        f'<line x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}" stroke="{colour}" stroke-width="4" '
        f'stroke-linecap="round" opacity="0.45"/><circle cx="{value:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
    )


def _place(ends: tuple[int, int], value: float, low: float, high: float) -> float:
    return ends[0] + (value - low) / (high - low) * (ends[1] - ends[0])


def _edges(rows: Sequence[tuple[str, Measure]]) -> list[float]:
    return [
        abs(edge) / measure.ceiling
        for _, measure in rows
        for one in measure.differences
        for edge in (one.low, one.high)
        if edge is not None
    ]


def _round_up(reach: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, 100, ... percent."""
    steps = (digit * 10.0**power for power in count(-2) for digit in (1, 2, 5))
    return next(step for step in steps if reach <= step)
