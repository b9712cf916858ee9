import gzip
import os
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from spice_ray.errors import DataError
from spice_ray.readers import files
from spice_ray.readers.source import Unreadable, open_source, read_chunk
from tests.readers.sample_files import (
    IMAGES,
    WEB_DATASET,
    archive,
    contents,
    reasons,
    records,
    refused,
    summary,
    tar_bytes,
)


def special(file: Path, *members: tuple[str, bytes]) -> Path:
    """An archive of members without content, by name and type."""
    with tarfile.open(file, "w") as opened:
        for name, type_ in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = type_, "a.png"
            opened.addfile(member)
    return file


# --- damaged


@pytest.mark.parametrize("length", range(512, len(tar_bytes(WEB_DATASET[:2])), 256))
def test_of_an_archive_cut_short_what_came_before_stays_and_one_record_names_it(tmp_path: Path, length: int) -> None:
    whole = tar_bytes([("0.png", IMAGES[0]), ("1.png", IMAGES[1])])
    # A header and a padded content of 512 bytes each, twice; then the end marker.
    marker = 4 * 512
    (tmp_path / "a.tar").write_bytes(whole[:length])
    found = contents(open_source(f"{tmp_path}/a.tar"))
    complete = {f"a.tar/{n}.png": IMAGES[n] for n in (0, 1) if length >= 1024 * n + 512 + len(IMAGES[n])}
    rejected = {name: data for name, data in found.items() if name not in complete}
    assert {name: data for name, data in found.items() if name in complete} == complete
    assert list(rejected) == ([] if length >= marker + 512 else ["a.tar"])
    for data in rejected.values():
        assert isinstance(data, Unreadable)
        assert data.reason.startswith("the archive cannot be read to its end, what follows is lost: ")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_a_compressed_archive_cut_short_loses_its_end_alone(tmp_path: Path, suffix: str) -> None:
    members = [(f"{number}.png", os.urandom(3000)) for number in range(300)]
    plain = tar_bytes(members)
    packed = gzip.compress(plain) if suffix == ".tar.gz" else pa.compress(plain, "zstd", asbytes=True)
    (tmp_path / f"a{suffix}").write_bytes(packed[: len(packed) // 2])
    found = list(contents(open_source(f"{tmp_path}/a{suffix}")).items())
    assert 50 < len(found) < 200
    assert [data for _, data in found[:-1]] == [data for _, data in members[: len(found) - 1]]
    assert found[-1][0] == f"a{suffix}"
    assert isinstance(found[-1][1], Unreadable)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes([(f"{number}.png", IMAGES[number]) for number in range(5)]))
    whole[2048:2060] = b"\xff" * 12
    (tmp_path / "a.tar").write_bytes(whole)
    found = contents(open_source(f"{tmp_path}/a.tar"))
    assert list(found) == ["a.tar/0.png", "a.tar/1.png", "a.tar"]
    assert found["a.tar"] == Unreadable(
        "the archive cannot be read to its end, what follows is lost: "
        "bad checksum, where a member or the end marker should be"
    )


def test_an_archive_that_vanishes_is_one_record(tmp_path: Path) -> None:
    archive(tmp_path / "a.tar", WEB_DATASET)
    [chunk] = open_source(str(tmp_path)).chunks(10)
    (tmp_path / "a.tar").unlink()
    [record] = read_chunk(chunk)
    assert record.source == "a.tar"
    assert isinstance(record.data, Unreadable)
    assert "No such file or directory" in record.data.reason


@pytest.mark.parametrize("content", [b"", b"x" * 5000, gzip.compress(tar_bytes(WEB_DATASET))])
def test_a_file_that_only_claims_to_be_an_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert "a.tar is not a readable tar archive" in refused(tmp_path / "a.tar")


def test_an_archive_without_members_is_refused(tmp_path: Path) -> None:
    assert "is an empty archive" in refused(archive(tmp_path / "a.tar", []))


# --- hostile


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "..", "/", "//x.txt", "./../x"])
def test_a_member_that_leads_out_of_the_archive_stops_the_reading(tmp_path: Path, name: str) -> None:
    file = archive(tmp_path / "a.tar", [("a.png", IMAGES[0]), (name, IMAGES[1])])
    [chunk] = open_source(str(file)).chunks(10)
    with pytest.raises(DataError) as caught:
        list(read_chunk(chunk))
    shown = name.rstrip("/") or "/"
    assert f"{file} holds the member {shown}, whose path leads out of the archive" in str(caught.value)


def test_a_path_that_stays_inside_is_taken(tmp_path: Path) -> None:
    archive(tmp_path / "a.tar", [("x/../y.png", IMAGES[0]), ("./..z.png", IMAGES[1]), ("a/b..png", IMAGES[2])])
    assert list(contents(open_source(f"{tmp_path}/a.tar"))) == ["a.tar/y.png", "a.tar/a/b..png"]


def test_links_that_look_like_images_are_listed_and_devices_are_passed_over(tmp_path: Path) -> None:
    file = special(
        tmp_path / "a.tar",
        ("link.png", tarfile.SYMTYPE),
        ("hard.png", tarfile.LNKTYPE),
        ("link.txt", tarfile.SYMTYPE),
        ("null.png", tarfile.CHRTYPE),
        ("disk.png", tarfile.BLKTYPE),
        ("pipe.png", tarfile.FIFOTYPE),
        ("folder.png", tarfile.DIRTYPE),
        ("label.cls", tarfile.SYMTYPE),
    )
    reason = "it is a link, which is not followed in an archive"
    assert reasons(open_source(str(file))) == [("a.tar/link.png", reason), ("a.tar/hard.png", reason)]
    assert len(records(open_source(str(file)))) == 2


def test_a_giant_member_is_refused_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:
        member = tarfile.TarInfo("giant.png")
        member.size = files.MAX_FILE_BYTES + 1
        file.write(member.tobuf())
        # The giant and the end marker are holes in the file.
        file.truncate(512 + files.MAX_FILE_BYTES + 512 + 1024)
    assert reasons(open_source(f"{tmp_path}/a.tar")) == [
        ("a.tar/giant.png", f"the file has {2**30 + 1} bytes, more than the {2**30} that are read")
    ]


def test_a_giant_label_is_left_alone(tmp_path: Path) -> None:
    members = [("a.png", IMAGES[0]), ("a.cls", b"1" * (2 << 20))]
    assert summary(open_source(str(archive(tmp_path / "a.tar", members)))) == [("a.tar/a.png", "train", None)]


def test_nothing_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = archive(tmp_path / "in" / "a.tar", WEB_DATASET)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert len(records(open_source(str(file)))) == 3
    assert list((tmp_path / "cwd").iterdir()) == []
    assert [entry.name for entry in file.parent.iterdir()] == ["a.tar"]


def test_a_long_archive_is_not_remembered_member_by_member(tmp_path: Path) -> None:
    archive(tmp_path / "a.tar", [(f"{number}.png", b"") for number in range(5000)])
    [chunk] = open_source(f"{tmp_path}/a.tar").chunks(1)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_chunk(chunk)) == 5000
        # 5000 members of about a kilobyte each would be 5 MB.
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
