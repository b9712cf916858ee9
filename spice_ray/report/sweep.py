"""The report of a sweep: one HTML file with its plots and tables, which needs nothing else."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spice_ray.report.page import table, write_page
from spice_ray.report.plots import Axis, path, svg, text
from spice_ray.sweep import Range, Sweep

if TYPE_CHECKING:
    from spice_ray.runtime.sweep_table import Reuse

_HEIGHT, _GAP, _TOP, _BOTTOM = 260, 170, 40, 40
_PANEL_WIDTH, _PANEL_HEIGHT = 260, 190


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
    body = f"""<h1>Sweep</h1>
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
{_needed(reuse)}"""
    write_page(file, f"sweep of {', '.join(keys)}", body)


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
        parts.append(f'<polyline points="{path(points)}" fill="none" stroke="{color}" stroke-width="{width}"/>')
    for number, axis in enumerate(axes):
        left, top = at(number, 1)
        parts.append(f'<path d="M{left} {top}v{height}" stroke="#222"/>')
        parts.append(text(left, 20, axis.name, "middle"))
        parts += [text(left - 6, at(number, place)[1] + 4, label, "end") for place, label in axis.ticks]
    return svg(100 + _GAP * (len(axes) - 1) + 40, _HEIGHT, parts)


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
        parts.append(f'<polyline points="{path(means)}" fill="none" stroke="#c0392b" stroke-width="2"/>')
    parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="#222" fill-opacity=".6"/>' for left, top in dots]
    parts += [text(60 + place * width, 36 + height, label, "middle") for place, label in across.ticks]
    parts += [text(54, 24 + (1 - place) * height, label, "end") for place, label in up.ticks]
    parts.append(text(60 + width / 2, _PANEL_HEIGHT - 6, key, "middle"))
    return svg(_PANEL_WIDTH, _PANEL_HEIGHT, parts)


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
    return table(header, cells)


def _needed(reuse: "list[Reuse]") -> str:
    header = ["computed", "seconds", "reused", "seconds saved", "what"]
    cells = ([row.computed, f"{row.seconds:.1f}", row.reused, f"{row.saved:.1f}", row.stage] for row in reuse)
    return table(header, cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
