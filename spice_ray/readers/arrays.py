"""Images in one NumPy array.

N images, H rows and W columns of pixels, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.local import row_prefix
from spice_ray.readers.npy import describe, has_labels, known_label, map_labels, map_npy
from spice_ray.readers.packed import PackedFile, PackedSource, Row
from spice_ray.readers.records import split_of_container

_CHANNELS = (1, 3, 4)
_CHANNELS_FIRST = (1, 3)
_NEEDED = (
    "needed are uint8 images of shape (N, H, W) or (N, H, W, C) with C = 1, 3 or 4, "
    "or embeddings in float16, float32 or float64 of shape (N, D)"
)


@dataclass(frozen=True)
class NpyImages:
    """A .npy file of images with, it may be, labels beside it."""

    loads_whole_files = False

    def num_rows(self, path: str) -> int:
        """N.

        Raises:
            DataError: The file holds something else, or the labels beside it do not fit.
        """
        images = _map_images(path)
        map_labels(Path(path), len(images))
        return len(images)

    def rows(self, path: str, start: int, stop: int) -> Iterator[Row]:
        """The images as uint8, (H, W) or (H, W, C), with their labels."""
        images = _map_images(path)
        labels = map_labels(Path(path), len(images))
        if len(images) < stop:
            raise DataError(f"{path} has become shorter; write it again")
        for row in range(start, stop):
            # Copied, so that no record keeps the file mapped.
            yield np.array(images[row], order="C"), known_label(labels, row)


def open_array(file: Path) -> PackedSource:
    """A source of the images in a .npy file; row 17 of x.npy is called x.npy#17, and all are split train.

    Args:
        file: uint8, (N, H, W), (N, H, W, 1), (N, H, W, 3) or (N, H, W, 4); channels may come second, (N, 1, H, W) or
            (N, 3, H, W), where that can be told. Integers (N,) in X.labels.npy beside X.npy are its labels.

    Raises:
        DataError: It holds something else; the sentence names type and shape. Or its labels do not fit.
    """
    packed = PackedFile(str(file), split_of_container(file.name), row_prefix(file))
    return PackedSource("array", NpyImages(), (packed,), labels_known=has_labels(file)).checked()


def _map_images(path: str) -> NDArray[np.uint8]:
    """The mapped images, channels last."""
    array = map_npy(path)
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise DataError(f"{path} holds {describe(array)}, {_NEEDED}; convert it and save it again")
    if 0 in array.shape[1:]:
        raise DataError(f"{path} holds {describe(array)}, whose images have no pixels; {_NEEDED}")
    return array if array.ndim == 3 else _channels_last(array, path)


def _channels_last(array: NDArray[Any], path: str) -> NDArray[np.uint8]:
    last, second = array.shape[3] in _CHANNELS, array.shape[1] in _CHANNELS_FIRST
    if last and second:
        raise DataError(
            f"{path} holds {describe(array)}, of which both the second and the last axis could be the channels; "
            "transpose(0, 2, 3, 1) it if they come second, and give each image more than 3 rows"
        )
    if not last and not second:
        raise DataError(
            f"{path} holds {describe(array)}, of which no axis can be the channels: {_NEEDED}; "
            "transpose(0, 2, 3, 1) it if they come second, and save it again"
        )
    return array if last else np.moveaxis(array, 1, 3)
