"""Files that pack many rows of one shape: the binary layouts of benchmarks, and NumPy arrays."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from spice_ray.errors import DataError
from spice_ray.readers.files import Found, ask_each, digest_files, file_size
from spice_ray.readers.places import Place, explain
from spice_ray.readers.records import Chunk, Record, Unreadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A file that can only be loaded whole is loaded this often at most, however small the chunks; from a server, once.
_MAX_RANGES_OF_WHOLE_FILE = 8
_log = logging.getLogger(__name__)

Row = tuple["NDArray[np.uint8] | NDArray[np.float32] | Unreadable", int | None]


class Packing(Protocol):
    """How one kind of file holds its rows; small and picklable."""

    @property
    def loads_whole_files(self) -> bool:
        """Whether a range of rows costs as much memory and time as the whole file."""
        ...

    def num_rows(self, file: Found) -> int:
        """How many rows the file holds.

        Raises:
            DataError: The file cannot be used at all.
            OSError: It cannot be read.
        """
        ...

    def rows(self, place: Place, start: int, stop: int) -> Iterator[Row]:
        """Data and label of the rows ``start`` to ``stop`` - 1.

        Raises:
            DataError: The file is not what ``num_rows`` saw.
            OSError: It cannot be read.
        """
        ...


@dataclass(frozen=True)
class PackedFile:
    """A file of rows; row 17 is called ``prefix`` and 17, filled with zeros to ``digits``."""

    found: Found
    split: str
    prefix: str
    digits: int = 0


@dataclass(frozen=True)
class PackedChunk:
    """Rows ``start`` to ``stop`` - 1 of one file."""

    packing: Packing
    file: PackedFile
    first_row: int
    """Number of the file's first row among those of the same prefix."""
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """How many rows the chunk holds."""
        return self.stop - self.start

    def read(self) -> Iterator[Record]:
        """Every row; when the file fails, each row not yet read carries the reason."""
        row = self.start
        try:
            for data, label in self.packing.rows(self.file.found.place, self.start, self.stop):
                yield self._record(row, label, data)
                row += 1
        except (OSError, DataError) as error:
            # The file was sound when the source was opened: its rows are listed with the reason, other files go on.
            detail = explain(error) if isinstance(error, OSError) else "it has changed since the start"
            for lost in range(row, self.stop):
                yield self._record(lost, None, Unreadable(f"the file of this row cannot be read: {detail}"))

    def _record(
        self, row: int, label: int | None, data: "NDArray[np.uint8] | NDArray[np.float32] | Unreadable"
    ) -> Record:
        return Record(f"{self.file.prefix}{self.first_row + row:0{self.file.digits}d}", self.file.split, label, data)


@dataclass(frozen=True)
class PackedSource:
    """One packed file or several of one kind; nothing but their headers is read before a chunk is."""

    kind: str
    packing: Packing
    files: tuple[PackedFile, ...]
    labels_known: bool
    published: Mapping[str, int] = field(default_factory=dict)
    """Images per split as published, where this is a benchmark; other numbers are only warned of."""

    @cached_property
    def _file_rows(self) -> tuple[int, ...]:
        """The number of rows of each file, found once."""
        files = [file.found for file in self.files]
        num_rows = tuple(ask_each(self._num_rows, files, on_server=bool(files[0].place.server)))
        found = Counter[str]()
        for file, rows in zip(self.files, num_rows, strict=True):
            found[file.split] += rows
        if found.total() == 0:
            raise DataError(f"{files[0].place} holds no rows; give a file with at least one")
        if self.published and dict(found) != self.published:
            _log.warning(
                "%s: the folder holds %s images, published are %s; scores will not be comparable",
                self.kind,
                _counts(found),
                _counts(self.published),
            )
        return num_rows

    def checked(self) -> "PackedSource":
        """This source, after a look at each file's header.

        Raises:
            DataError: A file cannot be used, or there is no row at all.
        """
        _ = self._file_rows
        return self

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the files that hold the rows."""
        return digest_files(self.kind, [file.found for file in self.files])

    def encoded_bytes(self) -> None:
        """None: the rows are plain numbers and no encoded files, which shards could hold as they are."""
        return None

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The rows in chunks that never cross a file.

        Raises:
            DataError: A file cannot be used, or there is no row at all.
        """
        chunks: list[Chunk] = []
        first = Counter[str]()
        for file, rows in zip(self.files, self._file_rows, strict=True):
            max_ranges = 1 if file.found.place.server else _MAX_RANGES_OF_WHOLE_FILE
            least = -(-rows // max_ranges) if self.packing.loads_whole_files else 1
            share = max(rows_per_chunk, least)
            for start in range(0, rows, share):
                chunks.append(PackedChunk(self.packing, file, first[file.prefix], start, min(start + share, rows)))
            first[file.prefix] += rows
        return chunks

    def _num_rows(self, file: Found) -> int:
        try:
            return self.packing.num_rows(file)
        except OSError as error:
            raise DataError(
                f"{file.place} cannot be read ({explain(error)}); make it readable or unpack it again"
            ) from None


def whole_rows(file: Found, row_bytes: int, title: str) -> int:
    """How many rows of ``row_bytes`` a file holds, by its size.

    Args:
        file: The file.
        row_bytes: Length of a row, > 0.
        title: The benchmark whose images the rows are.

    Raises:
        DataError: Its size is no multiple of a row.
        OSError: A server does not say how large it is.
    """
    size = file_size(file)
    if size % row_bytes:
        raise DataError(
            f"{file.place} has {size} bytes, which is not a multiple of the {row_bytes} of one {title} image: it is "
            "truncated or another file; unpack the archive again"
        )
    return size // row_bytes


def _counts(images: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {split}" for split, number in images.items())
