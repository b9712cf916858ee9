"""NumPy's .npy files, local ones mapped and of those on servers only the rows that are asked for fetched.

N rows; and the N labels that may lie beside a file.
"""

import io
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers import remote
from spice_ray.readers.files import Found, find, open_input, read_rows
from spice_ray.readers.packed import PackedFile, PackedSource, Row
from spice_ray.readers.places import Place, explain
from spice_ray.readers.records import split_of_container

# NumPy refuses longer ones: a header is evaluated.
_MAX_HEADER_BYTES = 10_000 + 12
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_log = logging.getLogger(__name__)


class NpyFile(NamedTuple):
    """What the header of a .npy file says."""

    place: Place
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    first_byte: int
    """Of the numbers."""

    def __str__(self) -> str:
        return f"{self.dtype.name} of shape {self.shape}"

    def rows(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Rows ``start`` to ``stop`` - 1, some of them in memory at a time; copy those that are to be kept.

        Raises:
            DataError: The file is not as long any more.
            OSError: It cannot be read.
        """
        if self.place.server:
            row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
            for piece in read_rows(self.place, self.first_byte + start * row_bytes, row_bytes, stop - start):
                yield from np.frombuffer(piece, self.dtype).reshape(-1, *self.shape[1:])
        else:
            mapped: NDArray[Any] = np.memmap(
                self.place.path, self.dtype, "r", self.first_byte, self.shape, order="F" if self.is_fortran else "C"
            )
            yield from mapped.view(np.ndarray)[start:stop]


@dataclass(frozen=True)
class NpyRows:
    """How a .npy file holds images or embeddings, with labels (N,) in another one, it may be."""

    check: Callable[[NpyFile], None]
    """Raises DataError where the header is not one of such rows."""
    convert: Callable[[NDArray[Any], NpyFile], Any]
    """A copy of a row as a record holds it, or why it cannot be used."""
    labels: Place | None
    loads_whole_files = False

    def num_rows(self, file: Found) -> int:
        """N.

        Raises:
            DataError: The file holds something else, or the labels beside it do not fit.
        """
        array, _ = self._opened(file.place)
        return array.shape[0]

    def rows(self, place: Place, start: int, stop: int) -> Iterator[Row]:
        """What ``convert`` makes of the rows, with their labels."""
        array, labels = self._opened(place)
        if array.shape[0] < stop:
            raise DataError(f"{place} has become shorter; write it again")
        known: Iterator[int | None] = itertools.repeat(None, stop - start)
        if labels is not None:
            known = map(_known_label, labels.rows(start, stop))
        for row, label in zip(array.rows(start, stop), known, strict=True):
            yield self.convert(row, array), label

    def _opened(self, place: Place) -> tuple[NpyFile, NpyFile | None]:
        array = open_npy(place)
        self.check(array)
        labels = None if self.labels is None else open_npy(self.labels)
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != array.shape[:1]):
            raise DataError(
                f"{self.labels} holds {labels}, needed are integers of shape ({array.shape[0]},), one for each row of "
                f"{place.name}; write it again or move it away"
            )
        return array, labels


def open_npy(place: Place) -> NpyFile:
    """Read the header of a .npy file.

    Raises:
        DataError: It is not a .npy file, holds pickled objects, or is shorter than its header says; or it is in Fortran
            order on a server.
        OSError: It cannot be read.
    """
    with remote.reporting() if place.server else nullcontext(), open_input(place) as file:
        size, head = file.size(), io.BytesIO(file.read(min(file.size(), _MAX_HEADER_BYTES)))
        if place.is_web:
            # A server that gives no parts of a file is met here, and not when its rows are read.
            file.seek(max(0, size - 1))
            file.read(1)
    try:
        shape, is_fortran, dtype = _HEADERS[np.lib.format.read_magic(head)](head)
        whole = dtype.itemsize * math.prod(shape) <= size - head.tell()
        if dtype.hasobject or min(shape, default=0) < 0 or not whole:
            raise ValueError
    except Exception as error:
        # A hostile or damaged header makes NumPy fail in nearly any way.
        raise DataError(
            f"{place} is not a whole .npy file of plain numbers ({type(error).__name__}); "
            "write it again with numpy.save and without objects"
        ) from None
    if is_fortran and place.server:
        raise DataError(
            f"{place} is on a server and in Fortran order, in which the numbers of a row lie scattered over the file; "
            "save numpy.ascontiguousarray of it, or make a local copy"
        )
    return NpyFile(place, dtype, shape, is_fortran, head.tell())


def npy_header(place: Place) -> NpyFile:
    """The header of a .npy file.

    Raises:
        DataError: As ``open_npy``, and where it cannot be read.
    """
    try:
        return open_npy(place)
    except OSError as error:
        raise DataError(f"{place} cannot be read ({explain(error)}); make it readable") from None


def open_rows(kind: str, file: Found, name: str, rows: NpyRows) -> PackedSource:
    """A source of the rows of one file; row 17 of x.npy is called x.npy#17.

    Raises:
        DataError: It holds something else, no rows, or labels that do not fit.
    """
    packed = PackedFile(file, split_of_container(name), f"{name}#")
    return PackedSource(kind, rows, (packed,), labels_known=rows.labels is not None).checked()


def find_labels(file: Place) -> Place | None:
    """The X.labels.npy beside X.npy; None where there is none."""
    # The query of a web address is for one file alone.
    path = file.path.partition("?")[0] if file.is_web else file.path
    beside = replace(file, path=os.path.splitext(path)[0] + ".labels.npy")
    try:
        found = find(beside)
    except DataError as error:
        # Many servers refuse to say whether there is a file, where there is none. Labels are for scores alone.
        _log.warning("no labels are read for %s: %s", file, error)
        return None
    return None if found is None or found.is_folder else beside


def _known_label(label: NDArray[np.integer]) -> int | None:
    """None where the label is withheld: -1, as data sets usually have it."""
    return None if label < 0 else int(label)
