"""One embedding as it comes in, and what makes it useless."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_ray.readers.records import Unreadable


def checked_vector(numbers: NDArray[Any], dim: int) -> NDArray[np.float32] | Unreadable:
    """A copy as float32, or the reason why it cannot be used.

    Args:
        numbers: Floating-point numbers of any width and byte order, (D,).
        dim: D as it ought to be.
    """
    if numbers.shape != (dim,):
        return Unreadable(f"the embedding has {len(numbers)} numbers, others have {dim}")
    with np.errstate(over="ignore"):
        vector = np.array(numbers, np.float32)
    if not np.isfinite(vector).all():
        return Unreadable("the embedding holds a number that is not finite in 32 bits")
    if not vector.any():
        # It has no direction, so it is like nothing and unlike nothing.
        return Unreadable("the embedding is all zeros in 32 bits")
    return vector
