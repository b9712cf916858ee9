"""CIFAR-10 and CIFAR-100 as published: the pickled batches of the Python version, and CIFAR-10's binary version.

A row is 3072 bytes: 1024 of red, then green, then blue, each 32 rows of 32 pixels. CIFAR-100 carries its 20
superclasses as labels (the ``coarse`` ones), which is what the paper calls CIFAR-100-20.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.files import Found, read_rows
from spice_ray.readers.packed import PackedFile, PackedSource, Packing, Row, whole_rows
from spice_ray.readers.pickled_arrays import load_pickled
from spice_ray.readers.places import Place
from spice_ray.readers.records import TEST, TRAIN
from spice_ray.readers.tree import Tree

_SIDE = 32
_ROW_BYTES = 3 * _SIDE**2
_PUBLISHED = {TRAIN: 50_000, TEST: 10_000}
_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")


@dataclass(frozen=True)
class BinaryCifar10:
    """Rows of one byte of label and 3072 of pixels."""

    num_classes = 10
    loads_whole_files = False

    def num_rows(self, file: Found) -> int:
        """How many images the file holds.

        Raises:
            DataError: Its size is no multiple of a row, or a label is none of CIFAR-10's.
        """
        rows = whole_rows(file, 1 + _ROW_BYTES, "CIFAR-10")
        labels = [piece[:, 0].copy() for piece in self._pieces(file.place, 0, rows)]
        if labels:
            _check_labels(file.place, np.concatenate(labels), self.num_classes)
        return rows

    def rows(self, place: Place, start: int, stop: int) -> Iterator[Row]:
        """The images as uint8 RGB, (32, 32, 3), with labels 0 to 9."""
        for piece in self._pieces(place, start, stop):
            for row in piece:
                yield _image(row[1:]), int(row[0])

    def _pieces(self, place: Place, start: int, stop: int) -> Iterator[NDArray[np.uint8]]:
        row_bytes = 1 + _ROW_BYTES
        for piece in read_rows(place, start * row_bytes, row_bytes, stop - start):
            yield np.frombuffer(piece, np.uint8).reshape(-1, row_bytes)


@dataclass(frozen=True)
class PickledCifar:
    """A pickled dictionary of uint8 pixels (N, 3072) under ``data`` and N labels under ``label_key``."""

    label_key: bytes
    num_classes: int
    loads_whole_files = True

    def num_rows(self, file: Found) -> int:
        """How many images the file holds.

        Raises:
            DataError: It is not such a dictionary, or holds anything beside plain data.
        """
        return len(self._load(file.place)[0])

    def rows(self, place: Place, start: int, stop: int) -> Iterator[Row]:
        """The images as uint8 RGB, (32, 32, 3), with labels 0 to ``num_classes`` - 1."""
        pixels, labels = self._load(place)
        if len(pixels) < stop:
            raise DataError(f"{place} has become shorter; unpack the archive again")
        for row in range(start, stop):
            yield _image(pixels[row]), labels[row]

    def _load(self, place: Place) -> tuple[NDArray[np.uint8], list[int]]:
        batch = load_pickled(place)
        pixels, labels = (batch.get(b"data"), batch.get(self.label_key)) if isinstance(batch, dict) else (None, None)
        if not (isinstance(pixels, np.ndarray) and pixels.shape[1:] == (_ROW_BYTES,)) or not _are_integers(labels):
            raise DataError(
                f"{place} is not a CIFAR batch with uint8 data (N, {_ROW_BYTES}) and a list {self.label_key.decode()}; "
                "unpack the archive again"
            )
        if len(pixels) != len(labels):
            raise DataError(f"{place} holds {len(pixels)} images but {len(labels)} labels; unpack the archive again")
        _check_labels(place, np.array(labels), self.num_classes)
        return pixels, labels


class _Layout(NamedTuple):
    kind: str
    title: str
    packing: Packing
    train: tuple[str, ...]
    test: str
    names: str


_BINARY_BATCHES = tuple(f"{name}.bin" for name in _BATCHES)
_LAYOUTS = (
    _Layout("cifar10", "CIFAR-10", PickledCifar(b"labels", 10), _BATCHES, "test_batch", "batches.meta"),
    _Layout(
        "cifar10", "CIFAR-10's binary version", BinaryCifar10(), _BINARY_BATCHES, "test_batch.bin", "batches.meta.txt"
    ),
    _Layout("cifar100", "CIFAR-100", PickledCifar(b"coarse_labels", 20), ("train",), "test", "meta"),
)


def open_cifar(folder: Tree) -> PackedSource | None:
    """A source of CIFAR-10 or CIFAR-100 where ``folder`` holds one of their published layouts.

    Images are called cifar10/train/00017 and so on, in published order, equally in both versions of CIFAR-10.

    Raises:
        DataError: It does, but a file is missing.
    """
    for layout in _LAYOUTS:
        if folder.looks_like((*layout.train, layout.test, layout.names)):
            return _open(folder, layout)
    return None


def _open(folder: Tree, layout: _Layout) -> PackedSource:
    *train, test = folder.require((*layout.train, layout.test), layout.title)
    splits = [(file, TRAIN) for file in train] + [(test, TEST)]
    files = tuple(PackedFile(file, split, f"{layout.kind}/{split}/", 5) for file, split in splits)
    return PackedSource(layout.kind, layout.packing, files, labels_known=True, published=_PUBLISHED)


def _image(row: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # Copied, so that no record keeps a whole file alive.
    return np.ascontiguousarray(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0))


def _are_integers(labels: object) -> TypeGuard[list[int]]:
    return isinstance(labels, list) and all(type(label) is int for label in labels)


def _check_labels(place: Place, labels: NDArray[np.integer], num_classes: int) -> None:
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise DataError(
            f"{place} holds labels {labels.min()} to {labels.max()} instead of 0 to {num_classes - 1}; "
            "unpack the archive again"
        )
