import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spice_ray.readers.source import Unreadable, open_source
from spice_ray.runtime.ingest import ingest
from spice_ray.runtime.progress import SilentReporter
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


def test_a_bucket_folder_gives_the_records_of_the_same_local_folder(s3: S3, tmp_path: Path) -> None:
    names = ["a b.png", "test/x%20y.png", "train/cat/\u00fc?#[1].png", ".hidden/x.png", ".y.png", "notes.csv", "z.JPG"]
    put(tmp_path, *names)
    for value, name in enumerate(names):
        s3.put(f"images/{name}", png(value))
    remote = open_source(f"s3://{s3.bucket}/images", labels_from_folders=True)
    local = open_source(str(tmp_path), labels_from_folders=True)
    assert remote.kind == "folder"
    assert records(remote) == records(local)
    assert len(records(remote)) == 4
    assert remote.encoded_bytes() == local.encoded_bytes()
    assert summary(open_source(f"s3://{s3.bucket}"))[0] == ("images/a b.png", "train", None)


def test_the_digest_of_a_bucket_folder_follows_its_files(s3: S3) -> None:
    s3.put("images/a.png", png(0))
    source = open_source(f"s3://{s3.bucket}/images/")
    assert source.listing_digest() == open_source(f"s3://{s3.bucket}/images").listing_digest()
    s3.put("images/b.png", png(1))
    assert source.listing_digest() != open_source(f"s3://{s3.bucket}/images").listing_digest()
    assert len(records(source)) == 1


def test_an_object_that_vanished_is_a_record_with_a_reason(s3: S3) -> None:
    for value in range(40):
        s3.put(f"images/{value:02d}.png", png(value))
    source = open_source(f"s3://{s3.bucket}/images")
    source.chunks(1)
    s3.system.delete_file(f"{s3.bucket}/images/07.png")
    found = [record.data for record in records(source, 100)]
    assert found == [GONE if value == 7 else png(value) for value in range(40)]


def test_a_bucket_has_parquet_files_by_name_by_folder_and_by_pattern(s3: S3) -> None:
    for name in ("train-0", "train-1", "test-0"):
        s3.put(f"t/{name}.parquet", parquet_bytes(image=IMAGES, label=list(range(10))))
    s3.put("t/sub/train-2.parquet", parquet_bytes(image=IMAGES))
    s3.put("t/.train-3.parquet", parquet_bytes(image=IMAGES))
    bucket = f"s3://{s3.bucket}"

    def names(pattern: str) -> list[str]:
        return list(dict.fromkeys(name.split("#")[0] for name, _, _ in summary(open_source(bucket + pattern))))

    assert names("/t/train-1.parquet") == ["train-1.parquet"]
    assert names("/t/train-?.parquet") == ["train-0.parquet", "train-1.parquet"]
    assert names("/t/t*.parquet") == ["test-0.parquet", "train-0.parquet", "train-1.parquet"]
    assert names("/*/t[er]*-0.parquet") == ["test-0.parquet", "train-0.parquet"]
    assert names("/t/**/train-*.parquet") == ["sub/train-2.parquet", "train-0.parquet", "train-1.parquet"]
    assert names("/t") == ["sub/train-2.parquet", "test-0.parquet", "train-0.parquet", "train-1.parquet"]
    source = open_source(f"{bucket}/t/test-0.parquet")
    assert [(record.split, record.label, record.data) for record in records(source)] == [
        ("test", label, IMAGES[label]) for label in range(10)
    ]
    assert f"no file matches {bucket}/t/x*.parquet" in refused(f"{bucket}/t/x*.parquet")
    assert "has a ** beside other letters" in refused(f"{bucket}/t/x**.parquet")


def test_a_remote_row_group_is_fetched_once_however_small_the_chunks(s3: S3) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": IMAGES}), buffer, row_group_size=5)
    url = s3.put("a.parquet", buffer.getvalue())
    assert [chunk.num_rows for chunk in open_source(url).chunks(1)] == [5, 5]


def test_the_tasks_of_an_ingest_read_from_a_bucket(s3: S3, local_ray: None, tmp_path: Path) -> None:
    for number, image in enumerate(IMAGES):
        s3.put(f"photos/{number}.png", image)
    # Ray was started before the test had an environment of its own: what the tasks need is in the URL.
    url = f"s3://key:secret@{s3.bucket}/photos?endpoint_override={s3.address}&scheme=http"
    shards, _ = ingest(open_source(url), tmp_path, image_size=8, seed=0, reporter=SilentReporter())
    table = pq.read_table(sorted(shards.path.glob("part-*.parquet")))
    assert sorted(table["source"].to_pylist()) == sorted(f"{number}.png" for number in range(len(IMAGES)))
    assert shards.manifest["num_rejects"] == 0


def test_a_parquet_object_that_vanished_loses_its_rows_with_a_reason(s3: S3) -> None:
    url = s3.put("a.parquet", parquet_bytes(image=IMAGES[:2]))
    source = open_source(url)
    source.chunks(10)
    s3.system.delete_file(f"{s3.bucket}/a.parquet")
    assert [name for name, _ in reasons(source)] == ["a.parquet#0", "a.parquet#1"]


@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
def test_a_bucket_has_tar_archives(s3: S3, suffix: str) -> None:
    members = [("0.png", IMAGES[0]), ("0.cls", b"4"), ("1.png", IMAGES[1])]
    url = s3.put(f"shards/val-0{suffix}", tar_bytes(members, "w:gz" if suffix == ".tgz" else "w"))
    expected = [(f"val-0{suffix}/0.png", "test", 4), (f"val-0{suffix}/1.png", "test", None)]
    for path in (url, f"s3://{s3.bucket}/shards", f"s3://{s3.bucket}/shards/*{suffix}"):
        assert summary(open_source(path)) == expected
    assert list(contents(open_source(url)).values()) == IMAGES[:2]


def test_a_list_in_a_bucket_mixes_servers_and_local_files(s3: S3, web: str, web_root: Path, tmp_path: Path) -> None:
    put(tmp_path, "local.png", "unused")
    put(web_root, "unused", "on web.png")
    s3.put("images/a b.png", png(2))
    lines = [
        "images/a b.png",
        "./lists/../images/a b.png",
        f"s3://{s3.bucket}/images/a b.png",
        f"{web}/on web.png",
        f"{web}/on%20web.png",
        f"{web}/gone.png",
        f"{tmp_path}/local.png",
        f"s3://{s3.bucket}/gone.png",
        "s3://no-such-bucket-at-all/gone.png",
        "foo://x/y.png",
    ]
    found = records(open_source(s3.put("list.txt", "\n".join(lines).encode())))
    assert [record.source for record in found] == lines
    assert [record.data for record in found] == [
        *[png(2)] * 3,
        *[png(1)] * 2,
        GONE,
        png(0),
        *[GONE] * 2,
        Unreadable("the file cannot be read: ValueError: Protocol not known: foo"),
    ]
    url = s3.put("list.parquet", parquet_bytes(url=lines[:3], label=[1, 2, 3]))
    assert [(record.label, record.data) for record in records(open_source(url))] == [
        (label, png(2)) for label in (1, 2, 3)
    ]


def test_settings_and_keys_in_the_url_are_used_and_never_shown(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("images/a.png", png(0))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    settings = f"?endpoint_override={s3.address}&scheme=http&region=us-east-1"
    found = records(open_source(f"s3://KEY:SECRET@{s3.bucket}/images{settings}"))
    assert [(record.source, record.data) for record in found] == [("a.png", png(0))]
    sentence = refused(f"s3://KEY:SECRET@{s3.bucket}/nowhere{settings}")
    assert f"s3://{s3.bucket}/nowhere does not exist" in sentence
    assert "SECRET" not in sentence


def test_a_bucket_or_a_folder_that_does_not_exist_is_refused(s3: S3) -> None:
    assert "s3://no-such-bucket-at-all/x does not exist" in refused("s3://no-such-bucket-at-all/x")
    assert f"s3://{s3.bucket}/x.tar does not exist" in refused(f"s3://{s3.bucket}/x.tar")
    url = s3.put("a.png", png(0))
    assert f"{url} is neither a folder nor a file of a kind that is read" in refused(url)
    s3.put("other/notes.csv", b"")
    assert "holds no image, only 1 other files" in refused(f"s3://{s3.bucket}/other")


def test_keys_that_the_server_does_not_know_are_refused(s3: S3) -> None:
    s3.put("images/a.png", png(0))
    reset = f"http://{s3.address}/moto-api/reset-auth"
    text = {"Content-Type": "text/plain"}
    urlopen(Request(reset, b"0", text, method="POST")).close()
    try:
        assert refused(f"s3://KEY:SECRET@{s3.bucket}/images") == (
            f"s3://{s3.bucket}/images cannot be reached (access denied); check the URL, the network and the credentials"
        )
    finally:
        urlopen(Request(reset, b"inf", text, method="POST")).close()


@pytest.mark.parametrize("user", ["", "anonymous@"])
def test_a_bucket_that_is_closed_to_those_without_keys_is_refused(user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    # As S3 answers HEAD: the status and no body.
    with serving(answering(403)) as url:
        settings = f"?endpoint_override={url.removeprefix('http://')}&scheme=http&region=us-east-1"
        assert "s3://closed/images cannot be reached (access denied)" in refused(f"s3://{user}closed/images{settings}")


def test_a_server_that_is_not_there_is_refused_in_a_few_seconds() -> None:
    begin = time.monotonic()
    settings = "?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    assert "cannot be reached (network connection: Failed to connect" in refused(f"s3://key:secret@bucket/x{settings}")
    assert "cannot be reached (Connection refused)" in refused("http://127.0.0.1:9/a.tar")
    assert "cannot be reached (Connection refused)" in refused("ftp://127.0.0.1:9/a.tar")
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("foo://bucket/x", "ValueError: Protocol not known: foo"),
        ("az://container/x", "ImportError: Install adlfs"),
        ("s3:///x", "ArrowInvalid: Missing bucket name"),
        ("zip://x.png", "Is a directory"),
        ("http:///x", "no host given"),
        ("http://u:SECRET@127.0.0.1:9/a.tar", "user names and passwords in http addresses are not supported"),
    ],
)
def test_a_url_that_nothing_opens_is_refused_with_the_reason(
    url: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = refused(url)
    assert f"cannot be reached ({reason}" in sentence
    assert "SECRET" not in sentence


# --- fsspec


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_a_file_system_of_fsspec_has_folders_patterns_archives_and_lists(memory: fsspec.AbstractFileSystem) -> None:
    for name, content in {
        "images/test/a.png": png(0),
        "tables/a.parquet": parquet_bytes(image=IMAGES[:2]),
        "tables/b.parquet": parquet_bytes(image=IMAGES[:1]),
        "tars/a.tar": tar_bytes([("x.png", IMAGES[3])]),
        "other/b.png": png(1),
        # Not one file twice: whoever opens a file of this store moves the position of all others.
        "list.txt": b"images/test/a.png\nmemory://store/other/b.png",
    }.items():
        memory.pipe_file(f"/store/{name}", content)
    assert summary(open_source("memory://store/images")) == [("test/a.png", "test", None)]
    assert contents(open_source("memory://store/images")) == {"test/a.png": png(0)}
    assert len(records(open_source("memory://store/tables"))) == 3
    assert len(records(open_source("memory://store/tab*/a.parquet"))) == 2
    assert contents(open_source("memory://store/tars")) == {"a.tar/x.png": IMAGES[3]}
    assert [record.data for record in records(open_source("memory://store/list.txt"))] == [png(0), png(1)]
    assert "memory://store/nowhere does not exist" in refused("memory://store/nowhere")
