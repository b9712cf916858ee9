"""Axes and marks of plots, as SVG that stands in a page."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

_CHART_WIDTH, _CHART_HEIGHT = 720, 300
_LOG_FROM = 20
"""Numbers above zero that span so much are shown by their logarithms."""


@dataclass(frozen=True)
class Axis:
    """Where the values of a setting, or of the objective, lie between 0 and 1."""

    name: str
    place: Callable[[Any], float]
    ticks: list[tuple[float, str]]

    @classmethod
    def of(cls, name: str, values: Sequence[Any], *, may_be_log: bool = True) -> "Axis":
        """The axis that holds all values: of numbers, or, where one is none, of names in their order of appearance."""
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if is_number and len(set(values)) == 1:
            return cls(name, lambda value: 0.5, [(0.5, f"{values[0]:.4g}")])
        if not is_number:
            names = list(dict.fromkeys(map(str, values)))
            places = {value: (number + 0.5) / len(names) for number, value in enumerate(names)}
            return cls(name, lambda value: places[str(value)], [(places[value], value) for value in names])
        low, high = min(values), max(values)
        is_log = may_be_log and low > 0 and high / low >= _LOG_FROM
        scale: Callable[[float], float] = math.log if is_log else float
        first, span = scale(low), scale(high) - scale(low)
        few = sorted(set(values))
        shown = few if len(few) <= 6 else [_between(low, high, part / 4, is_log=is_log) for part in range(5)]
        return cls(
            name,
            lambda value: (scale(value) - first) / span,
            [((scale(value) - first) / span, f"{value:.4g}") for value in shown],
        )


def path(points: Iterable[tuple[float, float]]) -> str:
    """The points of a line, as SVG has them."""
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in points)


def text(left: float, top: float, words: str, anchor: str) -> str:
    """Small text that starts, ends or has its middle there."""
    return f'<text x="{left:.1f}" y="{top:.1f}" font-size="11" text-anchor="{anchor}">{escape(words)}</text>'


def svg(width: float, height: float, parts: list[str]) -> str:
    """A plot of so many pixels."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


class Line(NamedTuple):
    """A line of a chart."""

    points: list[tuple[float, float]]
    stands_out: bool = False


class Mark(NamedTuple):
    """A value across a chart."""

    value: float
    name: str


def line_chart(across: str, up: str, lines: Sequence[Line], marks: Sequence[Mark]) -> str:
    """Lines over numbers, in grey, those that stand out in red and above the others."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    left = Axis.of(across, [x for x, _ in points], may_be_log=False)
    top = Axis.of(up, [y for _, y in points] + [mark.value for mark in marks], may_be_log=False)
    width, height = _CHART_WIDTH - 240, _CHART_HEIGHT - 60

    def at(x: float, y: float) -> tuple[float, float]:
        return 60 + left.place(x) * width, 20 + (1 - top.place(y)) * height

    parts = [f'<path d="M60 20V{20 + height}H{60 + width}" fill="none" stroke="#222"/>']
    for mark in marks:
        y = 20 + (1 - top.place(mark.value)) * height
        parts.append(f'<path d="M60 {y:.1f}h{width}" stroke="#2471a3" stroke-dasharray="4 3"/>')
        parts.append(text(66 + width, y + 4, f"{mark.name}: {mark.value:.4f}", "start"))
    for line in sorted(lines, key=lambda line: line.stands_out):
        color, thick = ("#c0392b", 2) if line.stands_out else ("#888", 1)
        drawn = path(at(*point) for point in line.points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{color}" stroke-width="{thick}"/>')
    parts += [text(60 + place * width, 36 + height, label, "middle") for place, label in left.ticks]
    parts += [text(54, 24 + (1 - place) * height, label, "end") for place, label in top.ticks]
    parts.append(text(60 + width / 2, _CHART_HEIGHT - 6, across, "middle"))
    parts.append(text(60, 12, up, "start"))
    return svg(_CHART_WIDTH, _CHART_HEIGHT, parts)


def _between(low: float, high: float, part: float, *, is_log: bool) -> float:
    return low * (high / low) ** part if is_log else low + (high - low) * part
