"""Lists of images: a text file with a path or URL on each line, or a Parquet file with a column of them."""

import codecs
import hashlib
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from spice_ray.errors import DataError
from spice_ray.readers.columns import LABEL_COLUMN, columns_beside, is_text, rows_beside, text_or_number, value_type
from spice_ray.readers.files import Found, open_input, read_file, read_files, stamp
from spice_ray.readers.places import Place, explain, is_url, place_of, printable, without_user
from spice_ray.readers.records import TRAIN, Chunk, Record, Unreadable, split_of_folder

PATH_COLUMNS = ("path", "paths", "url", "urls", "file")
_NO_PATH = Unreadable("the row names no file")


class Item(NamedTuple):
    """One line or row of a list."""

    text: str
    """Path or URL as it is written."""
    split: str
    label: str | int | None
    fault: Unreadable | None = None
    """Why the image is not even looked for."""


@dataclass(frozen=True)
class ListChunk:
    """Some items of a list."""

    folder: Place
    """Of the list; relative paths begin here."""
    first_row: int
    items: tuple[Item, ...]

    @property
    def num_rows(self) -> int:
        """How many items the chunk holds."""
        return len(self.items)

    def read(self) -> Iterator[Record]:
        """The bytes of each file; one that cannot be fetched carries the reason."""
        contents = read_files([_place(self.folder, item.text) for item in self.items if item.fault is None])
        for row, item in enumerate(self.items, self.first_row):
            data = next(contents) if item.fault is None else item.fault
            yield Record(_shown(item.text) or f"row {row}", item.split, item.label, data)


@dataclass(frozen=True)
class ListSource:
    """Images by their paths and URLs; a first-level folder in a relative path is a split where the list names none."""

    folder: Place
    items: tuple[Item, ...]
    labels_known: bool
    kind: str = "list"

    @cached_property
    def _stats(self) -> tuple[str, int | None]:
        """The listing digest, and the size of all files where that is known."""
        digest, size, all_known = hashlib.blake2b(self.kind.encode(), digest_size=16), 0, True
        for item in self.items:
            digest.update(f"{item.split}\0".encode())
            place = None if item.fault is not None else _place(self.folder, item.text)
            if place is None or place.server:
                # A server is not asked for every file.
                all_known = all_known and place is None
                digest.update(os.fsencode(item.text) + b"\0")
                continue
            found = _local_stat(place.path)
            size += found[0] or 0
            digest.update(stamp(item.text, *found))
        return digest.hexdigest(), size if all_known else None

    def listing_digest(self) -> str:
        """32 hex digits over paths, URLs and splits, and sizes and modification times of the local files."""
        return self._stats[0]

    def encoded_bytes(self) -> int | None:
        """The sizes of all files together; None where one is on a server."""
        return self._stats[1]

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The items in chunks of at most ``rows_per_chunk``."""
        starts = range(0, len(self.items), rows_per_chunk)
        return [ListChunk(self.folder, start, self.items[start : start + rows_per_chunk]) for start in starts]


def open_text_list(file: Found) -> ListSource:
    """A source of the images in a text file: one path or URL per line.

    Blank lines and those that begin with # do not count.

    Raises:
        DataError: The file cannot be read, is not text, or names nothing.
    """
    data = read_file(file.place)
    if isinstance(data, Unreadable):
        raise DataError(f"the list {file.place} cannot be used, {data.reason}; give a readable list")
    if b"\0" in data:
        raise DataError(f"the list {file.place} is not text; give one path or URL per line")
    # File names need not be UTF-8: what is not comes through as it is.
    lines = (os.fsdecode(line.strip()) for line in data.removeprefix(codecs.BOM_UTF8).splitlines())
    items = [Item(line, _path_split(line), None) for line in lines if line and not line.startswith("#")]
    return _source(file.place, items, labels_known=False)


def open_parquet_list(file: Found, schema: pa.Schema) -> ListSource:
    """A source of the images in a Parquet file with a column of paths or URLs.

    Args:
        file: The Parquet file.
        schema: Its schema; ``find_path_column`` finds a column in it.

    Raises:
        DataError: The file cannot be read, names nothing, or has a label or a split of a type that it cannot have.
    """
    column = find_path_column(schema)
    assert column is not None, schema
    beside = columns_beside(schema, file.place)
    try:
        with open_input(file.place) as input_, pq.ParquetFile(input_, pre_buffer=bool(file.place.server)) as opened:
            batches = opened.iter_batches(columns=[column, *beside])
            items = [item for batch in batches for item in _items(batch, column)]
    except Exception as error:
        # Storage libraries have errors of their own; all of them end here, with the reason.
        raise DataError(f"the list {file.place} cannot be read ({explain(error)}); write it again") from None
    return _source(file.place, items, labels_known=LABEL_COLUMN in beside)


def find_path_column(schema: pa.Schema) -> str | None:
    """The first column of paths or URLs, or None."""
    return next((name for name in PATH_COLUMNS if is_text(value_type(schema, name))), None)


def _source(file: Place, items: Iterable[Item], *, labels_known: bool) -> ListSource:
    source = ListSource(file.parent, tuple(items), labels_known)
    if not source.items:
        raise DataError(f"the list {file} names no file; give at least one path or URL")
    return source


def _items(batch: pa.RecordBatch, column: str) -> Iterator[Item]:
    for cell, beside in zip(batch.column(column), rows_beside(batch), strict=True):
        text = str(text_or_number(cell) or "").strip()
        item = Item(text, _path_split(text), beside.label, None if text else _NO_PATH)
        if isinstance(beside.split, Unreadable):
            yield item._replace(fault=beside.split)
        else:
            yield item if beside.split is None else item._replace(split=beside.split)


def _place(folder: Place, text: str) -> Place:
    return place_of(text) if is_url(text) or os.path.isabs(text) else folder / text


def _path_split(text: str) -> str:
    if is_url(text) or os.path.isabs(text):
        return TRAIN
    return split_of_folder(posixpath.normpath(printable(text))) or TRAIN


def _shown(text: str) -> str:
    return without_user(text) if is_url(text) else printable(text)


def _local_stat(path: str) -> tuple[int | None, int | None]:
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        # Reading it will list it as a reject.
        return None, None
    return info.st_size, info.st_mtime_ns
