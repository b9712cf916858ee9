"""What the readers make of the corpus, and whether it is what a case says must come."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spice_ray.readers.parts import PartFormat
from spice_ray.readers.records import Chunk
from spice_ray.readers.rows import Row, read_rows
from spice_ray.readers.source import open_source
from tests.hostile.corpus import Bad, Case, Good

SIZE = 16
Found = NDArray[np.uint8] | str | None
"""The image, uint8 RGB (3, 16, 16), or the reason of its reject, or None where nothing came."""


def read_corpus(root: Path, cases: list[Case]) -> dict[str, Found]:
    """Every image and every reason by its source; what vanishes does so after the folder was listed."""
    source = open_source(str(root))
    chunks = source.chunks(7)
    for case in cases:
        case.vanish(root)
    return read_chunks(chunks)


def read_chunks(chunks: Iterable[Chunk]) -> dict[str, Found]:
    """Every image and every reason by its source."""
    found: dict[str, Found] = {}
    for chunk in chunks:
        for row in read_rows(chunk, PartFormat(SIZE, "pixels"), seed=0):
            assert row.source not in found, row.source
            found[row.source] = pixels(row.content) if isinstance(row, Row) else row.reason
    return found


def pixels(image: bytes) -> NDArray[np.uint8]:
    """A stored image as uint8, (3, 16, 16)."""
    return np.frombuffer(image, np.uint8).reshape(3, SIZE, SIZE)


def quadrants_of(image: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quadrants of (3, H, W), in the order of ``Quadrants``."""
    height, width = image.shape[1:]
    rows, columns = (height // 4, height * 3 // 4), (width // 4, width * 3 // 4)
    return [tuple(int(value) for value in image[:, y, x]) for y in rows for x in columns]


def is_expected(case: Case, found: Found) -> bool:
    """Whether that is what must come of the case."""
    if isinstance(case.expected, Good):
        return isinstance(found, np.ndarray) and has_colours(case.expected, quadrants_of(found))
    if isinstance(case.expected, Bad):
        return isinstance(found, str) and re.search(case.expected.reason, found) is not None
    return found is None


def has_colours(good: Good, colours: list[tuple[int, ...]]) -> bool:
    """Whether the colours are those of the case, as near as its format can keep them."""
    return all(
        known is None or max(abs(a - b) for a, b in zip(known, colour, strict=True)) <= good.tolerance
        for known, colour in zip(good.colours, colours, strict=True)
    )
