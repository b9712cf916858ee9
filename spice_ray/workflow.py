"""Runs and sweeps, as the command line, the jobs and Python ask for them: check first, then start Ray, then run."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spice_ray import mirror
from spice_ray.config import ImageRecipe, Recipe
from spice_ray.errors import ConfigError, DamagedError, SpiceError
from spice_ray.image_counts import check_count
from spice_ray.intake import ingest_into, open_shards_at, open_source, shards_at, shown_source
from spice_ray.recipe import load_recipe
from spice_ray.report.sweep import write_sweep_report
from spice_ray.run_folder import RunFolder, check_folder, check_held, claim, owner_of, read_record
from spice_ray.runtime.cluster import check_cluster, check_local_cpus, connected, grown, place_of_ray
from spice_ray.runtime.progress import Reporter
from spice_ray.shards import check_kind, check_shards, find_shards
from spice_ray.storage import Artifact
from spice_ray.sweep import Sweep
from spice_ray.trial_recipes import any_trial, check_trials, refuse_sweep

if TYPE_CHECKING:
    import pyarrow as pa

    from spice_ray.readers.source import Source
    from spice_ray.runtime.pipeline import Pipeline
    from spice_ray.runtime.tune import SweepResult


@dataclass(frozen=True)
class Prepared:
    """A run that was checked: nothing has been computed and Ray has not been started."""

    run: RunFolder
    recipe: Recipe
    source: "Source | None"
    """None where the images are shards already."""
    shards_path: Path | None


def prepare(
    recipe: Recipe,
    data: str,
    out: Path,
    *,
    labels_from_folders: bool = False,
    trials: Sweep | None = None,
    base: Path | None = None,
) -> Prepared:
    """Check everything that can be checked without reading images, then make the run folder or take it.

    Args:
        recipe: The run's.
        data: Images or image shards: a path, or the word digits.
        out: The run folder.
        labels_from_folders: Take the names of the images' folders for labels.
        trials: A sweep that the run is for.
        base: The folder of another run of these images: what it has made is not made again.

    Raises:
        SpiceError: Something cannot be used; a new run folder has not been made, and an old one is as it was.
    """
    check_local_cpus(recipe.scale)
    check_folder(out)
    base = None if base is None else Path(os.path.abspath(base))
    recipe = _with_weights(recipe, owner_of(out, base))
    recipe = _with_labels(recipe)
    if trials is not None:
        check_trials(recipe, trials)
        assert isinstance(recipe, ImageRecipe)  # of other recipes no sweep passes
        check_local_cpus(any_trial(recipe, trials).scale)
    out = Path(os.path.abspath(out))  # workers have working directories of their own
    path = shards_at(data)
    if path is not None:
        shards = open_shards_at(path)[0]
        identity = {"path": shown_source(data), "digest": f"{shards.kind}-{shards.fingerprint}"}
        check_held(out, recipe, identity, base)
        check_shards(recipe, shards)
        return Prepared(claim(out, recipe, identity, base), recipe, None, path)
    source = open_source(data, labels_from_folders)
    if trials is not None and source.kind == "embeddings":
        refuse_sweep()
    check_kind(recipe, embeddings=source.kind == "embeddings", name=shown_source(data))
    identity = {"path": shown_source(data), "digest": f"{source.kind}-{source.listing_digest()}"}
    check_held(out, recipe, identity, base)
    from spice_ray.readers.rows import count_rows

    num_candidates = count_rows(source)
    # Some may be unreadable or of another split: the pipeline checks again when it knows.
    if num_candidates is not None:
        check_count(recipe, num_candidates, num_candidates)
    return Prepared(claim(out, recipe, identity, base), recipe, source, None)


def _with_weights(recipe: Recipe, owner: Path) -> Recipe:
    """The recipe with the digest of given weights, after a look at them, or at the copy that the run ``owner`` has."""
    if not isinstance(recipe, ImageRecipe) or recipe.pretrain.weights is None or recipe.is_supervised:
        return recipe
    from spice_ray.runtime.frozen import check_given, pin_weights  # they need torch

    pinned = pin_weights(recipe, owner)
    check_given(pinned, owner / "artifacts")
    return pinned


def _with_labels(recipe: Recipe) -> Recipe:
    """The recipe with the digest of labels that are given, after a look at them; workers may be in other folders."""
    if not isinstance(recipe, ImageRecipe) or recipe.reliable.labels is None:
        return recipe
    from spice_ray.readers.given_labels import read_given_labels

    path = os.path.abspath(os.path.expanduser(recipe.reliable.labels))
    digest = read_given_labels(path, recipe.num_clusters).digest()
    if recipe.reliable.labels_digest not in (None, digest):
        raise ConfigError(
            f"reliable.labels={path} holds other labels than those that the recipe was made with; give that file, or "
            "leave reliable.labels_digest out"
        )
    found = {"labels": path, "labels_digest": digest}
    return recipe.model_copy(update={"reliable": recipe.reliable.model_copy(update=found)})


def run(prepared: Prepared, reporter: Reporter, *, verbose: bool = False) -> Artifact:
    """All stages; gives the assignments.

    Raises:
        SpiceError: The images do not fit the recipe, or a stage failed.
    """
    reporter.note(place_of_ray())
    with connected(prepared.recipe.scale, verbose=verbose):
        result = _finish(_pipeline(prepared, reporter))
    _report(prepared.run.path, reporter)
    return result


def sweep(
    prepared: Prepared, settings: Sweep, name: str, reporter: Reporter, *, verbose: bool = False
) -> "SweepResult":
    """The stages that trials share where they are missing, then the trials, and the winner as a run of its own.

    Raises:
        SpiceError: As :func:`run`.
    """
    assert isinstance(prepared.recipe, ImageRecipe)  # of other recipes prepare refuses a sweep
    trial = any_trial(prepared.recipe, settings).scale
    workers = trial.least_workers * min(settings.concurrent or 1, settings.num_trials(prepared.recipe.seed))
    with connected(prepared.recipe.scale, verbose=verbose), grown(trial, workers):
        from spice_ray.runtime.image_pipeline import ImagePipeline
        from spice_ray.runtime.tune import run_sweep

        check_cluster(trial)
        pipeline = _pipeline(prepared, reporter)
        assert isinstance(pipeline, ImagePipeline)
        result = run_sweep(pipeline, settings, name)
    report = prepared.run.path / "sweeps" / name / "report.html"
    write_sweep_report(report, settings, result.rows, result.reuse)
    _report(report.parent, reporter)
    return result


def cluster(
    data: str,
    *,
    num_clusters: int | str,
    recipe: str = "images_small",
    out: str,
    reporter: Reporter | None = None,
    overrides: dict[str, Any] | None = None,
) -> "pa.Table":
    """Cluster images from Python.

    Args:
        data: What ``spice-ray run --data`` takes.
        num_clusters: K, or a range such as ``"8-12"`` or ``"auto"`` for one that is chosen by the embedding.
        recipe: A shipped recipe or a YAML file.
        out: The run folder, or its URL; the same call goes on where an interrupted one stopped.
        reporter: Shows progress; the console's unless given.
        overrides: Settings such as ``{"heads.count": 5}``.

    Returns:
        One row per image: sample_id, source, split, cluster, confidence, consistency, reliable.

    Raises:
        SpiceError: Something cannot be used; the message says what and why.
    """
    import pyarrow.parquet as pq

    from spice_ray.console import ConsoleReporter

    settings = [
        f"{key}={json.dumps(value)}" for key, value in {**(overrides or {}), "num_clusters": num_clusters}.items()
    ]
    folder = mirror.path_of(out)
    try:
        run(prepare(load_recipe(recipe, settings), data, folder), reporter or ConsoleReporter())
    except SpiceError as error:
        raise type(error)(mirror.shown(error)) from error
    return pq.read_table(mirror.local(folder / "assignments.parquet"))


def _pipeline(prepared: Prepared, reporter: Reporter) -> "Pipeline":
    from spice_ray.runtime.embedding_pipeline import EmbeddingPipeline
    from spice_ray.runtime.image_pipeline import ImagePipeline

    shards, labels = _shards(prepared, reporter)
    run, recipe = prepared.run, prepared.recipe
    if isinstance(recipe, ImageRecipe):
        return ImagePipeline(run, recipe, shards, labels, reporter)
    return EmbeddingPipeline(run, recipe, shards, labels, reporter)


def _finish(pipeline: "Pipeline") -> Artifact:
    """All stages; begun again without the shard files that were damaged meanwhile, where they may be left out."""
    while True:
        try:
            return pipeline.finish()
        except DamagedError:
            anew = replace(pipeline)  # it looks for damage itself
            if anew.damaged <= pipeline.damaged:
                raise
            pipeline = anew


def _report(run: Path, reporter: Reporter) -> None:
    """The page about a run, which is finished also where that cannot be written."""
    from spice_ray.report.run import write_run_report  # it needs torch

    try:
        reporter.note(f"examples of each cluster, and how far to trust it: {write_run_report(run)}")
    except SpiceError as error:
        reporter.note(f"there is no page about the clusters: {error}")


def _shards(prepared: Prepared, reporter: Reporter) -> tuple[Artifact, Artifact | None]:
    if prepared.source is None:
        assert prepared.shards_path is not None
        return open_shards_at(prepared.shards_path)
    run, recipe = prepared.run, prepared.recipe
    record = read_record(run.owner)
    found = find_shards(run.artifacts) if "ingested" in record else None
    # Labels can be asked for later: the images are read again, and the shards are the same.
    if found is not None and record.get("labels_read", False) >= prepared.source.labels_known:
        return found
    from spice_ray.runtime.pipeline import timed

    with timed(run, "ingest"):
        size = recipe.image.size if isinstance(recipe, ImageRecipe) else None
        found = ingest_into(prepared.source, run.artifacts, size, recipe.seed, reporter)
    run.publish_table(found[0], "rejects.parquet")
    RunFolder(run.owner, run.artifacts).record(ingested=found[0].fingerprint, labels_read=prepared.source.labels_known)
    return found
