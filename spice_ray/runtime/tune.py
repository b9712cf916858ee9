"""Sweeps under Ray Tune: stages that trials have in common are made once, and trials are ranked without labels."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
import yaml
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from spice_ray.config import ImageRecipe
from spice_ray.errors import SpiceError, TrainingError
from spice_ray.run_folder import RunFolder, science
from spice_ray.runtime.cluster import find_spice_error, room
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.neighbors import WIDEST
from spice_ray.runtime.progress import ProgressWriter, SilentReporter, watched
from spice_ray.runtime.trial import Found, Judge, nested, run_trial
from spice_ray.runtime.trials_table import Reuse, reuse_of, row_of, write_trials
from spice_ray.storage import read_json, write_json
from spice_ray.sweep import STAGES, Range, Stage, Sweep, Values, is_light, recipe_with, stage_of, trial_recipe

_OF_NESTED = 0.1
"""CPUs of a trial that waits for processes of its own, and of the task that starts them."""
_RETRIES = 3


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep."""

    rows: list[dict[str, Any]]
    """The trials, best first."""
    reuse: list[Reuse]
    """What was computed and what was not."""


@dataclass(frozen=True)
class Trials:
    """What every process of a sweep is told."""

    pipeline: ImagePipeline
    """That of the run, with the settings of all trials."""
    sweep: Sweep
    judge: Judge
    progress: Path

    def of(self, values: Values, *, light: bool) -> ImagePipeline:
        """The pipeline of one trial; its folder is named by its settings, so that a sweep goes on where it stopped."""
        recipe = trial_recipe(self.pipeline.recipe, self.sweep, values)
        settings = json.dumps({**self.sweep.trial, **values}, sort_keys=True)
        name = hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()
        run = RunFolder(self.pipeline.run.path / "sweeps" / ".trials" / name, self.pipeline.run.artifacts)
        run.path.mkdir(parents=True, exist_ok=True)
        return replace(self.pipeline, run=run, recipe=recipe if light else nested(recipe))


def run_sweep(pipeline: ImagePipeline, sweep: Sweep, name: str) -> SweepResult:
    """Run the trials, write what came of them and the winner's recipe and assignments.

    Raises:
        TrainingError: No trial came to an end.
    """
    folder = pipeline.run.path / "sweeps" / name
    folder.mkdir(parents=True, exist_ok=True)
    before = {found.name for found in pipeline.run.artifacts.iterdir()}
    pipeline = replace(pipeline, most_neighbors=most_neighbors(pipeline.recipe, sweep))
    # How much each trial takes is nothing to the stages that all of them share.
    science_of_trials = {key: value for key, value in sweep.trial.items() if not key.startswith("scale.")}
    shared = replace(pipeline, recipe=recipe_with(pipeline.recipe, science_of_trials)).make_shared(sweep.first_stage)
    settled = _settled(pipeline.recipe, shared.recipe)
    scale = trial_recipe(shared.recipe, sweep, {}).scale
    progress = pipeline.run.progress("sweep")
    light = is_light(sweep, trial_recipe(shared.recipe, sweep, {}))
    judge = Judge(sweep, settled, _num_concurrent(scale, light=light))
    trials = Trials(replace(shared, reporter=SilentReporter()), sweep, judge, progress)
    failed = _make_parents(trials, pipeline, light=light)
    with pipeline.reporter.stage("sweep", "trials") as show:
        results = watched(lambda: _fit(trials, folder, failed, light=light), progress, show)
    rows = [row_of(result.metrics, result.error, _values_of(result.config, sweep), shared.recipe) for result in results]
    rows.sort(key=lambda row: (row["objective"] is None, row["objective"] or 0))
    if not rows or rows[0]["objective"] is None:
        raise TrainingError(
            f"no trial came to an end ({rows[0]['note'] if rows else 'none was started'}); "
            "run the same command again with --verbose"
        )
    write_trials(folder / "trials.parquet", rows, sweep)
    reuse = reuse_of(rows, before, pipeline.run)
    write_json(folder / "reuse.json", [found._asdict() for found in reuse])
    winner = replace(pipeline, recipe=settled)
    _finish_winner(winner, recipe_with(settled, rows[0]["values"]), folder)
    return SweepResult(rows, reuse)


def _settled(recipe: ImageRecipe, found: ImageRecipe) -> ImageRecipe:
    """The recipe with the K and the prior that were found for the trials."""
    heads = recipe.heads.model_copy(update={"prior": found.heads.prior})
    count = {"num_clusters": found.num_clusters, "min_clusters": found.min_clusters}
    return recipe.model_copy(update={"heads": heads, **count})


def most_neighbors(recipe: ImageRecipe, sweep: Sweep) -> int:
    """As many neighbours as any trial asks: then all trials share them."""
    values = sweep.space.get("reliable.neighbors", [])
    asked = list(values.bounds) if isinstance(values, Range) else values
    # As the recipe reads them: YAML takes some numbers for text.
    trials = [recipe, *(recipe_with(recipe, {"reliable.neighbors": value}) for value in asked)]
    counts = (trial.reliable.neighbors for trial in trials)
    return max([WIDEST, *(count for count in counts if isinstance(count, int))])


def _make_parents(trials: Trials, pipeline: ImagePipeline, *, light: bool) -> dict[str, str]:
    """Make every stage that several trials begin with once; gives why some could not be made."""
    sweep = trials.sweep
    values = sweep.trials(pipeline.recipe.seed)
    if values is None or trials.pipeline.recipe.is_supervised:
        return {}
    failed = dict[str, str]()
    judged = STAGES.index(sweep.judged_by)
    for stage in STAGES[:judged]:
        parents = _distinct(values, stage)
        following = _distinct(values, STAGES[STAGES.index(stage) + 1])
        is_needed = len(parents) < len(following) or (light and stage == "heads")
        if not is_needed or parents == [{}]:
            continue
        title = "stages 1" if stage == "encoder" else "stages 1 and 2"
        progress = pipeline.run.progress(f"parents-{stage}")
        with pipeline.reporter.stage(f"{title} of the trials", "of them") as show:
            tell = ProgressWriter(progress, "all").write
            failed |= watched(partial(_make_all, trials, stage, parents, tell), progress, show)
    return failed


def _distinct(values: list[Values], through: Stage) -> list[Values]:
    """The settings up to a stage, each once."""
    found = {_key(values_of, through): values_of for values_of in (_through(trial, through) for trial in values)}
    return list(found.values())


def _through(values: Values, stage: Stage) -> Values:
    return {key: value for key, value in values.items() if STAGES.index(stage_of(key)) <= STAGES.index(stage)}


def _key(values: Values, stage: Stage) -> str:
    return json.dumps([stage, _through(values, stage)], sort_keys=True)


def _make_all(trials: Trials, stage: Stage, parents: list[Values], tell: Callable[[int, int], None]) -> dict[str, str]:
    """Make the parents, as many at once as the cluster has room for; gives why some could not be made."""
    most = _num_concurrent(trial_recipe(trials.pipeline.recipe, trials.sweep, {}).scale, light=False)
    make = ray.remote(_make_parent).options(num_cpus=_OF_NESTED, max_retries=_RETRIES)
    shared = ray.put(trials)
    waiting, running, failed = list(parents), dict[Any, Values](), dict[str, str]()
    tell(0, len(parents))
    while waiting or running:
        while waiting and len(running) < most:
            values = waiting.pop(0)
            running[make.remote(shared, stage, values)] = values
        done, _ = ray.wait(list(running), num_returns=1)
        values = running.pop(done[0])
        try:
            ray.get(done[0])
        except ray.exceptions.RayError as error:
            failed[_key(values, stage)] = _sentence(error)
        tell(len(parents) - len(waiting) - len(running), len(parents))
    return failed


def _make_parent(trials: Trials, stage: Stage, values: Values) -> None:
    trials.of(values, light=False).make_through(stage)


def _sentence(error: BaseException) -> str:
    """Why something failed, in a line."""
    ours = find_spice_error(error)
    lines = str(ours or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _fit(trials: Trials, folder: Path, failed: dict[str, str], *, light: bool) -> ray.tune.ResultGrid:
    sweep, recipe = trials.sweep, trials.pipeline.recipe
    scale = trial_recipe(recipe, sweep, {}).scale
    resources: dict[str, float] = {"CPU": scale.cpus_per_worker if light else _OF_NESTED}
    if light and scale.gpus_per_worker:
        resources["GPU"] = scale.gpus_per_worker
    ProgressWriter(trials.progress, "all").write(0, sweep.num_trials)
    trainable = ray.tune.with_parameters(_trial, trials=trials, failed=failed, light=light)
    stopping = sweep.early_stopping
    # The bound of TuneConfig is ignored beside a search, and more trials than that would wait for each other for ever.
    most = trials.judge.num_sharing
    values = sweep.trials(recipe.seed)
    if values is None:
        space: dict[str, Any] = {key: _domain(tried) for key, tried in sweep.space.items()}
        search = ConcurrencyLimiter(_tpe(recipe.seed), max_concurrent=most)
    else:
        space = {"values": ray.tune.grid_search(values)}
        search = BasicVariantGenerator(max_concurrent=most)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, resources),
        param_space=space,
        tune_config=ray.tune.TuneConfig(
            metric="objective",
            mode="min",
            num_samples=sweep.num_trials if values is None else 1,
            search_alg=search,
            scheduler=None
            if stopping is None
            else ray.tune.schedulers.ASHAScheduler(
                max_t=stopping.looks, grace_period=1, reduction_factor=stopping.factor
            ),
            # A process that has Torch loaded takes the next trial.
            reuse_actors=True,
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=scale.max_failures),
        ),
    )
    return tuner.fit()


def _domain(tried: list[Any] | Range) -> Any:
    if not isinstance(tried, Range):
        return ray.tune.choice(tried)
    return (ray.tune.loguniform if tried.is_log else ray.tune.uniform)(*map(float, tried.bounds))


def _tpe(seed: int) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=seed)


def _values_of(config: dict[str, Any], sweep: Sweep) -> Values:
    """A trial's settings as the sweep has them."""
    if "values" in config:
        return dict(config["values"])
    spaces = ((key, sweep.space[key]) for key in config)
    return {key: tried.snap(config[key]) if isinstance(tried, Range) else config[key] for key, tried in spaces}


def _num_concurrent(scale: Any, *, light: bool) -> int:
    """How many trials the cluster holds at once, with a CPU for the tasks that read data: of each, where it has pools.

    Ray would start more, and each would wait for processors that the others hold.
    """
    held = room(scale.cpus_per_worker, scale.gpus_per_worker)
    if light:
        return max(1, held)
    each = scale.least_workers * scale.cpus_per_worker + 1 + 2 * _OF_NESTED
    return max(1, min(held // scale.least_workers, int(ray.cluster_resources()["CPU"] / each)))


def _trial(config: dict[str, Any], *, trials: Trials, failed: dict[str, str], light: bool) -> None:
    """One trial, as Ray Tune runs it."""
    start = time.monotonic()
    values = _values_of(config, trials.sweep)
    try:
        for stage in STAGES:
            if _key(values, stage) in failed:
                raise TrainingError(failed[_key(values, stage)])
        found = _found_here(trials, values) if light else ray.get(_apart(_found_nested).remote(trials, values))
        metrics: dict[str, Any] = {**found._asdict(), "used": json.dumps(found.used)}
    except (SpiceError, ray.exceptions.RayError) as error:
        ours = find_spice_error(error)
        if ours is None:
            raise
        metrics = {"objective": float("inf"), "num_reliable": 0, "note": str(ours), "used": "[]"}
    ProgressWriter(trials.progress, f"trial-{ray.tune.get_context().get_trial_id()}").write(1, 0)
    ray.tune.report({**metrics, "trial_seconds": time.monotonic() - start})


def _found_here(trials: Trials, values: Values) -> Found:
    """A trial that trains in this process."""
    pipeline = trials.of(values, light=True)
    torch.set_num_threads(pipeline.recipe.scale.cpus_per_worker)
    return run_trial(pipeline, trials.judge, lambda objective: ray.tune.report({"objective": objective}))


def _found_nested(trials: Trials, values: Values) -> Found:
    """A trial whose stages start processes of their own; nobody looks at it before its end."""
    return run_trial(trials.of(values, light=False), trials.judge, lambda objective: None)


def _apart(function: Callable[..., Any]) -> Any:
    """A task outside of the trial's placement group, to whose room Ray would hold all that the task starts."""
    strategy = PlacementGroupSchedulingStrategy(placement_group=None)
    return ray.remote(function).options(num_cpus=_OF_NESTED, max_retries=_RETRIES, scheduling_strategy=strategy)


def _finish_winner(pipeline: ImagePipeline, winner: ImageRecipe, folder: Path) -> None:
    """Make the sweep's folder a run of the winner that shares the artifacts of the run that was swept."""
    (folder / "winner.yaml").write_text(yaml.safe_dump(science(winner), sort_keys=False), encoding="utf-8")
    record = read_json(pipeline.run.path / "run.json")
    root = os.path.relpath(pipeline.run.artifacts, folder)
    write_json(folder / "run.json", {**record, "recipe": science(winner), "artifacts_root": root})
    shutil.copyfile(pipeline.run.path / "timing.json", folder / "timing.json")
    replace(pipeline, recipe=winner, run=RunFolder(folder, pipeline.run.artifacts)).finish()
