"""From a path or a name to a source of images; a path that cannot be used is refused here, in under a second."""

import os
from pathlib import Path

from spice_ray.errors import DataError
from spice_ray.readers.digits import DigitsSource
from spice_ray.readers.folder import FolderSource, has_images, list_images
from spice_ray.readers.parquet import open_parquet
from spice_ray.readers.records import Chunk, Record, Source, Unreadable, read_chunk

__all__ = ["Chunk", "Record", "Source", "Unreadable", "open_source", "read_chunk"]

_KINDS = "give a folder of images, a Parquet file, a folder of Parquet files or the word digits"


def open_source(path: str, labels_from_folders: bool = False) -> Source:
    """Find out what ``path`` is.

    Args:
        path: A folder of images, a Parquet file, a folder of Parquet files, or the word ``digits`` for the bundled
            handwritten digits (a folder of that name is ``./digits``). A folder with images anywhere is an image
            folder, whatever else it holds.
        labels_from_folders: Take the name of an image's parent folder for its label; image folders alone.

    Raises:
        DataError: There is nothing that can be read; one sentence says what was found and what is needed.
    """
    if path == "digits":
        return DigitsSource()
    if "://" in path:
        raise DataError(f"{path} is a URL, which is not supported yet; give a mounted path or a local copy")
    if not os.path.exists(path):
        raise DataError(f"{path or 'an empty path'} does not exist; {_KINDS}")
    location = Path(path)
    if location.is_dir():
        return _open_folder(location, labels_from_folders)
    return _open_file(location)


def _open_folder(folder: Path, labels_from_folders: bool) -> Source:
    if has_images(folder):
        return FolderSource(folder, labels_from_folders)
    tables = sorted(file for file in folder.glob("*.parquet") if file.is_file() and not file.name.startswith("."))
    if tables:
        return open_parquet(tables)
    others = list_images(folder).num_others
    if others == 0:
        raise DataError(f"the folder {folder} is empty; {_KINDS}")
    raise DataError(f"the folder {folder} holds no image, only {others} other files; {_KINDS}")


def _open_file(file: Path) -> Source:
    if file.suffix.lower() != ".parquet":
        raise DataError(f"{file} is neither a folder nor a .parquet file; {_KINDS}")
    return open_parquet([file])
