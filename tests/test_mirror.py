"""Run folders on a server, seen by nodes that have nothing else in common: each has a cache of its own."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spice_ray import mirror
from spice_ray.contracts import ShardFile
from spice_ray.errors import StorageError, UnreachableError
from spice_ray.readers.parts import is_intact
from spice_ray.runtime.progress import ProgressWriter, read_progress
from spice_ray.storage import open_artifact, publish, read_json, write_json
from tests.servers import S3, free_port

Node = Callable[[str, str], Path]
"""Gives the path of a URL on the node of a name."""


@pytest.fixture
def on_node(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    def path_on(node: str, key: str) -> Path:
        monkeypatch.setenv("SPICE_RAY_CACHE", str(tmp_path / node))
        return mirror.path_of(f"s3://{s3.bucket}/{key}")

    return path_on


def sent(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    mirror.send(path)
    return path


def test_a_path_stands_for_its_url_and_is_shown_as_it() -> None:
    path = mirror.path_of("s3://bucket/runs/one?endpoint_override=host:9000&scheme=http")
    assert path.is_absolute()
    assert mirror.is_mirrored(path / "artifacts")
    assert mirror.shown(f"{path}/run.json is bad, and {path} too") == (
        "s3://bucket/runs/one/run.json is bad, and s3://bucket/runs/one too"
    )
    assert mirror.path_of("s3://bucket/") == mirror.path_of("s3://bucket")
    assert mirror.joined(path, "../shards") == path.with_name("shards")
    assert mirror.url_of(path / "shards") == "s3://bucket/runs/one/shards?endpoint_override=host:9000&scheme=http"
    assert mirror.joined(path, mirror.url_of(path)) == path
    assert mirror.path_of("s3://bucket/a/../b/") == mirror.path_of("s3://bucket/b")
    assert mirror.path_of("abfss://container@account.dfs.core.windows.net/run").name == "run"


def test_the_cache_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("/mnt/my disk/cache", "/data/spice-ray-mirror", "/data/spice-ray-mirror/x"):
        monkeypatch.setenv("SPICE_RAY_CACHE", name)
        path = mirror.path_of("s3://bucket/run")
        assert path.is_relative_to(name)
        assert mirror.is_mirrored(path)
        assert not mirror.is_mirrored(Path(name) / "run")
        assert mirror.url_of(path) == mirror.shown(path) == "s3://bucket/run"
        assert not mirror.is_mirrored(mirror.staging_of(path))


def test_other_paths_are_themselves(tmp_path: Path) -> None:
    assert mirror.path_of("runs/demo") == mirror.path_of(Path("runs/demo")) == Path("runs/demo")
    assert mirror.path_of(f"file://{tmp_path}/run") == tmp_path / "run"
    assert not mirror.is_mirrored(tmp_path)
    assert mirror.shown(f"{tmp_path} is full") == f"{tmp_path} is full"
    assert mirror.local(tmp_path / "nothing") == tmp_path / "nothing"
    assert mirror.staging_of(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://host/run", "is on a web server, which takes no files"),
        ("s3://key:secret@bucket/run", r"the URL of s3://bucket/run holds a key; leave it out"),
        ("sftp://me:secret@host/run", r"the URL of sftp://host/run holds a key; leave it out"),
        ("s3://bucket/../run", "leads out of its server's folders"),
    ],
)
def test_urls_that_cannot_hold_a_run_are_refused(url: str, sentence: str) -> None:
    with pytest.raises(StorageError, match=sentence) as refused:
        mirror.path_of(url)
    assert "secret" not in str(refused.value)


def test_a_file_is_fetched_once_by_each_node_and_anew_when_it_changed(on_node: Node) -> None:
    sent(on_node("a", "run/weights"), "old")
    theirs = mirror.local(on_node("b", "run/weights"))
    assert theirs.read_text() == "old"
    first = theirs.stat().st_ino
    assert mirror.local(theirs).stat().st_ino == first

    sent(on_node("a", "run/weights"), "newer")
    assert mirror.local(theirs).read_text() == "newer"
    mirror.remove(on_node("a", "run/weights"))
    assert not mirror.local(theirs).exists()


def test_what_a_node_delivered_is_its_copy(on_node: Node) -> None:
    file = on_node("a", "run/part")
    file.parent.mkdir(parents=True)
    temporary = mirror.temporary_of(file)
    temporary.write_text("rows")
    mirror.deliver(temporary, file)
    before = file.stat().st_ino
    assert mirror.local(file).stat().st_ino == before  # nothing was fetched
    assert os.listdir(file.parent) == ["part"]
    other = on_node("b", "run/part")
    assert mirror.read_copy(other) == b"rows"
    assert mirror.local(other).read_text() == "rows"

    temporary.write_text("runs")
    mirror.deliver(temporary, file.with_name("passing"), keep=False)
    assert os.listdir(file.parent) == ["part"]
    with mirror.open_input(other.with_name("passing")) as opened:
        assert opened.read_at(2, 1) == b"un"


def test_a_full_disk_keeps_no_copy(on_node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(on_node("a", "run/part"), "rows")
    monkeypatch.setattr(mirror, "_SPARE", 1.0)
    file = on_node("b", "run/part")
    assert mirror.read_copy(file) == mirror.read_copy(file) == b"rows"
    assert not file.exists()


def test_a_full_disk_is_not_the_fault_of_the_server(on_node: Node, tmp_path: Path) -> None:
    sent(on_node("a", "run/weights"), "numbers")
    (tmp_path / "b").write_text("a file where the cache should be")
    with pytest.raises(StorageError, match=r"/b cannot hold the copy of .*name another folder"):
        mirror.local(on_node("b", "run/weights"))


def test_a_damaged_copy_is_fetched_again(on_node: Node) -> None:
    content = b"PAR1 rows"
    sent(on_node("a", "shards/part"), content.decode())
    theirs = on_node("b", "shards/part")
    before = mirror.local(theirs).stat()
    theirs.write_bytes(b"PAR1 rots")
    os.utime(theirs, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert mirror.read_copy(theirs) == b"PAR1 rots"  # by size and time it is the copy
    assert is_intact(theirs.parent, ShardFile("part", 0, 1, 1, zlib.crc32(content)))
    assert theirs.read_bytes() == content


def test_a_folder_is_what_the_server_says(on_node: Node) -> None:
    folder = on_node("a", "run")
    assert mirror.names(folder) == []
    assert not mirror.exists(folder)
    for name in ("two", "one", "below/three"):
        sent(folder / name, name)
    theirs = on_node("b", "run")
    assert mirror.names(theirs) == ["below", "one", "two"]
    assert mirror.exists(theirs / "below")
    mirror.remove(theirs / "below")
    mirror.remove(theirs / "below")
    assert mirror.names(folder) == ["one", "two"]


def test_a_record_is_read_anew_every_time(on_node: Node) -> None:
    here, there = on_node("a", "run/run.json"), on_node("b", "run/run.json")
    for number in range(3):  # all within the second that is the finest time of a bucket
        write_json(here, {"number": number})
        assert read_json(there) == {"number": number}
    with pytest.raises(StorageError, match=r"other.json does not exist; is .* the folder of a run"):
        read_json(there.with_name("other.json"))
    with pytest.raises(FileNotFoundError, match="No such file"):
        mirror.read_copy(there.with_name("part"))


def payload(folder: Path) -> dict[str, Any]:
    (folder / "numbers").write_text("1 2 3")
    write_json(folder / "inner.json", [1])
    return {"count": 3}


def test_an_artifact_that_one_node_published_is_opened_by_another(on_node: Node) -> None:
    root = on_node("a", "run/artifacts")
    published = publish(root, "embedding", "abc", payload)
    assert published.file("numbers").read_text() == "1 2 3"
    found = open_artifact(on_node("b", "run/artifacts"), "embedding", "abc")
    assert found is not None
    assert found.manifest["count"] == 3
    assert found.file("numbers").read_text() == "1 2 3"
    assert read_json(found.path / "inner.json") == [1]
    with pytest.raises(StorageError, match="is missing from a finished artifact"):
        found.file("others")
    assert mirror.names(root) == ["embedding-abc"]
    assert not any(mirror.staging_of(root).iterdir())


def test_half_an_artifact_is_none_and_is_made_anew(on_node: Node) -> None:
    root = on_node("a", "run/artifacts")

    def broken(folder: Path) -> dict[str, Any]:
        (folder / "zero").symlink_to("nowhere")  # sorts behind manifest.json
        return payload(folder)

    with pytest.raises(StorageError, match="cannot hold the copy of"):
        publish(root, "embedding", "abc", broken)
    assert mirror.names(root / "embedding-abc") == ["inner.json", "numbers"]
    assert open_artifact(root, "embedding", "abc") is None
    assert publish(root, "embedding", "abc", payload).file("numbers").read_text() == "1 2 3"


def test_an_artifact_is_published_once(on_node: Node) -> None:
    publish(on_node("a", "run/artifacts"), "embedding", "abc", payload)
    later = publish(on_node("b", "run/artifacts"), "embedding", "abc", lambda folder: {"count": 4})
    assert later.manifest["count"] == 3


def test_a_server_that_does_not_answer_is_a_sentence(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPICE_RAY_CACHE", str(tmp_path))
    path = mirror.path_of(f"s3://bucket/run?endpoint_override=127.0.0.1:{free_port()}&scheme=http&region=us-east-1")
    with pytest.raises(UnreachableError, match=r"cannot be reached .*see that every node reaches the server"):
        mirror.exists(path)
    # What is only shown is not worth a run.
    ProgressWriter(path, "train").write(1, 2)
    assert read_progress(path) is None
    mirror.remove(path)
    absent = mirror.path_of("s3://a-bucket-that-is-not-there/run")
    with pytest.raises(StorageError, match=r"cannot be reached .*see that every node reaches the server"):
        write_json(absent / "run.json", {})
