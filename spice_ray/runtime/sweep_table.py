"""What a sweep leaves behind of its trials: their table, and what was computed and what was not."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from spice_ray import mirror
from spice_ray.config import ImageRecipe
from spice_ray.errors import ConfigError
from spice_ray.run_folder import RunFolder
from spice_ray.sweep import Sweep, Values
from spice_ray.trial_recipes import recipe_with


class Reuse(NamedTuple):
    """How often trials needed what a stage makes."""

    stage: str
    """The kind of the artifacts."""
    computed: int
    """How many were made for this sweep."""
    reused: int
    """How often one was there."""
    seconds: float
    """That those which were made took."""
    saved: float
    """What making the others anew would have taken, seconds."""


def reuse_of(rows: list[dict[str, Any]], before: set[str], run: RunFolder) -> list[Reuse]:
    """Count what the trials used.

    Args:
        rows: The trials, with the names of the artifacts that each used.
        before: Names of the artifacts that there were before the sweep.
        run: The run that was swept.
    """
    uses: dict[str, dict[str, int]] = {}
    for row in rows:
        for name in row["used"]:
            of_kind = uses.setdefault(name.partition("-")[0], {})
            of_kind[name] = of_kind.get(name, 0) + 1
    return [_reuse(kind, counts, before, run) for kind, counts in uses.items()]


def _reuse(kind: str, counts: dict[str, int], before: set[str], run: RunFolder) -> Reuse:
    made = {name for name in counts if name not in before}
    reused = {name: count - (name in made) for name, count in counts.items()}
    seconds = {name: run.seconds_of(name) or 0.0 for name in counts}
    return Reuse(
        kind,
        len(made),
        sum(reused.values()),
        round(sum(seconds[name] for name in made), 3),
        round(sum(seconds[name] * count for name, count in reused.items()), 3),
    )


def row_of(metrics: dict[str, Any] | None, error: Any, values: Values, recipe: ImageRecipe) -> dict[str, Any]:
    """A trial as the table shows it; ``objective`` is None where it has none to be ranked by."""
    metrics = metrics or {}
    objective = metrics.get("objective")
    is_over = "trial_seconds" in metrics
    if objective is not None and not math.isfinite(objective):
        objective = None
    said = str(error).strip().splitlines()[-1] if error else ""
    stopped = "" if is_over or objective is None else "stopped early"
    return {
        "values": _as_read(values, recipe),
        "objective": objective if is_over else None,
        "reliable": int(metrics.get("num_reliable", 0)),
        "seconds": float(metrics.get("trial_seconds", metrics.get("time_total_s", 0.0))),
        "note": said or metrics.get("note", "") or stopped,
        "last_look": None if is_over else objective,
        "used": json.loads(metrics.get("used", "[]")),
    }


def _as_read(values: Values, recipe: ImageRecipe) -> Values:
    """Values as the recipe reads them: YAML takes 1e-3 for text. Those of a trial that was refused stay as they are."""
    try:
        trial = recipe_with(recipe, values).model_dump(mode="json")
    except ConfigError:
        return values
    return {key: trial[key.partition(".")[0]][key.partition(".")[2]] for key in values}


def write_trials(file: Path, rows: list[dict[str, Any]], sweep: Sweep) -> None:
    """Write the table of trials, in the order of ``rows``; ``artifacts`` are what each was made of."""
    columns = {key: _of_one_type([row["values"][key] for row in rows]) for key in sweep.space}
    rest = {name: [row[name] for row in rows] for name in ("objective", "last_look", "reliable", "seconds", "note")}
    types = {"objective": pa.float64(), "last_look": pa.float64()}
    arrays = {name: pa.array(values, types.get(name)) for name, values in {**columns, **rest}.items()}
    used = pa.array([row["used"] for row in rows], pa.list_(pa.string()))
    pq.write_table(pa.table({**arrays, "artifacts": used}), file)
    mirror.send(file)


def _of_one_type(values: list[Any]) -> list[Any]:
    """As a column holds them: numbers beside words are words too."""
    mixed = any(isinstance(value, str) for value in values)
    return [None if value is None else str(value) for value in values] if mixed else values
