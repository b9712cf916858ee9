import pickle
from pathlib import Path
from typing import Any

import numpy as np

from spice_ray.readers.benchmarks import open_benchmark
from spice_ray.readers.records import Record, Source, Unreadable, read_chunk


def opened(path: Path | str) -> Source:
    source = open_benchmark(str(path))
    assert source is not None
    return source


def records(source: Source, rows_per_chunk: int = 3) -> list[Record]:
    """All records, from chunks that travelled as they do to a worker."""
    found = []
    for chunk in pickle.loads(pickle.dumps(source.chunks(rows_per_chunk))):
        rows = list(read_chunk(chunk))
        assert len(rows) == chunk.num_rows
        found += rows
    return found


def summary(source: Source) -> list[tuple[str, str, object]]:
    return [(record.source, record.split, record.label) for record in records(source)]


def numbers(record: Record) -> np.ndarray[Any, np.dtype[Any]]:
    """The record's array, with nothing but its own memory behind it."""
    assert isinstance(record.data, np.ndarray)
    assert type(record.data) is np.ndarray
    assert record.data.flags.c_contiguous
    assert record.data.base is None or record.data.base.nbytes == record.data.nbytes
    return record.data


def reasons(source: Source) -> list[str]:
    return [record.data.reason for record in records(source) if isinstance(record.data, Unreadable)]
