"""NumPy's .npy files, mapped rather than read, and the labels that may lie beside one."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_ray.errors import DataError


def map_npy(path: str) -> NDArray[Any]:
    """The array of a .npy file as a read-only map; only its header is read.

    Raises:
        DataError: It is not a .npy file, holds pickled objects, or is shorter than its header says.
        OSError: It cannot be read.
    """
    try:
        with warnings.catch_warnings():
            # A header may name a size beyond 64 bits; the error that follows says enough.
            warnings.simplefilter("ignore")
            # Never unpickles: an array of objects is refused, as is anything without the magic bytes.
            return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:
        # A hostile or damaged header makes NumPy fail in nearly any way.
        raise DataError(
            f"{path} is not a whole .npy file of plain numbers ({type(error).__name__}); "
            "write it again with numpy.save and without objects"
        ) from None


def has_labels(file: Path) -> bool:
    """Whether there is an X.labels.npy beside X.npy."""
    return _labels_file(file).is_file()


def map_labels(file: Path, num_rows: int) -> NDArray[np.integer] | None:
    """The labels of ``file``: integers (N,) in X.labels.npy beside X.npy; None where there is no such file.

    Raises:
        DataError: They are not integers, or not ``num_rows`` of them.
    """
    if not has_labels(file):
        return None
    beside = _labels_file(file)
    labels = map_npy(str(beside))
    if labels.dtype.kind not in "iu" or labels.shape != (num_rows,):
        raise DataError(
            f"{beside} holds {describe(labels)}, needed are integers of shape ({num_rows},), one for each row of "
            f"{file.name}; write it again or move it away"
        )
    return labels


def known_label(labels: NDArray[np.integer] | None, row: int) -> int | None:
    """The label of a row; None where there are none, or where it is withheld: -1, as data sets usually have it."""
    if labels is None or labels[row] < 0:
        return None
    return int(labels[row])


def describe(array: NDArray[Any]) -> str:
    """The type and shape of an array, for an error."""
    return f"{array.dtype.name} of shape {array.shape}"


def _labels_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}.labels.npy")
