"""What every reader yields: records of raw image data, in chunks that a worker can read on its own."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAIN, TEST, UNLABELED = "train", "test", "unlabeled"
SPLIT_FOLDERS = {"train": TRAIN, "test": TEST, "val": TEST, "unlabeled": UNLABELED}


@dataclass(frozen=True)
class Unreadable:
    """Stands for the data of an image that could not be fetched."""

    reason: str


@dataclass(frozen=True)
class Record:
    """One image, or one embedding, as its container holds it.

    ``label`` is for the Labels artifact alone; None where it is not known.
    """

    source: str
    split: str
    label: str | int | None
    data: "bytes | NDArray[np.uint8] | NDArray[np.float32] | Unreadable"
    """Encoded bytes; or pixels, uint8, grey (H, W) or (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4); or, from a source of
    the kind embeddings, float32 (D,); or why there is nothing."""


class Chunk(Protocol):
    """Some rows of a source: small, picklable, and enough to read them in another process."""

    @property
    def num_rows(self) -> int | None:
        """How many records ``read`` yields; None where that is known only by reading, as of an archive."""
        ...

    def read(self) -> Iterator[Record]:
        """Every record of the chunk; one that cannot be fetched carries the reason instead of data.

        Raises:
            DataError: The chunk holds something that must not be used at all.
        """
        ...


class Source(Protocol):
    """A collection of images that was found and looks readable; nothing of it is decoded yet."""

    @property
    def kind(self) -> str:
        """digits, folder, parquet, list, tar, a benchmark's name, array or embeddings."""
        ...

    @property
    def labels_known(self) -> bool:
        """Whether records may carry a label."""
        ...

    def listing_digest(self) -> str:
        """32 hex digits over names, sizes and modification times, without reading any content.

        It names the images alone: labels that come from the names of folders have no part in it.
        """
        ...

    def encoded_bytes(self) -> int | None:
        """The size of all files together; None where it is not known without reading them or asking for each."""
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


def split_of_folder(name: str) -> str | None:
    """The split that the first-level folder train, test, val or unlabeled gives; ``name`` is relative, with slashes."""
    first, nested, _ = name.partition("/")
    return SPLIT_FOLDERS.get(first) if nested else None


def split_of_container(name: str) -> str:
    """The split of all images in a file: by its first-level folder, else by such a word in its own name."""
    by_folder = split_of_folder(name)
    if by_folder is not None:
        return by_folder
    words = set(re.findall("[a-z]+", name.rpartition("/")[2].lower()))
    if words & {"unlabeled", "unlabelled"}:
        return UNLABELED
    return TEST if words & {"test", "val", "valid", "validation"} else TRAIN
