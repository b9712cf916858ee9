"""Pickles of plain data and uint8 arrays, read without running anything that they ask for.

A pickle is a program that may call any function by name. Here no name leads to a function: the three that a pickled
array needs lead to a stand-in that only keeps what it is given, and every other one ends the reading.
"""

import io
import math
import pickle
from typing import Any

import numpy as np

from spice_ray.errors import DataError
from spice_ray.readers.files import read_whole
from spice_ray.readers.places import Place

# Where NumPy keeps _reconstruct depends on the version that wrote the file.
_ARRAY_NAMES = frozenset(
    [
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    ]
)


def load_pickled(place: Place) -> object:
    """Load a pickle of plain containers, numbers, bytes and uint8 arrays.

    Args:
        place: A file of any pickle protocol; Python 2's strings come as bytes.

    Returns:
        What was pickled; uint8 arrays only where they are the value of a dictionary at the top.

    Raises:
        DataError: The file is not a pickle, is damaged, or names anything beside what an array needs.
        OSError: It cannot be read.
    """
    file = io.BytesIO(read_whole(place))
    try:
        loaded = _PlainUnpickler(file, encoding="bytes").load()
        if isinstance(loaded, dict):
            return {key: value.array() if isinstance(value, _Kept) else value for key, value in loaded.items()}
        return loaded
    except _Forbidden as error:
        raise DataError(
            f"{place} is a pickle that wants to use {error}, which no published data needs; "
            "do not trust it, download the archive again"
        ) from None
    except Exception as error:
        # Hostile or damaged bytes end the unpickler with nearly any error there is.
        raise DataError(
            f"{place} is not a readable pickle ({type(error).__name__}); unpack the archive again"
        ) from None


class _Forbidden(Exception):  # noqa: N818 (caught above, never seen by a caller)
    pass


class _Kept:
    """Stands for ``_reconstruct``, ``ndarray`` and ``dtype``, and for what calling them would have made."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The uint8 array; anything else raises whatever comes first."""
        _, shape, dtype, is_fortran, data = self._state
        if dtype._arguments[0] not in (b"u1", "u1"):
            raise TypeError
        if math.prod(shape) != len(data):
            raise ValueError
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_NAMES:
            raise _Forbidden(f"{module}.{name}")
        return _Kept
