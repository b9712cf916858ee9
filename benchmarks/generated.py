"""No benchmark: a source of any number of images that takes no room, where Ray's processes can import it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from spice_ray.readers.records import Chunk, Record

SIDE = 32


@dataclass(frozen=True)
class GeneratedChunk:
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def read(self) -> Iterator[Record]:
        rng = np.random.default_rng(self.start)
        for number in range(self.start, self.stop):
            yield Record(
                f"generated/{number:09d}", "train", None, rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            )


@dataclass(frozen=True)
class Generated:
    count: int
    kind: str = "generated"
    labels_known: bool = False

    def listing_digest(self) -> str:
        return f"{self.count}"

    def encoded_bytes(self) -> None:
        return None

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        starts = range(0, self.count, rows_per_chunk)
        return [GeneratedChunk(start, min(start + rows_per_chunk, self.count)) for start in starts]
