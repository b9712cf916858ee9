"""What is taken in: what a user names is found out, and images are decoded into shards."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from spice_ray import mirror
from spice_ray.config import Scale
from spice_ray.errors import ConfigError, DataError, StorageError
from spice_ray.run_folder import check_folder, lock
from spice_ray.runtime.cluster import check_local_cpus, connected
from spice_ray.runtime.progress import Reporter
from spice_ray.shards import find_shards, holds_shards, note_ingest
from spice_ray.storage import Artifact, reporting_disk_errors

if TYPE_CHECKING:
    from spice_ray.readers.source import Source


def open_source(data: str, labels_from_folders: bool = False) -> "Source":
    """Find out what ``data`` is, as :func:`spice_ray.readers.source.open_source` does.

    Raises:
        DataError: There is nothing that can be read.
    """
    # Imported here: the readers need Arrow and Pillow, and a wrong setting is refused faster without.
    from spice_ray.readers.source import open_source as find

    known_by_path = data != "digits" and os.path.exists(data)
    return find(os.path.abspath(data) if known_by_path else data, labels_from_folders)


def shown_source(data: str) -> str:
    """The source as run.json names it: without the keys that a URL may hold."""
    from spice_ray.readers.places import is_url, place_of
    from spice_ray.readers.synset_folders import SUBSETS

    subset, _, folder = data.partition(":")
    if subset in SUBSETS:
        return f"{subset}:{shown_source(folder)}"
    return str(place_of(data)) if is_url(data) else data


def shards_at(data: str) -> Path | None:
    """Where the shards are that ``data`` names; None where it is something else."""
    if data == "digits":
        return None
    try:
        path = Path(os.path.abspath(mirror.path_of(data)))
        return path if holds_shards(path) else None
    except StorageError:  # whoever opens it as a source says what is wrong with it
        return None


def open_shards_at(path: Path) -> tuple[Artifact, Artifact | None]:
    """The shards in a folder, and the artifact of their labels if there is one.

    Raises:
        DataError: It does not hold one set of them.
    """
    found = find_shards(path)
    if found is None:
        raise DataError(
            f"{path} does not hold exactly one finished set of image shards; ingest into a folder of its own"
        )
    return found


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
        return ingest_into(source, Path(os.path.abspath(out)), image_size, seed, reporter)[0]


def ingest_into(
    source: "Source", root: Path, image_size: int | None, seed: int, reporter: Reporter
) -> tuple[Artifact, Artifact | None]:
    """Make shards, and an artifact of the labels if there are any, in a folder of artifacts; Ray is there."""
    from spice_ray.runtime.ingest import ingest as ingest_source

    shards, labels = ingest_source(source, root, image_size=image_size, seed=seed, reporter=reporter)
    rejected = shards.manifest["num_rejects"]
    if rejected:
        unit = "embeddings" if source.kind == "embeddings" else "files"
        reporter.note(f"{rejected} {unit} could not be read; {shards.path / 'rejects.parquet'} says why")
    copies = shards.manifest["num_copies"]
    if copies:
        unit = "embeddings" if source.kind == "embeddings" else "images"
        reporter.note(f"{copies} of {shards.manifest['num_images']} {unit} are copies of others, and count like them")
    return shards, labels


def _check_size(source: "Source", image_size: int | None) -> None:
    if source.kind == "embeddings" and image_size is not None:
        raise ConfigError(f"--size={image_size} is for images and these are embeddings; leave it out")
    if source.kind != "embeddings" and image_size is None:
        raise ConfigError(
            "images may be of any size and shards hold one; give it as --size, in pixels, the recipe's image.size"
        )
