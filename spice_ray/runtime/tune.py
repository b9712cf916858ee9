"""Sweeps under Ray Tune: every trial shares stages 1 and 2 and is ranked by the same unsupervised loss."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.tune
import torch
import yaml
from torch import Tensor

from spice_ray.config import ImageRecipe, Scale, Sweep
from spice_ray.contracts import JOINT, Health
from spice_ray.errors import SpiceError, TrainingError
from spice_ray.readers.parts import images_of, read_part
from spice_ray.recipe import sweep_recipe
from spice_ray.run_folder import RunFolder, science
from spice_ray.runtime.image_pipeline import ImagePipeline
from spice_ray.runtime.inference import final_loss, readable_ids, training_ids
from spice_ray.runtime.memory import image_budget
from spice_ray.runtime.neighbors import WIDEST
from spice_ray.runtime.progress import Done, ProgressWriter, watched
from spice_ray.runtime.weights import load_joint
from spice_ray.runtime.workers import Host, augmentation_of, publish_skipped, run_joint
from spice_ray.stages.assign import predict
from spice_ray.storage import Artifact, open_artifact, read_json, write_json


class SilentReporter:
    """Shows nothing: a trial's progress is the sweep's."""

    @contextmanager
    def stage(self, title: str, unit: str) -> Iterator[Callable[[Done], None]]:
        """Run a stage unseen."""
        yield lambda done: None

    def note(self, sentence: str) -> None:
        """Keep a note to oneself."""


class TrialProgress:
    """A trial trains from its beginning to its end in one process."""

    def restore(self) -> None:
        """There is nothing to go on from."""

    def advance(self, step: int, total: int, loss: Tensor, snapshot: Callable[[], dict[str, Any]]) -> None:
        """There is nobody to tell."""

    def note_health(self, epoch: int, loss: Tensor, health: Health) -> None:
        """A trial trains no encoder."""


def run_sweep(pipeline: ImagePipeline, settings: Sweep, name: str) -> list[dict[str, Any]]:
    """Run the trials, write their table and the winner's recipe and assignments, and give the rows, best first.

    Raises:
        TrainingError: No trial came to an end.
    """
    pipeline = replace(pipeline, most_neighbors=most_neighbors(pipeline.recipe, settings)).make_shared()
    folder = pipeline.run.path / "sweeps" / name
    folder.mkdir(parents=True, exist_ok=True)
    progress = pipeline.run.progress("sweep")
    with pipeline.reporter.stage("sweep", "trials") as show:
        results = watched(lambda: _fit(pipeline, settings, folder, progress), progress, show)
    found = (row_of(result, settings, pipeline.recipe) for result in results)
    rows = sorted(found, key=lambda row: (row["loss"] is None, row["loss"] or 0))
    if not rows or rows[0]["loss"] is None:
        raise TrainingError(
            f"no trial came to an end ({rows[0]['note'] if rows else 'none was started'}); "
            "run the same command again with --verbose"
        )
    write_trials(folder / "trials.parquet", rows, settings)
    _finish_winner(pipeline, sweep_recipe(pipeline.recipe, rows[0]["values"]), folder)
    return rows


def most_neighbors(recipe: ImageRecipe, settings: Sweep) -> int:
    """As many neighbours as any trial asks: then all trials share them."""
    key = "reliable.neighbors"
    trials = [recipe, *(sweep_recipe(recipe, {key: value}) for value in settings.space.get(key, []))]
    asked = (trial.reliable.neighbors for trial in trials)
    return max([WIDEST, *(value for value in asked if isinstance(value, int))])


def _finish_winner(pipeline: ImagePipeline, winner: ImageRecipe, folder: Path) -> None:
    """Make the sweep's folder a run of the winner that shares the artifacts of the run that was swept."""
    (folder / "winner.yaml").write_text(yaml.safe_dump(science(winner), sort_keys=False), encoding="utf-8")
    record = read_json(pipeline.run.path / "run.json")
    root = os.path.relpath(pipeline.run.artifacts, folder)
    write_json(folder / "run.json", {**record, "recipe": science(winner), "artifacts_root": root})
    shutil.copyfile(pipeline.run.path / "timing.json", folder / "timing.json")
    replace(pipeline, recipe=winner, run=RunFolder(folder, pipeline.run.artifacts)).finish()


def _fit(pipeline: ImagePipeline, settings: Sweep, folder: Path, progress: Path) -> ray.tune.ResultGrid:
    scale = pipeline.recipe.scale
    resources: dict[str, float] = {"CPU": scale.cpus_per_worker}
    if scale.gpus_per_worker:
        resources["GPU"] = scale.gpus_per_worker
    pick = ray.tune.grid_search if settings.search == "grid" else ray.tune.choice
    shared = replace(pipeline, reporter=SilentReporter())
    total = _num_trials(settings)
    ProgressWriter(progress, "all").write(0, total)
    trainable = ray.tune.with_parameters(_trial, pipeline=shared, progress=progress)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, resources),
        param_space={key: pick(values) for key, values in settings.space.items()},
        tune_config=ray.tune.TuneConfig(
            metric="loss",
            mode="min",
            num_samples=settings.samples or 1,
            # TuneConfig's own bound is ignored beside this generator, and trials on every CPU would wait for ever for
            # the tasks that read their images.
            search_alg=ray.tune.search.BasicVariantGenerator(
                max_concurrent=_num_concurrent(scale), random_state=pipeline.recipe.seed
            ),
        ),
        run_config=ray.tune.RunConfig(
            name="tune",
            storage_path=str(folder.resolve()),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=scale.max_failures),
        ),
    )
    return tuner.fit()


def _num_concurrent(scale: Scale) -> int:
    return max(1, (int(ray.cluster_resources()["CPU"]) - 1) // scale.cpus_per_worker)


def _num_trials(settings: Sweep) -> int:
    if settings.samples is not None:
        return settings.samples
    total = 1
    for values in settings.space.values():
        total *= len(values)
    return total


def _trial(config: dict[str, Any], *, pipeline: ImagePipeline, progress: Path) -> None:
    """One trial, on one worker."""
    start = time.monotonic()
    torch.set_num_threads(pipeline.recipe.scale.cpus_per_worker)
    trial = ray.tune.get_context().get_trial_id()
    run = RunFolder(pipeline.run.path / "sweeps" / ".trials" / trial, pipeline.run.artifacts)
    run.path.mkdir(parents=True, exist_ok=True)
    recipe = sweep_recipe(pipeline.recipe, config)
    try:
        metrics = evaluate_trial(replace(pipeline, run=run, recipe=recipe))
    except SpiceError as error:
        metrics = {"loss": float("inf"), "num_reliable": 0, "note": str(error)}
    ProgressWriter(progress, f"trial-{trial}").write(1, 0)
    ray.tune.report({**metrics, "trial_seconds": time.monotonic() - start})


def evaluate_trial(pipeline: ImagePipeline) -> dict[str, Any]:
    """Reliable labels and stage 3 in this process, and the loss that ranks the result."""
    round_ = pipeline.first_round
    skip, print_ = pipeline.why_skip_joint(round_), pipeline.joint_fingerprint(round_)
    if open_artifact(pipeline.run.artifacts, JOINT, print_) is None:
        job = pipeline.joint_job(round_, print_)
        if skip is not None:
            publish_skipped(job, skip)
        else:
            device = torch.device("cuda" if pipeline.recipe.scale.gpus_per_worker else "cpu")
            scale = pipeline.recipe.scale
            memory = image_budget(scale, device, _num_concurrent(scale))
            run_joint(job, Host(device, lambda module: module, TrialProgress(), memory, scale.accumulate))
    joint = pipeline.joint
    return {
        "loss": trial_loss(pipeline, joint),
        "num_reliable": sum(round_.reliable.manifest["kept"]),
        "note": skip or "",
    }


@torch.inference_mode()
def trial_loss(pipeline: ImagePipeline, joint: Artifact) -> float:
    """The loss that ``assignments`` would record for the classifier, without a pool of actors."""
    recipe, shards = pipeline.recipe, pipeline.train_shards
    device = torch.device("cuda" if recipe.scale.gpus_per_worker else "cpu")
    model, views = load_joint(joint).eval().to(device), augmentation_of(recipe.image)
    tables = (read_part(shards.path, file, shards.format) for file in shards.readable)
    found = [
        predict(model, torch.from_numpy(images_of(table, shards.image_size).copy()).to(device), views)
        for table in tables
    ]
    counted = np.flatnonzero(np.isin(readable_ids(shards), training_ids(shards)))
    logits, pooled = torch.cat([f.logits for f in found]), torch.cat([f.pooled for f in found])
    return final_loss(logits.numpy(), pooled.numpy(), counted, recipe)


def row_of(result: Any, settings: Sweep, recipe: ImageRecipe) -> dict[str, Any]:
    """A trial as the table shows it: ``values``, ``loss`` (None where it has none to be ranked by) and the rest."""
    metrics = result.metrics or {}
    loss = metrics.get("loss")
    if loss is not None and not math.isfinite(loss):
        loss = None
    trial = sweep_recipe(recipe, {key: result.config[key] for key in settings.space}).model_dump(mode="json")
    error = str(result.error).strip().splitlines()[-1] if result.error else ""
    return {
        # As the recipe reads them: YAML takes 1e-3 for text.
        "values": {key: trial[key.partition(".")[0]][key.partition(".")[2]] for key in settings.space},
        "loss": loss,
        "reliable": int(metrics.get("num_reliable", 0)),
        "seconds": float(metrics.get("trial_seconds", 0.0)),
        "note": error or metrics.get("note", ""),
    }


def write_trials(file: Path, rows: list[dict[str, Any]], settings: Sweep) -> None:
    """Write the table of trials, in the order of ``rows``."""
    columns = {key: _of_one_type([row["values"][key] for row in rows]) for key in settings.space}
    rest = {name: [row[name] for row in rows] for name in ("loss", "reliable", "seconds", "note")}
    pq.write_table(pa.table({**columns, **rest}), file)


def _of_one_type(values: list[Any]) -> list[Any]:
    """As a column holds them: numbers beside words are words too."""
    mixed = any(isinstance(value, str) for value in values)
    return [None if value is None else str(value) for value in values] if mixed else values
