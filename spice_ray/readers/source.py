"""From a path or a name to a source of images; what cannot be used is refused here, in a second or two."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from spice_ray.errors import DataError
from spice_ray.readers.arrays import open_array
from spice_ray.readers.benchmarks import open_benchmark, open_subset
from spice_ray.readers.digits import DigitsSource
from spice_ray.readers.embeddings import holds_embeddings, open_embeddings
from spice_ray.readers.files import Found, expand, find, has_wildcard
from spice_ray.readers.folder import Entry, FolderSource, walk
from spice_ray.readers.listfile import find_path_column, open_parquet_list, open_text_list
from spice_ray.readers.parquet import find_image_column, open_parquet, read_metadata
from spice_ray.readers.places import Place, place_of
from spice_ray.readers.records import Chunk, Record, Source, Unreadable, read_chunk
from spice_ray.readers.synset_folders import SUBSETS
from spice_ray.readers.tar import ARCHIVE_SUFFIXES, open_tar
from spice_ray.readers.tree import Tree
from spice_ray.readers.vector_tables import VECTOR_COLUMNS, vector_columns

__all__ = ["Chunk", "Record", "Source", "Unreadable", "open_source", "read_chunk"]

_KINDS = (
    "give a folder of images, Parquet files, tar archives, a list of images (.txt), an array (.npy) or the word digits"
)
_TABLE = ".parquet"


class _Contents(NamedTuple):
    """What a folder without images holds."""

    tables: list[Found]
    archives: list[Found]
    num_files: int


def open_source(path: str, labels_from_folders: bool = False) -> Source:
    """Find out what ``path`` is.

    Args:
        path: One of

            - a folder of images, nested or not; a folder with images anywhere is one, whatever else it holds;
            - a Parquet file with encoded images, with embeddings, or with a column of paths or URLs; or several of the
              first two kinds: a folder of them, or a pattern such as ``data/train-*.parquet``;
            - a tar archive of images, or several: a folder or a pattern, as with Parquet;
            - a text file (.txt) with one path or URL on each line;
            - a .npy array of images or of embeddings;
            - the folder of a benchmark as it is published (see ``benchmarks``), or a part of ImageNet by its name:
              ``imagenet10:FOLDER`` and ``imagenet_dog:FOLDER``;
            - the word ``digits`` for the bundled handwritten digits (a folder of that name is ``./digits``).

            All but the digits may be on a server: s3://bucket/folder, or any URL that pyarrow or fsspec opens. A web
            server lists no folders, so that http:// and https:// are for single files; Parquet and arrays of more than
            a few megabytes need one that gives parts of a file.
        labels_from_folders: Take the name of an image's parent folder for its label; image folders alone.

    Raises:
        DataError: There is nothing that can be read; one sentence says what was found and what is needed.
    """
    if path == "digits":
        return DigitsSource()
    if not path:
        raise DataError(f"an empty path does not exist; {_KINDS}")
    subset, _, folder = path.partition(":")
    if subset in SUBSETS:
        return open_subset(subset, folder)
    place = place_of(path)
    found = find(place)
    if found is None:
        return _open_pattern(place)
    return _open_folder(place, path, labels_from_folders) if found.is_folder else _open_files([found])


def _open_pattern(place: Place) -> Source:
    if not has_wildcard(place):
        raise DataError(f"{place} does not exist; {_KINDS}")
    files = expand(place)
    if not files:
        raise DataError(f"no file matches {place}; {_KINDS}")
    return _open_files(files)


def _open_folder(folder: Place, path: str, labels_from_folders: bool) -> Source:
    # A server is asked once for all that is in a folder.
    entries = tuple(walk(folder)) if folder.server else None
    benchmark = open_benchmark(Tree(folder, entries))
    if benchmark is not None:
        return benchmark
    contents = _contents(folder, walk(folder) if entries is None else entries)
    if contents is None:
        return FolderSource(path if folder.server else folder.path, labels_from_folders, entries)
    if contents.tables and contents.archives:
        raise DataError(
            f"the folder {folder} holds Parquet files and tar archives; give a pattern such as {folder}/*.parquet"
        )
    files = contents.tables or contents.archives
    if files:
        return _open_files(sorted(files, key=lambda file: file.place.path))
    if contents.num_files == 0:
        raise DataError(f"the folder {folder} is empty; {_KINDS}")
    raise DataError(f"the folder {folder} holds no image, only {contents.num_files} other files; {_KINDS}")


def _contents(folder: Place, entries: Iterable[Entry]) -> _Contents | None:
    """What is in a folder; None as soon as there is an image."""
    tables, archives, num_files = list[Found](), list[Found](), 0
    for name, kind, size, mtime_ns in entries:
        if kind == "image":
            return None
        num_files += kind == "other"
        lower = name.lower()
        same_kind = tables if lower.endswith(_TABLE) else archives if lower.endswith(ARCHIVE_SUFFIXES) else None
        # Without a size it is a broken link or a pipe.
        if same_kind is not None and size is not None:
            same_kind.append(Found(folder / name, False, size, mtime_ns))
    return _Contents(tables, archives, num_files)


def _open_files(files: Sequence[Found]) -> Source:
    openers = {_opener(file.place.name.lower()) for file in files}
    if len(openers) > 1:
        raise DataError(f"{files[0].place} and the other files are of several kinds; give files of one kind")
    opener = openers.pop()
    if opener is None:
        raise DataError(f"{files[0].place} is neither a folder nor a file of a kind that is read; {_KINDS}")
    return opener(files)


def _opener(name: str) -> Callable[[Sequence[Found]], Source] | None:
    if name.endswith(_TABLE):
        return _open_tables
    if name.endswith(ARCHIVE_SUFFIXES):
        return open_tar
    return {".txt": _open_list, ".npy": _open_arrays}.get(PurePosixPath(name).suffix)


def _open_tables(files: Sequence[Found]) -> Source:
    schema = read_metadata(files[0].place)[1]
    if find_image_column(schema) is not None:
        return open_parquet(files)
    vectors, paths = vector_columns(schema), find_path_column(schema)
    # A list of images may have boxes or scores beside the paths: only by their name such are embeddings.
    if vectors and (paths is None or vectors[0] in VECTOR_COLUMNS):
        return open_embeddings(files)
    if paths is not None:
        return open_parquet_list(_single(files), schema)
    # It says what is missing.
    return open_parquet(files)


def _open_list(files: Sequence[Found]) -> Source:
    return open_text_list(_single(files))


def _open_arrays(files: Sequence[Found]) -> Source:
    # A pattern catches the labels beside an array too.
    files = [file for file in files if not file.place.name.endswith(".labels.npy")] or files
    return open_embeddings(files) if holds_embeddings(files[0]) else open_array(_single(files))


def _single(files: Sequence[Found]) -> Found:
    if len(files) > 1:
        raise DataError(f"{files[0].place} is one of {len(files)} files of its kind, of which one is read; give one")
    return files[0]
