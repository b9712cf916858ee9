"""Finished image shards, found and checked against a recipe without reading an image."""

import os
from pathlib import Path

from spice_ray import mirror
from spice_ray.config import ImageRecipe, Recipe
from spice_ray.contracts import LABELS, SHARDS
from spice_ray.errors import ConfigError, DataError
from spice_ray.image_counts import check_count
from spice_ray.storage import MANIFEST, Artifact, open_artifact, write_json

_INGESTED = "shards.json"
"""In a folder on a server into which images were ingested."""


def find_shards(path: Path) -> tuple[Artifact, Artifact | None] | None:
    """The image shards that ``path`` is or holds, and their labels or None.

    Returns:
        None where ``path`` is no finished shards artifact and does not hold exactly one.

    Raises:
        StorageError: A manifest cannot be read.
        DataError: The shards have several sets of labels.
    """
    folders = [path] if path.name.startswith(f"{SHARDS}-") else _of_kind(path, SHARDS)
    found = [artifact for folder in folders if (artifact := _open(folder))]
    if len(found) != 1:
        return None
    shards = found[0]
    labels = [
        artifact
        for folder in _of_kind(shards.path.parent, LABELS)
        if (artifact := _open(folder)) and artifact.manifest["shards"] == shards.fingerprint
    ]
    if len(labels) > 1:
        raise DataError(
            f"{shards.path} has {len(labels)} sets of labels, {labels[0].path.name} and "
            f"{labels[1].path.name} among them, and can have one; delete those that are wrong"
        )
    return shards, labels[0] if labels else None


def holds_shards(path: Path) -> bool:
    """Whether ``path`` is a folder of image shards, or one that holds some, finished or not.

    On a server it is a finished one, or the ``artifacts`` of a run, or a folder that images were ingested into.
    """
    is_shards = path.name.startswith(f"{SHARDS}-")
    if mirror.is_mirrored(path) and path.name != "artifacts":
        # A folder of millions of images is not listed just for that.
        return mirror.exists(path / (MANIFEST if is_shards else _INGESTED))
    try:
        return os.path.isdir(path) if is_shards else bool(_of_kind(path, SHARDS))
    except OSError:
        return False  # whoever opens it says what is wrong with it


def note_ingest(folder: Path, image_size: int | None, seed: int) -> None:
    """Make it known on a server, before there are any, that ``folder`` holds shards."""
    if mirror.is_mirrored(folder):
        write_json(folder / _INGESTED, {"image_size": image_size, "seed": seed})


def check_shards(recipe: Recipe, shards: Artifact) -> None:
    """Refuse a recipe that does not fit the images or embeddings.

    Raises:
        ConfigError: They are too few, of another size, or images where embeddings are needed or the other way round.
    """
    splits = shards.manifest["splits"]
    check_form(recipe, shards)
    check_count(recipe, *(_count(splits, splits_of(recipe.protocol, first_stage)) for first_stage in (True, False)))


def check_form(recipe: Recipe, shards: Artifact) -> None:
    """Refuse shards that no model of the recipe could read, however many rows they have.

    Raises:
        ConfigError: They are of another size, or images where embeddings are needed or the other way round.
    """
    manifest = shards.manifest
    check_kind(recipe, embeddings=manifest["stored"] == "vectors", name=str(shards.path))
    if isinstance(recipe, ImageRecipe) and manifest["image_size"] != recipe.image.size:
        raise ConfigError(
            f"the shards hold images of {manifest['image_size']} pixels and the recipe asks for "
            f"image.size={recipe.image.size}; ingest again, or set image.size={manifest['image_size']}"
        )


def check_kind(recipe: Recipe, *, embeddings: bool, name: str) -> None:
    """Refuse embeddings for a recipe of images, and images for one of embeddings.

    Raises:
        ConfigError: ``name`` holds the other kind.
    """
    if embeddings and isinstance(recipe, ImageRecipe):
        raise ConfigError(f"{name} holds embeddings and the recipe is one of images; use the recipe embeddings")
    if not embeddings and not isinstance(recipe, ImageRecipe):
        raise ConfigError(
            f"{name} holds images and the recipe has no sections image, pretrain and joint, so it is one of "
            "embeddings; use a recipe of images such as images_small"
        )


def _count(splits: dict[str, int], counted: tuple[str, ...] | None) -> int:
    return sum(count for name, count in splits.items() if counted is None or name in counted)


def splits_of(protocol: str, first_stage: bool) -> tuple[str, ...] | None:
    """The splits that a training stage sees, None for all: test under ``whole`` alone, unlabeled in stage 1 alone."""
    if protocol == "whole":
        return None if first_stage else ("train", "test")
    return ("train", "unlabeled") if first_stage else ("train",)


def _of_kind(folder: Path, kind: str) -> list[Path]:
    return [folder / name for name in mirror.names(folder) if name.startswith(f"{kind}-")]


def _open(folder: Path) -> Artifact | None:
    kind, _, print_ = folder.name.partition("-")
    return open_artifact(folder.parent, kind, print_)
