"""The handwritten digits that come with scikit-learn: 1797 grey images of 8 x 8 pixels, no download."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spice_ray.readers.records import TRAIN, Chunk, Record

NUM_DIGITS = 1797
# load_digits gives intensities 0..16.
_WHITE = 16


@dataclass(frozen=True)
class DigitsChunk:
    """Digits ``start`` to ``stop`` - 1."""

    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """How many digits the chunk holds."""
        return self.stop - self.start

    def read(self) -> Iterator[Record]:
        """The digits as grey uint8 arrays, (8, 8)."""
        # Imported here: scikit-learn takes about a second, and a wrong path must be refused faster than that.
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.round(bunch.images * 255 / _WHITE).astype(np.uint8)
        for row in range(self.start, self.stop):
            yield Record(f"digits/{row:04d}", TRAIN, int(bunch.target[row]), images[row])


@dataclass(frozen=True)
class DigitsSource:
    """The bundled digits, all in the training split."""

    kind: str = "digits"
    labels_known: bool = True

    def listing_digest(self) -> str:
        """32 hex digits; the digits never change."""
        return hashlib.blake2b(f"digits {NUM_DIGITS}".encode(), digest_size=16).hexdigest()

    def encoded_bytes(self) -> int | None:
        """None: the digits are pixels, nothing is encoded."""
        return None

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The digits in chunks of at most ``rows_per_chunk``."""
        starts = range(0, NUM_DIGITS, rows_per_chunk)
        return [DigitsChunk(start, min(start + rows_per_chunk, NUM_DIGITS)) for start in starts]
