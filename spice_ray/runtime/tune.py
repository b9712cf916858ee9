"""Sweeps under Ray Tune: stages that trials have in common are made once, and trials are ranked without labels."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.tune
import yaml
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from spice_ray import mirror
from spice_ray.config import ImageRecipe, Scale
from spice_ray.errors import TrainingError
from spice_ray.run_folder import RunFolder, science
from spice_ray.runtime.cluster import find_spice_error, room
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.looks import Stopping
from spice_ray.runtime.neighbors import WIDEST
from spice_ray.runtime.progress import ProgressWriter, SilentReporter, watched
from spice_ray.runtime.reading import CPUS_OF_READER
from spice_ray.runtime.sweep_table import Reuse, reuse_of, row_of, write_trials
from spice_ray.runtime.trial import Judge, nested
from spice_ray.runtime.tune_trial import RETRIES, Waiting, key_of, run_tune_trial, values_of, values_through
from spice_ray.storage import read_json, write_json
from spice_ray.sweep import STAGES, Range, Stage, Sweep, Values, stage_of
from spice_ray.trial_recipes import any_trial, is_light, recipe_with, trial_recipe

_OF_NESTED = 0.1
"""CPUs of a trial that waits for processes of its own."""


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
    """That of the run, with its K and prior, and with what all trials have of the stages that they share."""
    sweep: Sweep
    judge: Judge
    progress: Path
    light: bool
    """Whether each of them is one process that trains stage 3 alone."""

    def of(self, values: Values, *, light: bool, trial: str = "") -> ImagePipeline:
        """The pipeline of one trial; its folder is named by its settings, so that a sweep goes on where it stopped.

        Trials that may have equal settings have a folder each, by their name.
        """
        recipe = trial_recipe(self.pipeline.recipe, self.sweep, values)
        own = trial if self.sweep.may_repeat else ""
        settings = json.dumps([{**self.sweep.trial, **values}, own], sort_keys=True)
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
    before = set(mirror.names(pipeline.run.artifacts))
    pipeline = replace(pipeline, most_neighbors=most_neighbors(pipeline.recipe, sweep), left_out=pipeline.damaged)
    trials, settled = _prepare(pipeline, sweep)
    failed = _make_parents(trials, pipeline)
    with pipeline.reporter.stage("sweep", "trials") as show:
        results = watched(lambda: _fit(trials, folder, failed), trials.progress, show)
    rows = [row_of(result.metrics, result.error, values_of(result.config, sweep), settled) for result in results]
    rows.sort(key=lambda row: (row["objective"] is None, row["objective"] or 0))
    write_trials(folder / "trials.parquet", rows, sweep)
    reuse = reuse_of(rows, before, pipeline.run)
    write_json(folder / "reuse.json", [found._asdict() for found in reuse])
    if not rows or rows[0]["objective"] is None:
        raise TrainingError(
            f"no trial came to an end ({rows[0]['note'] if rows else 'none was started'}); "
            "run the same command again with --verbose"
        )
    _finish_winner(replace(pipeline, recipe=settled), recipe_with(settled, rows[0]["values"]), folder)
    return SweepResult(rows, reuse)


def _prepare(pipeline: ImagePipeline, sweep: Sweep) -> tuple[Trials, ImageRecipe]:
    """Make what all trials share; gives what they are told, and the recipe of the run with its K and prior."""
    first_key = min(sweep.space, key=lambda key: (STAGES.index(stage_of(key)), not key.startswith("pretrain.")))
    # What all of them share is made as the recipe says, however little of a processor a trial has.
    of_shared = {key: value for key, value in sweep.trial.items() if sweep.is_shared(key)}
    a_trial = replace(pipeline, recipe=any_trial(pipeline.recipe, sweep))
    a_trial.check_labels(lanes_are_known="joint.lanes" not in sweep.space)
    shared = replace(pipeline, recipe=recipe_with(pipeline.recipe, of_shared))
    shared = shared.make_shared(first_key, neighbors=_need_neighbors(pipeline.recipe, sweep))
    settled = _settled(pipeline.recipe, shared.recipe)
    trial = any_trial(shared.recipe, sweep)
    light = is_light(sweep, trial)
    judge = Judge(sweep, settled, _num_concurrent(trial.scale, sweep, light=light))
    silent = replace(shared, reporter=SilentReporter())
    return Trials(silent, sweep, judge, pipeline.run.progress("sweep"), light), settled


def _need_neighbors(recipe: ImageRecipe, sweep: Sweep) -> bool:
    chooses_reliable = sweep.judged_by == "joint" and recipe.reliable.labels is None
    return chooses_reliable or sweep.needs_neighbors


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


def _make_parents(trials: Trials, pipeline: ImagePipeline) -> dict[str, str]:
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
        is_needed = len(parents) < len(following) or (trials.light and stage == "heads")
        if not is_needed or parents == [{}]:
            continue
        # What began with a parent that could not be made cannot be made either.
        failed |= {
            key_of(of, stage): failed[key_of(of, "encoder")] for of in parents if key_of(of, "encoder") in failed
        }
        parents = [of for of in parents if key_of(of, stage) not in failed]
        title = "stage 1" if stage == "encoder" else "stages 1 and 2"
        progress = pipeline.run.progress(f"parents-{stage}")
        with pipeline.reporter.stage(f"{title} of the trials", "of them") as show:
            tell = ProgressWriter(progress, "all").write
            failed |= watched(partial(_make_all, trials, stage, parents, tell), progress, show)
    return failed


def _distinct(values: list[Values], through: Stage) -> list[Values]:
    """The settings up to a stage, each once."""
    parts = (values_through(trial, through) for trial in values)
    return list({key_of(part, through): part for part in parts}.values())


def _make_all(trials: Trials, stage: Stage, parents: list[Values], tell: Callable[[int, int], None]) -> dict[str, str]:
    """Make the parents, as many at once as the cluster has room for; gives why some could not be made."""
    scale = any_trial(trials.pipeline.recipe, trials.sweep).scale
    most = _num_concurrent(scale, trials.sweep, light=False)
    make = ray.remote(_make_parent).options(num_cpus=0, max_retries=RETRIES)
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
            failed[key_of(values, stage)] = _sentence(error)
        tell(len(parents) - len(waiting) - len(running), len(parents))
    return failed


def _make_parent(trials: Trials, stage: Stage, values: Values) -> None:
    neighbors = _need_neighbors(trials.pipeline.recipe, trials.sweep)
    trials.of(values, light=False).make_through(stage, neighbors=neighbors)


def _sentence(error: BaseException) -> str:
    """Why something failed, in a line."""
    ours = find_spice_error(error)
    lines = str(ours or error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _fit(trials: Trials, folder: Path, failed: dict[str, str]) -> ray.tune.ResultGrid:
    sweep, recipe = trials.sweep, trials.pipeline.recipe
    scale = any_trial(recipe, sweep).scale
    resources: dict[str, float] = {"CPU": scale.cpus_per_worker if trials.light else _OF_NESTED}
    if trials.light and scale.gpus_per_worker:
        resources["GPU"] = scale.gpus_per_worker
    waiting = Waiting(sweep, trials.judge.recipe, trials.progress, trials.light, failed, ray.put(trials))
    trainable = ray.tune.with_parameters(run_tune_trial, waiting=waiting)
    stopping = sweep.early_stopping
    # The bound of TuneConfig is ignored beside a search, and more trials than that would wait for each other for ever.
    most = trials.judge.num_sharing
    values = sweep.trials(recipe.seed)
    ProgressWriter(trials.progress, "all").write(0, sweep.num_trials(recipe.seed))
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
            num_samples=1 if values is not None else sweep.num_trials(recipe.seed),
            search_alg=search,
            scheduler=None
            if stopping is None
            else Stopping(time_attr="look", max_t=stopping.looks, grace_period=1, reduction_factor=stopping.factor),
            # A process that has Torch loaded takes the next trial; one that is told to stop may not be ready for it.
            reuse_actors=stopping is None,
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            **mirror.storage_of(folder),
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


def _num_concurrent(scale: Scale, sweep: Sweep, *, light: bool) -> int:
    """How many trials the cluster holds at once, with room for the tasks that read data.

    Ray would start more, and each would wait for processors that the others hold.
    """
    most = math.inf if sweep.concurrent is None else sweep.concurrent
    held: float = room(scale.cpus_per_worker, scale.gpus_per_worker)
    if not light:
        resources = ray.cluster_resources()
        each = scale.least_workers * scale.cpus_per_worker + CPUS_OF_READER + _OF_NESTED
        held = min(held // scale.least_workers, resources["CPU"] // each)
        if scale.head_gpus:
            held = min(held, resources.get("GPU", 0) // (scale.head_gpus * scale.least_workers))
    return int(max(1, min(held, most)))


def _finish_winner(pipeline: ImagePipeline, winner: ImageRecipe, folder: Path) -> None:
    """Make the sweep's folder a run of the winner that shares the artifacts of the run that was swept."""
    mirror.write_bytes(folder / "winner.yaml", yaml.safe_dump(science(winner), sort_keys=False).encode())
    held = read_json(pipeline.run.path / "run.json")
    # What the run has made is not the winner's: until that is finished, its folder is that of an unfinished run.
    record = {key: value for key, value in held.items() if key not in ("artifacts", "shards_root", "damaged")}
    of_winner = RunFolder(folder, pipeline.run.artifacts)
    of_run = {"recipe": science(winner), "artifacts_root": of_winner.artifacts_root}
    write_json(folder / "run.json", {**record, **of_run})
    timing = pipeline.run.path / "timing.json"
    if mirror.exists(timing):
        write_json(folder / "timing.json", read_json(timing))
    replace(pipeline, recipe=winner, run=of_winner).finish()
