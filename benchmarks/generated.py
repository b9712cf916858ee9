"""No benchmark: a source of any number of images that takes no room, where Ray's processes can import it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spice_ray.readers.records import Chunk, Record

SIDE = 32
_CELLS = 4


@dataclass(frozen=True)
class GeneratedChunk:
    start: int
    stop: int
    classes: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[Record]:
        rng = np.random.default_rng(self.start)
        patterns = _patterns(self.classes)
        for number in range(self.start, self.stop):
            label, pixels = None, rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            if self.classes:
                label = number % self.classes
                pixels = pixels // 2 + patterns[label]
            yield Record(f"generated/{number:09d}", "train", label, pixels)


def _patterns(classes: int) -> NDArray[np.uint8]:
    """Coarse patches of colour, below 128, for each class."""
    coarse = np.random.default_rng(0).integers(0, 128, (classes, _CELLS, _CELLS, 3), dtype=np.uint8)
    return coarse.repeat(SIDE // _CELLS, axis=1).repeat(SIDE // _CELLS, axis=2)


@dataclass(frozen=True)
class Generated:
    """Noise, or patterns of some classes in noise."""

    count: int
    classes: int = 0
    kind: str = "generated"

    @property
    def labels_known(self) -> bool:
        return self.classes > 0

    def listing_digest(self) -> str:
        return f"{self.count}-{self.classes}"

    def encoded_bytes(self) -> None:
        return None

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        starts = range(0, self.count, rows_per_chunk)
        return [GeneratedChunk(start, min(start + rows_per_chunk, self.count), self.classes) for start in starts]
