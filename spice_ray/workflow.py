"""What the command line, the jobs and the Python interface do: check first, then start Ray, then run."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spice_ray import mirror
from spice_ray.config import ImageRecipe, Recipe, Scale
from spice_ray.contracts import HEADS, JOINT
from spice_ray.errors import ConfigError, DamagedError, DataError, SpiceError, StorageError
from spice_ray.image_counts import check_count
from spice_ray.recipe import (
    check_key,
    check_recipe,
    check_scale,
    load_recipe,
    parse_override,
    setting_keys,
    with_value,
)
from spice_ray.report.sweep import write_sweep_report
from spice_ray.run_folder import (
    RunFolder,
    check_folder,
    check_held,
    claim,
    claim_predictions,
    lock,
    owner_of,
    read_finished,
    read_record,
)
from spice_ray.runtime.cluster import check_cluster, check_local_cpus, connected, grown, place_of_ray
from spice_ray.runtime.progress import Reporter
from spice_ray.shards import check_form, check_kind, check_shards, find_shards, holds_shards, note_ingest
from spice_ray.storage import Artifact, open_artifact, reporting_disk_errors
from spice_ray.sweep import Sweep, any_trial, check_trials, refuse_sweep

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
    path = _shards_of(data)
    if path is not None:
        shards = _open_shards(path)[0]
        identity = {"path": _shown(data), "digest": f"{shards.kind}-{shards.fingerprint}"}
        check_held(out, recipe, identity, base)
        check_shards(recipe, shards)
        return Prepared(claim(out, recipe, identity, base), recipe, None, path)
    source = open_source(data, labels_from_folders)
    if trials is not None and source.kind == "embeddings":
        refuse_sweep()
    check_kind(recipe, embeddings=source.kind == "embeddings", name=_shown(data))
    identity = {"path": _shown(data), "digest": f"{source.kind}-{source.listing_digest()}"}
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


def open_source(data: str, labels_from_folders: bool = False) -> "Source":
    """Find out what ``data`` is, as :func:`spice_ray.readers.source.open_source` does.

    Raises:
        DataError: There is nothing that can be read.
    """
    # Imported here: the readers need Arrow and Pillow, and a wrong setting is refused faster without.
    from spice_ray.readers.source import open_source as find

    known_by_path = data != "digits" and os.path.exists(data)
    return find(os.path.abspath(data) if known_by_path else data, labels_from_folders)


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


def ingest(
    source: "Source",
    out: Path,
    scale: Scale,
    *,
    image_size: int | None,
    seed: int,
    reporter: Reporter,
    verbose: bool = False,
) -> Artifact:
    """Make image shards, or shards of embeddings, which have no ``image_size``.

    Raises:
        SpiceError: The source, the size or the folder cannot be used.
    """
    check_local_cpus(scale)
    _check_size(source, image_size)
    check_folder(out)
    with reporting_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
    note_ingest(out, image_size, seed)
    with connected(scale, verbose=verbose):
        return _ingest(source, Path(os.path.abspath(out)), image_size, seed, reporter)[0]


def predict(
    run: Path, data: str, out: Path, overrides: list[str], reporter: Reporter, *, verbose: bool = False
) -> Artifact:
    """Classify new images by a finished run; gives the table's artifact, of which ``out`` has a copy.

    Args:
        run: The folder of a finished run, or of the winner of a sweep.
        data: Images, or image shards of the run's size, or embeddings where the run is one of embeddings.
        out: The folder for the table and the shards; the same call goes on where an interrupted one stopped.
        overrides: Settings of ``scale``.
        reporter: Shows progress.
        verbose: Show what Ray says.

    Raises:
        SpiceError: Something cannot be used.
    """
    recipe, model = _finished_model(run, overrides)
    check_local_cpus(recipe.scale)
    path = _shards_of(data)
    found = None if path is None else _open_shards(path)
    source = open_source(data) if path is None else None
    if found is not None:
        check_form(recipe, found[0])
        _check_width(found[0].manifest.get("embed_dim"), model)
        digest = f"{found[0].kind}-{found[0].fingerprint}"
    else:
        assert source is not None
        check_kind(recipe, embeddings=source.kind == "embeddings", name=_shown(data))
        _check_width(getattr(source, "dim", None), model)
        digest = f"{source.kind}-{source.listing_digest()}"
    folder = claim_predictions(Path(os.path.abspath(out)), model.fingerprint, {"path": _shown(data), "digest": digest})
    with connected(recipe.scale, verbose=verbose):
        from spice_ray.runtime.data import find_left_out, open_shards
        from spice_ray.runtime.predict import publish_predicted
        from spice_ray.runtime.progress import Done

        if found is None:
            assert source is not None
            size = recipe.image.size if isinstance(recipe, ImageRecipe) else None
            found = find_shards(folder.artifacts) or _ingest(source, folder.artifacts, size, recipe.seed, reporter)
        shards = open_shards(found[0], None, find_left_out(found[0], recipe.scale, reporter))
        with reporter.stage("predictions", "images") as show:
            table = publish_predicted(
                folder.artifacts, recipe, model, shards, lambda done, total: show(Done(done, total, None))
            )
    folder.publish_table(table, "assignments.parquet")
    folder.publish_table(found[0], "rejects.parquet")
    return table


def read_scale(overrides: list[str], of_others: str) -> Scale:
    """Settings of ``scale``, where no other can be given.

    Args:
        overrides: Such as ``scale.gpus_per_worker=1``.
        of_others: Why another setting cannot be given, such as "is settled by the run".

    Raises:
        ConfigError: There is another, or a value that cannot be used.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, value = parse_override(override)
        if not key.startswith("scale."):
            raise ConfigError(f"{key} {of_others}; only settings of scale can be given here")
        check_key(key, setting_keys())
        settings = with_value(settings, key, value)
    return check_scale(settings.get("scale", {}))


def _finished_model(run: Path, overrides: list[str]) -> tuple[Recipe, Artifact]:
    """The recipe of a finished run, with settings of scale, and its classifier, or its heads."""
    record = read_finished(run)
    # Lanes, by which a recipe holds its workers, are of no account here.
    scale = read_scale(overrides, "is settled by the run")
    recipe = check_recipe(record["recipe"]).model_copy(update={"scale": scale})
    kind = JOINT if isinstance(recipe, ImageRecipe) else HEADS
    root = mirror.joined(Path(os.path.abspath(run)), record["artifacts_root"])  # workers may be in other folders
    model = open_artifact(root, kind, record["artifacts"][kind])
    if model is None:
        raise DataError(f"{root} lacks {kind}-{record['artifacts'][kind]}; run the same command again to make it")
    return recipe, model


def _check_width(given: int | None, model: Artifact) -> None:
    wanted = model.manifest.get("embed_dim")
    if model.kind == HEADS and given != wanted:
        raise DataError(
            f"the embeddings have {given} numbers each and those of the run have {wanted}; give embeddings of the same "
            "model"
        )


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


def _shown(data: str) -> str:
    """The source as run.json names it: without the keys that a URL may hold."""
    from spice_ray.readers.places import is_url, place_of
    from spice_ray.readers.synset_folders import SUBSETS

    subset, _, folder = data.partition(":")
    if subset in SUBSETS:
        return f"{subset}:{_shown(folder)}"
    return str(place_of(data)) if is_url(data) else data


def _check_size(source: "Source", image_size: int | None) -> None:
    if source.kind == "embeddings" and image_size is not None:
        raise ConfigError(f"--size={image_size} is for images and these are embeddings; leave it out")
    if source.kind != "embeddings" and image_size is None:
        raise ConfigError(
            "images may be of any size and shards hold one; give it as --size, in pixels, the recipe's image.size"
        )


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
        return _open_shards(prepared.shards_path)
    run, recipe = prepared.run, prepared.recipe
    record = read_record(run.owner)
    found = find_shards(run.artifacts) if "ingested" in record else None
    # Labels can be asked for later: the images are read again, and the shards are the same.
    if found is not None and record.get("labels_read", False) >= prepared.source.labels_known:
        return found
    from spice_ray.runtime.pipeline import timed

    with timed(run, "ingest"):
        size = recipe.image.size if isinstance(recipe, ImageRecipe) else None
        found = _ingest(prepared.source, run.artifacts, size, recipe.seed, reporter)
    run.publish_table(found[0], "rejects.parquet")
    RunFolder(run.owner, run.artifacts).record(ingested=found[0].fingerprint, labels_read=prepared.source.labels_known)
    return found


def _ingest(
    source: "Source", root: Path, image_size: int | None, seed: int, reporter: Reporter
) -> tuple[Artifact, Artifact | None]:
    from spice_ray.runtime.ingest import ingest as ingest_source

    shards, labels = ingest_source(source, root, image_size=image_size, seed=seed, reporter=reporter)
    rejected = shards.manifest["num_rejects"]
    if rejected:
        unit = "embeddings" if source.kind == "embeddings" else "files"
        reporter.note(f"{rejected} {unit} could not be read; {shards.path / 'rejects.parquet'} says why")
    return shards, labels


def _shards_of(data: str) -> Path | None:
    """Where the shards are that ``data`` names; None where it is something else."""
    if data == "digits":
        return None
    try:
        path = Path(os.path.abspath(mirror.path_of(data)))
        return path if holds_shards(path) else None
    except StorageError:  # whoever opens it as a source says what is wrong with it
        return None


def _open_shards(path: Path) -> tuple[Artifact, Artifact | None]:
    found = find_shards(path)
    if found is None:
        raise DataError(
            f"{path} does not hold exactly one finished set of image shards; ingest into a folder of its own"
        )
    return found
