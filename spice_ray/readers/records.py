"""What every reader yields: records of raw image data, in chunks that a worker can read on its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAIN, TEST, UNLABELED = "train", "test", "unlabeled"


@dataclass(frozen=True)
class Unreadable:
    """Stands for the data of an image that could not be fetched."""

    reason: str


@dataclass(frozen=True)
class Record:
    """One image as its container holds it.

    ``label`` is for the Labels artifact alone; None where it is not known.
    """

    source: str
    split: str
    label: str | int | None
    data: "bytes | NDArray[np.uint8] | Unreadable"
    """Encoded bytes, or a grey image uint8 (H, W), or why there is neither."""


class Chunk(Protocol):
    """Some rows of a source: small, picklable, and enough to read them in another process."""

    @property
    def num_rows(self) -> int:
        """How many records ``read`` yields."""
        ...

    def read(self) -> Iterator[Record]:
        """Every record of the chunk; one that cannot be fetched carries the reason instead of data."""
        ...


class Source(Protocol):
    """A collection of images that was found and looks readable; nothing of it is decoded yet."""

    @property
    def kind(self) -> str:
        """digits, folder or parquet."""
        ...

    @property
    def labels_known(self) -> bool:
        """Whether records may carry a label."""
        ...

    def listing_digest(self) -> str:
        """32 hex digits over names, sizes and modification times, without reading any content."""
        ...

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The whole source in chunks of about ``rows_per_chunk`` records.

        Raises:
            DataError: A part of the source cannot be used at all.
        """
        ...


def read_chunk(chunk: Chunk) -> Iterator[Record]:
    """Every record of ``chunk``, read in the process that calls this."""
    return chunk.read()
