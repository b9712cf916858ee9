import pickle
from pathlib import Path
from typing import Any

import numpy as np

from spice_ray.readers.files import Found, find
from spice_ray.readers.places import place_of
from spice_ray.readers.records import Record, Source, Unreadable, read_chunk
from spice_ray.readers.source import open_source


def opened(path: Path | str) -> Source:
    return open_source(str(path))


def listed(path: Path | str) -> Found:
    """The file as a listing shows it; one that is not there as if it had been."""
    place = place_of(str(path))
    return find(place) or Found(place, False, None, None)


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


def same_source(one: Path | str, other: Path | str) -> int:
    """Compares two copies of a source in all that a run takes from them; gives the number of records."""
    source, twin = open_source(str(one)), open_source(str(other))
    assert (source.kind, source.labels_known) == (twin.kind, twin.labels_known)
    assert source.encoded_bytes() == twin.encoded_bytes()
    assert source.listing_digest() == open_source(str(one)).listing_digest()
    found, expected = records(source), records(twin)
    assert summary(source) == summary(twin)
    assert [_content(record) for record in found] == [_content(record) for record in expected]
    return len(found)


def _content(record: Record) -> object:
    if isinstance(record.data, np.ndarray):
        return record.data.dtype, record.data.shape, numbers(record).tobytes()
    return record.data
