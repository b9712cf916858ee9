"""New images, or embeddings, classified by a finished run."""

import os
from pathlib import Path

from spice_ray.config import ImageRecipe, Recipe
from spice_ray.contracts import HEADS, JOINT
from spice_ray.errors import DataError
from spice_ray.intake import ingest_into, open_shards_at, open_source, shards_at, shown_source
from spice_ray.recipe import check_recipe, read_scale
from spice_ray.run_folder import claim_predictions, open_made, read_finished
from spice_ray.runtime.cluster import check_local_cpus, connected
from spice_ray.runtime.progress import Reporter
from spice_ray.shards import check_form, check_kind, find_shards
from spice_ray.storage import Artifact


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
    path = shards_at(data)
    found = None if path is None else open_shards_at(path)
    source = open_source(data) if path is None else None
    if found is not None:
        check_form(recipe, found[0])
        _check_width(found[0].manifest.get("embed_dim"), model)
        digest = f"{found[0].kind}-{found[0].fingerprint}"
    else:
        assert source is not None
        check_kind(recipe, embeddings=source.kind == "embeddings", name=shown_source(data))
        _check_width(getattr(source, "dim", None), model)
        digest = f"{source.kind}-{source.listing_digest()}"
    folder = claim_predictions(
        Path(os.path.abspath(out)), model.fingerprint, {"path": shown_source(data), "digest": digest}
    )
    with connected(recipe.scale, verbose=verbose):
        from spice_ray.runtime.data import find_left_out, open_shards
        from spice_ray.runtime.predict import publish_predicted
        from spice_ray.runtime.progress import Done

        if found is None:
            assert source is not None
            size = recipe.image.size if isinstance(recipe, ImageRecipe) else None
            found = find_shards(folder.artifacts) or ingest_into(source, folder.artifacts, size, recipe.seed, reporter)
        shards = open_shards(found[0], None, find_left_out(found[0], recipe.scale, reporter))
        with reporter.stage("predictions", "images") as show:
            table = publish_predicted(
                folder.artifacts, recipe, model, shards, lambda done, total: show(Done(done, total, None))
            )
    folder.publish_table(table, "assignments.parquet")
    folder.publish_table(found[0], "rejects.parquet")
    return table


def _finished_model(run: Path, overrides: list[str]) -> tuple[Recipe, Artifact]:
    """The recipe of a finished run, with settings of scale, and its classifier, or its heads."""
    record = read_finished(run)
    # Lanes, by which a recipe holds its workers, are of no account here.
    scale = read_scale(overrides, "is settled by the run")
    recipe = check_recipe(record["recipe"]).model_copy(update={"scale": scale})
    # Workers may be in other folders.
    return recipe, open_made(Path(os.path.abspath(run)), record, JOINT if isinstance(recipe, ImageRecipe) else HEADS)


def _check_width(given: int | None, model: Artifact) -> None:
    wanted = model.manifest.get("embed_dim")
    if model.kind == HEADS and given != wanted:
        raise DataError(
            f"the embeddings have {given} numbers each and those of the run have {wanted}; give embeddings of the same "
            "model"
        )
