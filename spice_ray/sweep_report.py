"""The report of a sweep: one HTML file with its plots and tables, which needs nothing else."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spice_ray import mirror
from spice_ray.storage import reporting_disk_errors
from spice_ray.sweep import Range, Sweep

if TYPE_CHECKING:
    from spice_ray.runtime.sweep_table import Reuse

_HEIGHT, _GAP, _TOP, _BOTTOM = 260, 170, 40, 40
_PANEL_WIDTH, _PANEL_HEIGHT = 260, 190
_LOG_FROM = 20
"""Numbers above zero that span so much are shown by their logarithms."""
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #222; padding: 0 1rem }
table { border-collapse: collapse } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:last-child, td:last-child { text-align: left } svg { max-width: 100%; height: auto } figure { margin: 1rem 0 }
figcaption { color: #555 } .panels { display: flex; flex-wrap: wrap; gap: 1rem }
"""


@dataclass(frozen=True)
class Axis:
    """Where the values of a setting, or of the objective, lie between 0 and 1."""

    name: str
    place: Callable[[Any], float]
    ticks: list[tuple[float, str]]

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> "Axis":
        """The axis that holds all values: of numbers, or, where one is none, of names in their order of appearance."""
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if is_number and len(set(values)) == 1:
            return cls(name, lambda value: 0.5, [(0.5, f"{values[0]:.4g}")])
        if not is_number:
            names = list(dict.fromkeys(map(str, values)))
            places = {value: (number + 0.5) / len(names) for number, value in enumerate(names)}
            return cls(name, lambda value: places[str(value)], [(places[value], value) for value in names])
        low, high = min(values), max(values)
        is_log = low > 0 and high / low >= _LOG_FROM
        scale: Callable[[float], float] = math.log if is_log else float
        first, span = scale(low), scale(high) - scale(low)
        few = sorted(set(values))
        shown = few if len(few) <= 6 else [_between(low, high, part / 4, is_log=is_log) for part in range(5)]
        return cls(
            name,
            lambda value: (scale(value) - first) / span,
            [((scale(value) - first) / span, f"{value:.4g}") for value in shown],
        )


def write_sweep_report(file: Path, sweep: Sweep, rows: list[dict[str, Any]], reuse: "list[Reuse]") -> None:
    """Write the report.

    Args:
        file: Where to.
        sweep: What was tried.
        rows: The trials, best first.
        reuse: What was computed for them.

    Raises:
        StorageError: The disk refused.
    """
    judged = [row for row in rows if row["objective"] is not None]
    keys, objective = list(sweep.space), sweep.objective.replace("_", " ")
    panels = "".join(f"<figure>{_sensitivity(key, judged, sweep, objective)}</figure>" for key in keys)
    text = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>sweep of {escape(", ".join(keys))}</title><style>{_STYLE}</style>
<h1>Sweep</h1>
<p>{len(rows)} trials of the recipe {escape(sweep.recipe)}, ranked by {escape(objective)} (less is better; no labels).
{len(rows) - len(judged)} of them have none, as they failed or were stopped early.</p>
<figure>{_parallel(keys, judged, objective)}<figcaption>Each line is a trial; the darker, the better its rank, and the
best one in red.</figcaption></figure>
<h2>What each setting does</h2>
<div class="panels">{panels}</div>
<p>Dots are trials; the line goes through the means of equal values.</p>
<h2>Trials</h2>
{_trials(keys, rows, objective)}
<h2>What they needed</h2>
{_needed(reuse)}
</html>
"""
    with reporting_disk_errors(file):
        mirror.write_bytes(file, text.encode())


def _between(low: float, high: float, part: float, *, is_log: bool) -> float:
    return low * (high / low) ** part if is_log else low + (high - low) * part


def _parallel(keys: list[str], judged: list[dict[str, Any]], objective: str) -> str:
    """Parallel coordinates: an axis for each setting and one for the objective."""
    axes = [Axis.of(key, [row["values"][key] for row in judged]) for key in keys]
    axes.append(Axis.of(objective, [row["objective"] for row in judged]))
    height = _HEIGHT - _TOP - _BOTTOM

    def at(number: int, place: float) -> tuple[float, float]:
        return 80 + number * _GAP, _TOP + (1 - place) * height

    parts = []
    for rank, row in reversed(list(enumerate(judged))):
        values = [*(row["values"][key] for key in keys), row["objective"]]
        points = (at(number, axis.place(value)) for number, (axis, value) in enumerate(zip(axes, values, strict=True)))
        shade = int(70 + 150 * rank / max(1, len(judged) - 1))
        color, width = ("#c0392b", 2.5) if rank == 0 else (f"rgb({shade},{shade},{shade})", 1.2)
        parts.append(f'<polyline points="{_path(points)}" fill="none" stroke="{color}" stroke-width="{width}"/>')
    for number, axis in enumerate(axes):
        left, top = at(number, 1)
        parts.append(f'<path d="M{left} {top}v{height}" stroke="#222"/>')
        parts.append(_text(left, 20, axis.name, "middle"))
        parts += [_text(left - 6, at(number, place)[1] + 4, label, "end") for place, label in axis.ticks]
    return _svg(100 + _GAP * (len(axes) - 1) + 40, _HEIGHT, parts)


def _sensitivity(key: str, judged: list[dict[str, Any]], sweep: Sweep, objective: str) -> str:
    """The objective against one setting."""
    across = Axis.of(key, [row["values"][key] for row in judged])
    up = Axis.of(objective, [row["objective"] for row in judged])
    width, height = _PANEL_WIDTH - 80, _PANEL_HEIGHT - 60

    def at(value: Any, result: float) -> tuple[float, float]:
        return 60 + across.place(value) * width, 20 + (1 - up.place(result)) * height

    dots = [at(row["values"][key], row["objective"]) for row in judged]
    parts = [f'<path d="M60 20V{20 + height}H{60 + width}" fill="none" stroke="#222"/>']
    if not isinstance(sweep.space[key], Range):
        means = sorted(at(value, mean) for value, mean in _means(key, judged))
        parts.append(f'<polyline points="{_path(means)}" fill="none" stroke="#c0392b" stroke-width="2"/>')
    parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="#222" fill-opacity=".6"/>' for left, top in dots]
    parts += [_text(60 + place * width, 36 + height, label, "middle") for place, label in across.ticks]
    parts += [_text(54, 24 + (1 - place) * height, label, "end") for place, label in up.ticks]
    parts.append(_text(60 + width / 2, _PANEL_HEIGHT - 6, key, "middle"))
    return _svg(_PANEL_WIDTH, _PANEL_HEIGHT, parts)


def _means(key: str, judged: list[dict[str, Any]]) -> list[tuple[Any, float]]:
    groups: dict[Any, list[float]] = {}
    for row in judged:
        groups.setdefault(row["values"][key], []).append(row["objective"])
    return [(value, sum(found) / len(found)) for value, found in groups.items()]


def _trials(keys: list[str], rows: list[dict[str, Any]], objective: str) -> str:
    header = ["rank", *keys, objective, "reliable", "seconds", "note"]
    cells = (
        [
            *(rank, *(row["values"][key] for key in keys), _number(row["objective"])),
            *(row["reliable"], f"{row['seconds']:.1f}", row["note"]),
        ]
        for rank, row in enumerate(rows, 1)
    )
    return _table(header, cells)


def _needed(reuse: "list[Reuse]") -> str:
    header = ["computed", "seconds", "reused", "seconds saved", "what"]
    cells = ([row.computed, f"{row.seconds:.1f}", row.reused, f"{row.saved:.1f}", row.stage] for row in reuse)
    return _table(header, cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _table(header: list[str], rows: Iterable[list[Any]]) -> str:
    def line(tag: str, cells: list[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", header) + "".join(line("td", row) for row in rows) + "</table>"


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in points)


def _text(left: float, top: float, text: str, anchor: str) -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" font-size="11" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'
