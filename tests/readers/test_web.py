import time
import tracemalloc
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest

from spice_ray.readers import files
from spice_ray.readers import web as web_reader
from spice_ray.readers.source import Unreadable, open_source
from tests.readers.answering import answering, serving
from tests.readers.sample_files import (
    IMAGES,
    contents,
    parquet_bytes,
    png,
    put,
    reasons,
    records,
    refused,
    summary,
    tar_bytes,
)
from tests.servers import S3

GONE = Unreadable("the file cannot be read: No such file or directory")


def test_the_web_has_lists_archives_and_parquet_files(web: str, web_root: Path) -> None:
    put(web_root, "sub/a.png", "sub/test/b.png")
    (web_root / "sub" / "list.txt").write_text("a.png\ntest/b.png\ngone.png\n")
    (web_root / "train.tgz").write_bytes(tar_bytes([("x.png", IMAGES[3])], "w:gz"))
    (web_root / "test.parquet").write_bytes(parquet_bytes(image=IMAGES[:2]))
    assert [(record.source, record.split, record.data) for record in records(open_source(f"{web}/sub/list.txt"))] == [
        ("a.png", "train", png(0)),
        ("test/b.png", "test", png(1)),
        ("gone.png", "train", GONE),
    ]
    archive = open_source(f"{web}/train.tgz")
    assert contents(archive) == {"train.tgz/x.png": IMAGES[3]}
    assert archive.encoded_bytes() == (web_root / "train.tgz").stat().st_size
    assert summary(open_source(f"{web}/test.parquet")) == [(f"test.parquet#{row}", "test", None) for row in (0, 1)]


def test_a_parquet_file_is_fetched_in_parts_from_a_web_server_that_can(s3: S3) -> None:
    noise = np.random.default_rng(0).bytes(9 << 20)
    s3.put("a.parquet", parquet_bytes(image=[noise, *IMAGES]))
    source = open_source(f"http://{s3.address}/{s3.bucket}/a.parquet?id=1")
    assert [record.data for record in records(source)] == [noise, *IMAGES]


def test_a_large_parquet_file_on_a_web_server_without_ranges_is_refused(web: str, web_root: Path) -> None:
    noise = np.random.default_rng(0).bytes(9 << 20)
    (web_root / "large.parquet").write_bytes(parquet_bytes(image=[noise]))
    assert f"{web}/large.parquet is not a readable Parquet file" in refused(f"{web}/large.parquet")


def test_the_digest_of_a_web_file_follows_its_size_and_its_date(web: str, web_root: Path) -> None:
    digests = []
    for content in (tar_bytes([("x.png", IMAGES[3])]), tar_bytes([("x.png", IMAGES[3] * 1000)])):
        (web_root / "changing.tar").write_bytes(content)
        digests.append(open_source(f"{web}/changing.tar").listing_digest())
    assert digests[0] != digests[1]


def test_what_the_web_lacks_or_does_not_list_is_refused(web: str, web_root: Path) -> None:
    assert f"{web}/gone.tar does not exist" in refused(f"{web}/gone.tar")
    put(web_root, "folder/a.png")
    assert f"{web}/folder is neither a folder nor a file of a kind that is read" in refused(f"{web}/folder/")
    assert "/x*.tar does not exist" in refused(f"{web}/x*.tar")


def test_a_busy_web_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_reader, "_SECONDS_BEFORE_RETRY", (0, 0))
    with serving(answering(200, png(0), failures=2)) as url:
        assert web_reader.read_url(url, 1000) == png(0)
    with serving(answering(200, png(0), failures=3)) as url, pytest.raises(web_reader.WebError, match="status 503"):
        web_reader.read_url(url, 1000)


def test_an_answer_that_is_no_file_becomes_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(handler: type) -> str:
        with serving(handler) as url:
            (tmp_path / "l.txt").write_text(f"{url}/x.png")
            [(_, sentence)] = reasons(open_source(f"{tmp_path}/l.txt"))
        return sentence.removeprefix("the file cannot be read: ")

    assert reason(answering(403)) == "the server answered with status 403, Forbidden"
    assert reason(answering(410)) == "No such file or directory"
    assert reason(answering(200, b"x" * 10, announced=100)) == "the connection ended after 10 of 100 bytes"
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    assert reason(answering(200, b"x" * 1001)) == "it has more than the 1000 bytes that are read"


def test_a_web_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_reader, "_TIMEOUT_SECONDS", 0.3)

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(1)

    with serving(Silent) as url:
        assert "cannot be reached (the server did not answer in time)" in refused(f"{url}/a.tar")


def test_an_endless_answer_is_cut_off() -> None:
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 100_000)
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    with serving(Endless) as url:
        tracemalloc.start()
        try:
            assert 1 << 20 < len(web_reader.read_url(url, 1 << 20)) < 3 << 20
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()
