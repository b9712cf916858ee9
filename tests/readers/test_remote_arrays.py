"""Arrays and embeddings on servers."""

import io
import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spice_ray.readers import files
from spice_ray.readers.source import open_source, read_chunk
from tests.readers.answering import serving
from tests.readers.counting_server import counting
from tests.readers.embedding_files import FIXED, lists, saved, table
from tests.readers.embedding_files import counted as numbers
from tests.readers.reading import reasons, same_source, summary
from tests.readers.sample_files import refused
from tests.servers import S3


def counted(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def labelled(file: Path, array: Any) -> Path:
    saved(file.with_name(f"{file.stem}.labels.npy"), np.arange(len(array))[::-1] - 1)
    return saved(file, array)


@pytest.mark.parametrize(
    "put",
    [
        lambda folder: labelled(folder / "val.npy", counted(7, 5, 6, 3)),
        lambda folder: saved(folder / "x.v2.npy", counted(7, 3, 5, 6)),
        lambda folder: labelled(folder / "x.npy", np.array(numbers(7), ">f8")),
        lambda folder: table(folder / "test.parquet", {"embedding": lists(numbers(7), FIXED), "id": range(7)}, 3),
        lambda folder: table(folder / "x.parquet", {"clip": lists(numbers(7), pa.list_(pa.float32()))}, 3),
    ],
    ids=["images", "channels-second", "vectors", "table", "table-of-lists"],
)
def test_rows_from_a_bucket_are_those_of_the_local_file(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[[Path], Path]
) -> None:
    file = put(tmp_path)
    url = s3.put_folder(tmp_path, "data")
    assert same_source(f"{url}/{file.name}", file) == 7
    # Four of the rows of 24 bytes at a time, and one of those that are longer.
    monkeypatch.setattr(files, "_REMOTE_PIECE_BYTES", 100)
    assert same_source(f"{url}/{file.name}", file) == 7


def test_files_of_a_pattern_in_a_bucket_are_one_source(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    labelled(tmp_path / "a.npy", np.array(numbers(2)))
    saved(tmp_path / "b.npy", np.array(numbers(3), np.float16))
    table(tmp_path / "a.parquet", {"embedding": lists(numbers(2), FIXED)})
    table(tmp_path / "test" / "a.parquet", {"embedding": lists(numbers(1), FIXED)})
    url = s3.put_folder(tmp_path, "data")
    assert same_source(f"{url}/*.npy", f"{tmp_path}/*.npy") == 5
    assert same_source(f"{url}/**/*.parquet", f"{tmp_path}/**/*.parquet") == 3
    assert summary(open_source(f"{url}/**/*.parquet")) == [
        ("a.parquet#0", "train", None),
        ("a.parquet#1", "train", None),
        ("test/a.parquet#0", "test", None),
    ]
    saved(tmp_path / "c.npy", np.ones((1, 5)))
    s3.put("data/c.npy", (tmp_path / "c.npy").read_bytes())
    assert f"{url}/c.npy holds embeddings of 5 numbers and {url}/a.npy of 3" in refused(f"{url}/*.npy")


@pytest.mark.parametrize("lost", ["x.npy", "x.labels.npy", "x.parquet"])
def test_rows_of_an_object_that_vanished_or_shrank_are_rejects(s3: S3, tmp_path: Path, lost: str) -> None:
    labelled(tmp_path / "x.npy", np.array(numbers(3)))
    table(tmp_path / "x.parquet", {"embedding": lists(numbers(3), FIXED)})
    url = s3.put_folder(tmp_path, "data")
    source = open_source(f"{url}/{lost.replace('.labels', '')}")
    source.chunks(10)
    s3.system.delete_file(f"{s3.bucket}/data/{lost}")
    assert {sentence.partition(" cannot be read: ")[2] for sentence in reasons(source)} == {"No such file or directory"}
    assert len(reasons(source)) == 3
    if lost.endswith(".npy"):
        s3.put(f"data/{lost}", npy(np.ones(2)))
        assert set(reasons(source)) == {"the file of this row cannot be read: it has changed since the start"}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.npy", b"", "x.npy is not a whole .npy file of plain numbers"),
        ("x.npy", npy(counted(2, 4, 4))[:-1], "x.npy is not a whole .npy file of plain numbers"),
        ("x.npy", npy(np.asfortranarray(counted(5, 4, 6, 3))), "x.npy is on a server and in Fortran order"),
        ("x.npy", npy(np.zeros((2, 3), np.int64)), "x.npy holds int64 of shape (2, 3), needed are uint8 images"),
        ("x.npy", npy(np.zeros((0, 3))), "x.npy holds no rows"),
        ("x.parquet", b"PAR1", "x.parquet is not a readable Parquet file"),
    ],
)
def test_an_object_that_cannot_be_used_is_named_without_the_keys(
    s3: S3, name: str, content: bytes, sentence: str
) -> None:
    s3.put(f"data/{name}", content)
    settings = f"endpoint_override={s3.address}&scheme=http"
    found = refused(f"s3://key:SECRET@{s3.bucket}/data/{name}?{settings}")
    assert found.startswith(f"s3://{s3.bucket}/data/{sentence}")
    assert "SECRET" not in found


def test_labels_in_a_bucket_that_do_not_fit_are_refused(s3: S3) -> None:
    url = s3.put("x.npy", npy(counted(3, 4, 4)))
    s3.put("x.labels.npy", npy(np.zeros(2, int)))
    labels = f"s3://{s3.bucket}/x.labels.npy"
    assert f"{labels} holds int64 of shape (2,), needed are integers of shape (3,)" in refused(url)


def test_of_an_array_on_a_server_nothing_but_the_header_and_the_rows_asked_for_is_fetched() -> None:
    rows, side = 20_000, 32
    content = npy(np.zeros((rows, side, side, 3), np.uint8))
    with counting({"x.npy": content}) as server:
        chunks = open_source("counting://host/x.npy").chunks(8000)
        assert [chunk.num_rows for chunk in chunks] == [8000, 8000, 4000]
        assert max(size for _, size in server.fetched) <= 10_012
        server.fetched.clear()
        assert sum(1 for _ in read_chunk(chunks[0])) == 8000
    sizes = [size for _, size in server.fetched]
    assert sum(sizes[1:]) == 8000 * side * side * 3
    assert max(sizes) <= 8 << 20


def test_a_web_server_has_small_arrays_with_labels_and_with_ranges_large_ones(
    s3: S3, web: str, web_root: Path, tmp_path: Path
) -> None:
    for folder in (tmp_path, web_root):
        labelled(folder / "a b.npy", counted(7, 5, 6))
        saved(folder / "large.npy", counted(2, 1600, 1600, 3))
    assert same_source(f"{web}/a%20b.npy", tmp_path / "a b.npy") == 7
    assert refused(f"{web}/large.npy").startswith(f"{web}/large.npy cannot be read (")
    s3.put("large.npy", (tmp_path / "large.npy").read_bytes())
    assert same_source(f"http://{s3.address}/{s3.bucket}/large.npy", tmp_path / "large.npy") == 2


def test_a_web_server_that_does_not_say_whether_there_are_labels_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    body = npy(counted(2, 4, 4))

    class Signed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/x.npy?signature=1"
            self.send_response(200 if known else 403)
            self.send_header("Content-Length", str(len(body) if known else 0))
            self.end_headers()
            if known and self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 (the name that http.server asks for)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Signed) as url, caplog.at_level(logging.WARNING):
        source = open_source(f"{url}/x.npy?signature=1")
        assert summary(source) == [("x.npy#0", "train", None), ("x.npy#1", "train", None)]
    assert "no labels are read for" in caplog.text
    assert "x.labels.npy cannot be reached (the server answered with status 403" in caplog.text
