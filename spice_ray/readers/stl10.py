"""STL-10 in its published binary layout: 96 x 96 RGB images, column after column, one channel after the other."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.local import looks_like, require_files
from spice_ray.readers.packed import PackedFile, PackedSource, Row
from spice_ray.readers.records import TEST, TRAIN, UNLABELED

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

    def num_rows(self, path: str) -> int:
        """How many images the file holds.

        Raises:
            DataError: Its size is no multiple of a row, or its labels are of another number or out of range.
        """
        size = os.path.getsize(path)
        if size % _ROW_BYTES:
            raise DataError(
                f"{path} has {size} bytes, which is not a multiple of the {_ROW_BYTES} of one STL-10 image: it is "
                "truncated; unpack the archive again"
            )
        rows, labels = size // _ROW_BYTES, _labels(path)
        if labels is not None and len(labels) != rows:
            raise DataError(f"{path} holds {rows} images but {len(labels)} labels are beside it; unpack both again")
        if labels is not None and rows and not (labels.min() >= 1 and labels.max() <= _NUM_CLASSES):
            raise DataError(
                f"the labels beside {path} are {labels.min()} to {labels.max()} instead of 1 to {_NUM_CLASSES}; "
                "unpack the archive again"
            )
        return rows

    def rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        """The images as uint8 RGB, (96, 96, 3), with labels 1 to 10 or None.

        One image is read at a time: a mapped file that shrinks would end the process without a word.
        """
        labels = _labels(path)
        with open(path, "rb") as file:
            file.seek(start * _ROW_BYTES)
            for row in range(start, stop):
                data = file.read(_ROW_BYTES)
                if len(data) < _ROW_BYTES or (labels is not None and len(labels) <= row):
                    raise DataError(f"{path} has become shorter; unpack the archive again")
                yield _image(data), None if labels is None else int(labels[row])


def open_stl10(folder: Path) -> PackedSource | None:
    """A source of STL-10 where ``folder`` holds its binary files; images are called stl10/train/00017 and so on.

    Raises:
        DataError: It does, but one of the five files is missing.
    """
    names = (*_IMAGES.values(), *_LABELS.values())
    if not looks_like(folder, names):
        return None
    require_files(folder, names, "STL-10")
    files = tuple(PackedFile(str(folder / name), split, f"stl10/{split}/", 5) for split, name in _IMAGES.items())
    return PackedSource("stl10", Stl10(), files, labels_known=True, published=_PUBLISHED)


def _labels(path: str) -> NDArray[np.uint8] | None:
    folder, name = os.path.split(path)
    return np.fromfile(os.path.join(folder, _LABELS[name]), np.uint8) if name in _LABELS else None


def _image(data: bytes) -> NDArray[np.uint8]:
    # Stored as (channel, column, row).
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(3, _SIDE, _SIDE).transpose(2, 1, 0))
