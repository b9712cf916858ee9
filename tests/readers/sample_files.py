"""Small files of every kind that the readers' tests are about."""

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spice_ray.errors import DataError
from spice_ray.readers.source import Record, Source, Unreadable, open_source, read_chunk


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [png(value) for value in range(10)]


WEB_DATASET = [
    ("000.png", IMAGES[0]),
    ("000.cls", b"3\n"),
    ("001.json", b'{"label": 5, "caption": "x"}'),
    ("001.png", IMAGES[1]),
    ("002.txt", b"no image, no record"),
    ("002.cls", b"9"),
    ("003.png", IMAGES[2]),
]


def put(root: Path, *names: str) -> Path:
    """Write images whose contents follow from their places in ``names``."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    return root


def parquet(file: Path, columns: dict[str, pa.Array], rows_per_group: int = 100) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=rows_per_group)
    return file


def parquet_bytes(**columns: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def tar_bytes(members: Sequence[tuple[str, bytes]], mode: str = "w", format_: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format_) as archive:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def archive(file: Path, members: list[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(tar_bytes(members))
    return file


def records(source: Source, rows_per_chunk: int = 3) -> list[Record]:
    """All records, from chunks that travelled as they do to a worker."""
    found = []
    for chunk in pickle.loads(pickle.dumps(source.chunks(rows_per_chunk))):
        rows = list(read_chunk(chunk))
        assert chunk.num_rows in (None, len(rows))
        found += rows
    return found


def summary(source: Source) -> list[tuple[str, str, object]]:
    return [(record.source, record.split, record.label) for record in records(source)]


def contents(source: Source) -> dict[str, object]:
    return {record.source: record.data for record in records(source)}


def reasons(source: Source) -> list[tuple[str, str]]:
    return [(record.source, record.data.reason) for record in records(source) if isinstance(record.data, Unreadable)]


def refused(path: object) -> str:
    """The sentence with which a source is refused, at once or when it is cut into chunks."""
    with pytest.raises(DataError) as caught:
        open_source(str(path)).chunks(10)
    assert "\n" not in str(caught.value)
    return str(caught.value)
