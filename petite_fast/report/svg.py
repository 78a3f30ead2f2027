"""Plots of a report as inline SVG: box plots, curves, Bland-Altman."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape

from matplotlib.ticker import MaxNLocator

_WIDTH, _HEIGHT = 300, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 12, 42
_LINE = 12
_CURVE_POINTS, _MEANS = 400, 30


class Chart:
    """A plot area with axes; marks are added in data units.

    Args:
        title: what is plotted, in words, for those who cannot see it.
        x, y: (lowest, highest) of each axis.
        x_label, y_label: with units.
        x_names: names at x = 0, 1, ... instead of numbers.
    """

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        x_names: Sequence[str] = (),
    ) -> None:
        self._title, self._x, self._y = title, x, y
        self._parts: list[str] = []
        for value, name in _ticks(*y).items():
            self.line((x[0], value), (x[1], value), "grid")
            self._text(_LEFT - 6, self._py(value) + 4, name, "end")
        named = {float(i): name for i, name in enumerate(x_names)} or _ticks(*x)
        for value, name in named.items():
            for row, word in enumerate(name.split(" ")):
                below = _HEIGHT - _BOTTOM + 16 + row * _LINE
                self._text(self._px(value), below, word, "middle")
        self._text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle", "label")
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        self._parts.append(
            f'<text class="label" text-anchor="middle" transform="translate(11 {middle}) '
            f'rotate(-90)">{escape(y_label)}</text>'
        )
        self.line((x[0], y[0]), (x[1], y[0]), "axis")

    def line(
        self, start: tuple[float, float], end: tuple[float, float], kind: str, colour: str = ""
    ) -> None:
        """A straight line of CSS class `kind`."""
        (x1, y1), (x2, y2) = self._point(start), self._point(end)
        stroke = f' stroke="{colour}"' if colour else ""
        self._parts.append(
            f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"{stroke}/>'
        )

    def curve(self, points: Sequence[tuple[float, float]], kind: str, colour: str) -> None:
        """A line through points."""
        path = " ".join(f"{x},{y}" for x, y in map(self._point, points))
        self._parts.append(f'<polyline class="{kind}" points="{path}" stroke="{colour}"/>')

    def dot(self, point: tuple[float, float], colour: str, name: str) -> None:
        """A point; `name` shows when the mouse rests on it."""
        x, y = self._point(point)
        self._parts.append(
            f'<circle class="dot" cx="{x}" cy="{y}" r="3.5" fill="{colour}">'
            f"<title>{escape(name)}</title></circle>"
        )

    def box(self, at: float, values: Sequence[float], colour: str) -> None:
        """Quartiles and median; whiskers to the last value within 1.5 quartile distances."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        reach = 1.5 * (high - low)
        ends = [v for v in values if low - reach <= v <= high + reach]
        (x1, y1), (x2, y2) = self._point((at - 0.25, high)), self._point((at + 0.25, low))
        self._parts.append(
            f'<rect class="box" x="{x1}" y="{y1}" width="{x2 - x1:.1f}" '
            f'height="{max(y2 - y1, 0.5):.1f}" fill="{colour}" stroke="{colour}"/>'
        )
        self.line((at - 0.25, median), (at + 0.25, median), "median", colour)
        self.line((at, high), (at, max(ends)), "whisker", colour)
        self.line((at, low), (at, min(ends)), "whisker", colour)

    def note(self, point: tuple[float, float], text: str, colour: str) -> None:
        """Small text that ends above `point`."""
        x, y = self._point(point)
        self._parts.append(
            f'<text class="note" x="{x}" y="{y - 4:.1f}" text-anchor="end" fill="{colour}">'
            f"{escape(text)}</text>"
        )

    def svg(self) -> str:
        """The element."""
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
            f"<title>{escape(self._title)}</title>{''.join(self._parts)}</svg>"
        )

    def _text(self, x: float, y: float, text: str, anchor: str, kind: str = "tick") -> None:
        self._parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def _px(self, x: float) -> float:
        share = (x - self._x[0]) / (self._x[1] - self._x[0])
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def _py(self, y: float) -> float:
        share = (y - self._y[0]) / (self._y[1] - self._y[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def _point(self, point: tuple[float, float]) -> tuple[float, float]:
        return self._px(point[0]), self._py(point[1])


def box_plot(
    label: str, groups: Sequence[tuple[str, str, Sequence[float]]], subjects: Sequence[str]
) -> str:
    """One box per group with its points; only points where a group has fewer than four.

    Args:
        label: of the values, with units.
        groups: (name, colour, one value per subject).
        subjects: names of the points.
    """
    everything = [value for _, _, values in groups for value in values]
    medians = "; ".join(f"{n} {statistics.median(v):.4g}" for n, _, v in groups)
    chart = Chart(
        f"{label}, median: {medians}",
        (-0.5, len(groups) - 0.5),
        _padded(everything),
        "",
        label,
        [name for name, _, _ in groups],
    )
    for at, (name, colour, values) in enumerate(groups):
        if len(values) > 3:
            chart.box(at, values, colour)
        for number, (subject, value) in enumerate(zip(subjects, values, strict=True)):
            # beside each other in a fixed pattern, so that equal values are all seen
            spread = ((number * 7) % 11 - 5) / 40 if len(values) > 1 else 0.0
            chart.dot((at + spread, value), colour, f"{subject}, {name}: {value:.4g}")
    return chart.svg()


def bland_altman(
    name: str,
    colour: str,
    pairs: Sequence[tuple[float, float]],
    subjects: Sequence[str],
    limits: tuple[float, float],
    units: str,
) -> str:
    """Difference against mean of (output, target), in percent of the mean; bias, bias +- 1.96 SD.

    Args:
        name: of the method.
        colour: of its points.
        pairs: (output, target), one per subject.
        subjects: names of the points.
        limits: of the y axis; see `agreement_limits`.
        units: of the pairs.
    """
    points = [((o + t) / 2, percent_difference(o, t)) for o, t in pairs]
    bias, spread = agreement(pairs)
    low, high = _padded([p[0] for p in points])
    x = (low, high + 0.25 * (high - low))  # room for the numbers on the lines
    said = f"bias {bias:+.2f} %" + (f", SD {spread:.2f} %" if spread is not None else "")
    chart = Chart(
        f"{name}: {said}", x, limits, f"mean of output and target [{units}]", "output - target [%]"
    )
    chart.line((x[0], 0.0), (x[1], 0.0), "axis")
    chart.line((x[0], bias), (x[1], bias), "bias", colour)
    chart.note((x[1], bias), _percent(bias), colour)
    if spread is not None:
        for sign in (-1.96, 1.96):
            end = bias + sign * spread
            chart.line((x[0], end), (x[1], end), "limit", colour)
            chart.note((x[1], end), _percent(end), colour)
    for subject, point in zip(subjects, points, strict=True):
        chart.dot(point, colour, f"{subject}: {point[1]:+.2f} %")
    return chart.svg()


def percent_difference(output: float, target: float) -> float:
    """100 (output - target) / their mean."""
    return 200.0 * (output - target) / (output + target)


def agreement(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """(bias, standard deviation) of the differences in percent; no deviation below three pairs."""
    differences = [percent_difference(o, t) for o, t in pairs]
    spread = statistics.stdev(differences) if len(differences) > 2 else None
    return statistics.fmean(differences), spread


def agreement_limits(methods: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """One y axis for the Bland-Altman plots of all methods."""
    seen = [0.0]
    for pairs in methods:
        bias, spread = agreement(pairs)
        seen += [percent_difference(o, t) for o, t in pairs]
        seen += [bias - 1.96 * (spread or 0.0), bias + 1.96 * (spread or 0.0)]
    return _padded(seen)


def loss_curve(title: str, columns: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Losses by step: (name, colour, one value per step), faint, and means of blocks, solid."""
    steps = len(columns[0][2])
    everything = [value for _, _, values in columns for value in values]
    ends = "; ".join(f"{name} from {v[0]:.3g} to {v[-1]:.3g}" for name, _, v in columns)
    chart = Chart(f"{title}: {ends}", (1, max(steps, 2)), _padded(everything), "step", "loss")
    for name, colour, values in columns:
        chart.curve(_block_means(values, _CURVE_POINTS), "curve faint", colour)
        chart.curve(_block_means(values, _MEANS), "curve", colour)
        if len(columns) > 1:
            chart.note((max(steps, 2), max(values)), name, colour)
    return chart.svg()


def _block_means(values: Sequence[float], points: int) -> list[tuple[float, float]]:
    """(middle step, mean) of equal blocks, at most `points` of them; steps count from 1."""
    block = -(-len(values) // points)
    blocks = [(i, values[i : i + block]) for i in range(0, len(values), block)]
    return [(i + (len(part) + 1) / 2, statistics.fmean(part)) for i, part in blocks]


def _percent(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f} %"  # + 0.0: no minus in front of zero


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> dict[float, str]:
    """Round positions within the range, and their numbers with one number of decimals."""
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], min_n_ticks=3).tick_values(low, high)
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return {
        float(t): f"{round(t, decimals) + 0.0:,.{decimals}f}" for t in ticks if low <= t <= high
    }
