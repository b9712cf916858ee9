import logging
import os
from pathlib import Path

import pytest

from spice_ray.readers import files
from spice_ray.readers.source import Unreadable, open_source, read_chunk
from tests.readers.sample_files import contents, png, put, records, summary


def test_a_folder_gives_relative_names_in_byte_order_and_splits_by_its_first_level(tmp_path: Path) -> None:
    put(
        tmp_path,
        "b.png",
        "train/x.png",
        "test/x.png",
        "val/deep/er/x.JPG",
        "unlabeled/x.webp",
        "testing/x.png",
        "other/test/x.png",
        "Z.png",
    )
    assert summary(open_source(str(tmp_path))) == [
        ("Z.png", "train", None),
        ("b.png", "train", None),
        ("other/test/x.png", "train", None),
        ("test/x.png", "test", None),
        ("testing/x.png", "train", None),
        ("train/x.png", "train", None),
        ("unlabeled/x.webp", "unlabeled", None),
        ("val/deep/er/x.JPG", "test", None),
    ]


def test_labels_are_parent_folders_but_neither_splits_nor_the_source_itself(tmp_path: Path) -> None:
    put(tmp_path, "top.png", "cat/a.png", "train/dog/a.png", "train/a.png", "unlabeled/a.png")
    assert summary(open_source(str(tmp_path), labels_from_folders=True)) == [
        ("cat/a.png", "train", "cat"),
        ("top.png", "train", None),
        ("train/a.png", "train", None),
        ("train/dog/a.png", "train", "dog"),
        ("unlabeled/a.png", "unlabeled", None),
    ]
    assert not open_source(str(tmp_path)).labels_known


def test_hidden_entries_and_other_files_are_ignored_and_the_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a.png", ".hidden.png", ".cache/b.png", "._a.png", "notes.txt", "table.csv", "paper.pdf")
    os.mkfifo(tmp_path / "pipe.png")
    with caplog.at_level(logging.INFO):
        assert [record.source for record in records(open_source(str(tmp_path)))] == ["a.png"]
    assert "4 files are left out" in caplog.text


def test_links_to_files_are_followed_and_links_to_folders_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = put(tmp_path / "root", "sub/a.png")
    outside = put(tmp_path / "outside", "b.png")
    (root / "loop").symlink_to(root)
    (root / "linked.png").symlink_to(outside)
    (root / "b.png").symlink_to(outside / "b.png")
    with caplog.at_level(logging.INFO):
        assert contents(open_source(str(root))) == {"b.png": png(0), "sub/a.png": png(0)}
    assert "2 links to folders are not followed" in caplog.text


def test_a_file_that_vanished_or_cannot_be_read_is_a_record_with_a_reason(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "gone.png")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    chunks = open_source(str(tmp_path)).chunks(10)
    (tmp_path / "gone.png").unlink()
    found = {record.source: record.data for chunk in chunks for record in read_chunk(chunk)}
    assert found["a.png"] == png(0)
    assert found["gone.png"] == Unreadable("the file cannot be read: No such file or directory")
    assert found["broken.png"] == Unreadable("the file cannot be read: No such file or directory")
    assert found["circle.png"] == Unreadable("the file cannot be read: Too many levels of symbolic links")


def test_a_sparse_giant_is_refused_without_reading_it(tmp_path: Path) -> None:
    put(tmp_path, "giant.png")
    os.truncate(tmp_path / "giant.png", files.MAX_FILE_BYTES + 1)
    [record] = records(open_source(str(tmp_path)))
    assert isinstance(record.data, Unreadable)
    assert str(files.MAX_FILE_BYTES + 1) in record.data.reason


def test_names_that_are_not_utf8_are_told_apart_and_read(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", "caf\u00e9.png".encode(), b"new\nline.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(png(7))
    found = records(open_source(str(tmp_path)))
    assert [record.source for record in found] == ["caf\u00e9.png", "caf\\xe9.png", "new\nline.png"]
    assert all(record.data == png(7) for record in found)


def test_wildcards_in_a_name_that_exists_are_letters(tmp_path: Path) -> None:
    put(tmp_path, "a[1]*?/x.png", "a1/y.png")
    assert list(contents(open_source(f"{tmp_path}/a[1]*?"))) == ["x.png"]


def test_a_file_url_is_a_local_folder(tmp_path: Path) -> None:
    put(tmp_path, "my images/x.png")
    assert list(contents(open_source(f"file://{tmp_path}/my%20images"))) == ["x.png"]


def test_the_listing_digest_follows_names_sizes_and_times(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    os.utime(tmp_path / "b.png", ns=(10**18, 10**18))

    def digest() -> str:
        return open_source(str(tmp_path)).listing_digest()

    seen = [digest()]
    assert digest() == seen[0]
    os.utime(tmp_path / "b.png", ns=(10**18, 10**18 + 1))
    seen.append(digest())
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    seen.append(digest())
    os.truncate(tmp_path / "c.png", 5)
    os.utime(tmp_path / "c.png", ns=(10**18, 10**18 + 1))
    seen.append(digest())
    (tmp_path / "c.png").unlink()
    (tmp_path / "c.png").symlink_to("nowhere")
    seen.append(digest())
    assert len(set(seen)) == 5
    assert len(seen[0]) == 32


def test_the_listing_digest_knows_neither_labels_nor_the_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        put(tmp_path / name, "cat/a.png", "dog/b.png")
        for image in (tmp_path / name).rglob("*.png"):
            os.utime(image, ns=(10**18, 10**18))
    digests = {
        open_source(str(tmp_path / name), labels_from_folders=labels).listing_digest()
        for name in ("one", "two")
        for labels in (False, True)
    }
    assert len(digests) == 1


def test_a_folder_is_listed_once(tmp_path: Path) -> None:
    source = open_source(str(put(tmp_path, "a.png", "b.png")))
    digest = source.listing_digest()
    put(tmp_path, "c.png")
    assert sum(chunk.num_rows or 0 for chunk in source.chunks(10)) == 2
    assert source.listing_digest() == digest


def test_encoded_bytes_are_the_sum_of_the_files_and_unknown_where_one_is(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "sub/b.png", "notes.txt")
    assert open_source(str(tmp_path)).encoded_bytes() == len(png(0)) + len(png(1))
    (tmp_path / "c.png").symlink_to("nowhere")
    assert open_source(str(tmp_path)).encoded_bytes() is None
