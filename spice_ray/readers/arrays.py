"""Images in one NumPy array.

N images, H rows and W columns of pixels, C channels.
"""

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError
from spice_ray.readers.files import Found
from spice_ray.readers.npy import NpyFile, NpyRows, find_labels, open_rows
from spice_ray.readers.packed import PackedSource
from spice_ray.readers.places import printable

_CHANNELS = (1, 3, 4)
_CHANNELS_FIRST = (1, 3)
_NEEDED = (
    "needed are uint8 images of shape (N, H, W) or (N, H, W, C) with C = 1, 3 or 4, "
    "or embeddings in float16, float32 or float64 of shape (N, D)"
)


def open_array(file: Found) -> PackedSource:
    """A source of the images in a .npy file; row 17 of x.npy is called x.npy#17, and all are split train.

    Args:
        file: uint8, (N, H, W), (N, H, W, 1), (N, H, W, 3) or (N, H, W, 4); channels may come second, (N, 1, H, W) or
            (N, 3, H, W), where that can be told. Integers (N,) in X.labels.npy beside X.npy are its labels.

    Raises:
        DataError: It holds something else; the sentence names type and shape. Or its labels do not fit.
    """
    rows = NpyRows(_check_images, _image, find_labels(file.place))
    return open_rows("array", file, printable(file.place.name), rows)


def _image(row: NDArray[np.uint8], array: NpyFile) -> NDArray[np.uint8]:
    """The image as (H, W) or (H, W, C)."""
    second = len(array.shape) == 4 and array.shape[3] not in _CHANNELS
    return np.array(row.transpose(1, 2, 0) if second else row, order="C")


def _check_images(array: NpyFile) -> None:
    if array.dtype != np.uint8 or len(array.shape) not in (3, 4):
        raise DataError(f"{array.place} holds {array}, {_NEEDED}; convert it and save it again")
    if 0 in array.shape[1:]:
        raise DataError(f"{array.place} holds {array}, whose images have no pixels; {_NEEDED}")
    if len(array.shape) == 4:
        _check_channels(array)


def _check_channels(array: NpyFile) -> None:
    last, second = array.shape[3] in _CHANNELS, array.shape[1] in _CHANNELS_FIRST
    if last and second:
        raise DataError(
            f"{array.place} holds {array}, of which both the second and the last axis could be the channels; "
            "transpose(0, 2, 3, 1) it if they come second, and give each image more than 3 rows"
        )
    if not last and not second:
        raise DataError(
            f"{array.place} holds {array}, of which no axis can be the channels: {_NEEDED}; "
            "transpose(0, 2, 3, 1) it if they come second, and save it again"
        )
