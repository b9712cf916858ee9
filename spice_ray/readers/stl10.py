"""STL-10 in its published binary layout: 96 x 96 RGB images, column after column, one channel after the other."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.files import Found, read_rows, read_whole
from spice_ray.readers.packed import PackedFile, PackedSource, Row, whole_rows
from spice_ray.readers.places import Place
from spice_ray.readers.records import TEST, TRAIN, UNLABELED
from spice_ray.readers.tree import Tree

_SIDE = 96
_ROW_BYTES = 3 * _SIDE**2
_NUM_CLASSES = 10
_IMAGES = {TRAIN: "train_X.bin", TEST: "test_X.bin", UNLABELED: "unlabeled_X.bin"}
_LABELS = {"train_X.bin": "train_y.bin", "test_X.bin": "test_y.bin"}
_PUBLISHED = {TRAIN: 5_000, TEST: 8_000, UNLABELED: 100_000}


@dataclass(frozen=True)
class Stl10:
    """Rows of 27,648 bytes; labels 1 to 10, one byte each, in a file beside it."""

    loads_whole_files = False

    def num_rows(self, file: Found) -> int:
        """How many images the file holds.

        Raises:
            DataError: Its size is no multiple of a row, or its labels are of another number or out of range.
        """
        place, rows = file.place, whole_rows(file, _ROW_BYTES, "STL-10")
        labels = _labels(place)
        if labels is not None and len(labels) != rows:
            raise DataError(f"{place} holds {rows} images but {len(labels)} labels are beside it; unpack both again")
        if labels is not None and rows and not (labels.min() >= 1 and labels.max() <= _NUM_CLASSES):
            raise DataError(
                f"the labels beside {place} are {labels.min()} to {labels.max()} instead of 1 to {_NUM_CLASSES}; "
                "unpack the archive again"
            )
        return rows

    def rows(self, place: Place, start: int, stop: int) -> Iterator[Row]:
        """The images as uint8 RGB, (96, 96, 3), with labels 1 to 10 or None.

        Some images are read at a time: a mapped file that shrinks would end the process without a word.
        """
        labels = _labels(place)
        if labels is not None and len(labels) < stop:
            raise DataError(f"the labels beside {place} have become fewer; unpack the archive again")
        row = start
        for piece in read_rows(place, start * _ROW_BYTES, _ROW_BYTES, stop - start):
            for image in np.frombuffer(piece, np.uint8).reshape(-1, 3, _SIDE, _SIDE):
                # Stored as (channel, column, row).
                yield np.ascontiguousarray(image.transpose(2, 1, 0)), None if labels is None else int(labels[row])
                row += 1


def open_stl10(folder: Tree) -> PackedSource | None:
    """A source of STL-10 where ``folder`` holds its binary files; images are called stl10/train/00017 and so on.

    Raises:
        DataError: It does, but one of the five files is missing.
    """
    names = (*_IMAGES.values(), *_LABELS.values())
    if not folder.looks_like(names):
        return None
    found = folder.require(names, "STL-10")
    files = tuple(PackedFile(file, split, f"stl10/{split}/", 5) for split, file in zip(_IMAGES, found, strict=False))
    return PackedSource("stl10", Stl10(), files, labels_known=True, published=_PUBLISHED)


def _labels(place: Place) -> NDArray[np.uint8] | None:
    beside = _LABELS.get(place.name)
    return None if beside is None else np.frombuffer(read_whole(place.parent / beside), np.uint8)
