"""One trial as Ray Tune runs it.

A trial whose stages start processes of their own has one that waits for them, in the room that Ray Tune gives it. What
such a process needs is here, and it needs no torch, which would take 400 MB of each.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.tune
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from spice_ray.config import ImageRecipe
from spice_ray.errors import SpiceError, TrainingError
from spice_ray.runtime.cluster import find_spice_error
from spice_ray.runtime.progress import ProgressWriter
from spice_ray.sweep import STAGES, Range, Stage, Sweep, Values, stage_of
from spice_ray.trial_recipes import recipe_with

if TYPE_CHECKING:
    from spice_ray.runtime.looks import Look
    from spice_ray.runtime.trial import Found
    from spice_ray.runtime.tune import Trials

RETRIES = 3
"""Of a task whose process was lost."""


@dataclass(frozen=True)
class Waiting:
    """What a process that waits for a trial is told."""

    sweep: Sweep
    recipe: ImageRecipe
    """That of the run which is swept."""
    progress: Path
    light: bool
    """Whether the trial is one process that trains stage 3 itself."""
    failed: dict[str, str]
    """Why stages that trials begin with could not be made, by their key."""
    trials: "ray.ObjectRef[Trials]"


def run_tune_trial(config: dict[str, Any], *, waiting: Waiting) -> None:
    """Run a trial and report its objective; one that fails reports why."""
    name = ray.tune.get_context().get_trial_id()
    values = values_of(config, waiting.sweep)
    stopping = waiting.sweep.early_stopping
    trials = ray.get(waiting.trials) if waiting.light else None
    start = time.monotonic()
    try:
        recipe_with(waiting.recipe, values)  # else it could not be run as the winner
        for stage in STAGES:
            if key_of(values, stage) in waiting.failed:
                raise TrainingError(waiting.failed[key_of(values, stage)])
        found = (
            ray.get(_apart(_found_nested).remote(waiting.trials, values, name))
            if trials is None
            else _found_here(trials, values, name)
        )
        metrics = None if found is None else {**found._asdict(), "used": json.dumps(found.used)}
    except (SpiceError, ray.exceptions.RayError) as error:
        ours = find_spice_error(error)
        if ours is None:
            raise
        metrics = {"objective": float("inf"), "num_reliable": 0, "note": str(ours), "used": "[]"}
    ProgressWriter(waiting.progress, f"trial-{name}").write(1, 0)
    if metrics is not None:
        last = 1 if stopping is None else stopping.looks
        ray.tune.report({**metrics, "look": last, "trial_seconds": time.monotonic() - start})


def values_of(config: dict[str, Any], sweep: Sweep) -> Values:
    """A trial's settings as the sweep has them."""
    if "values" in config:
        return dict(config["values"])
    spaces = ((key, sweep.space[key]) for key in config)
    return {key: tried.snap(config[key]) if isinstance(tried, Range) else config[key] for key, tried in spaces}


def values_through(values: Values, stage: Stage) -> Values:
    """Those of the stages up to one."""
    return {key: value for key, value in values.items() if STAGES.index(stage_of(key)) <= STAGES.index(stage)}


def key_of(values: Values, stage: Stage) -> str:
    """What trials have in common that are equal up to a stage."""
    return json.dumps([stage, values_through(values, stage)], sort_keys=True)


def _found_here(trials: "Trials", values: Values, name: str) -> "Found | None":
    """A trial that trains in this process; None where it was stopped before."""
    import torch

    from spice_ray.runtime.trial import run_trial

    pipeline = trials.of(values, light=True, trial=name)
    torch.set_num_threads(pipeline.recipe.scale.cpus_per_worker)

    def tell(look: "Look") -> None:
        told = {"objective": look.objective, "looks_file": str(look.file), "is_over": look.is_over}
        ray.tune.report({"look": look.number, **told})

    return run_trial(pipeline, trials.judge, tell)


def _found_nested(trials: "Trials", values: Values, name: str) -> "Found | None":
    """A trial whose stages start processes of their own; nobody looks at it before its end."""
    from spice_ray.runtime.trial import run_trial

    return run_trial(trials.of(values, light=False, trial=name), trials.judge, None)


def _apart(function: Callable[..., Any]) -> Any:
    """A task outside of the trial's placement group, to whose room Ray would hold all that the task starts."""
    strategy = PlacementGroupSchedulingStrategy(placement_group=None)
    return ray.remote(function).options(num_cpus=0, max_retries=RETRIES, scheduling_strategy=strategy)
