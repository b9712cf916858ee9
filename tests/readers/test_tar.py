import gzip
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from spice_ray.readers.source import Unreadable, open_source
from tests.readers.sample_files import IMAGES, WEB_DATASET, archive, contents, records, summary, tar_bytes


def test_members_with_one_key_are_one_image_and_its_label(tmp_path: Path) -> None:
    source = open_source(str(archive(tmp_path / "a.tar", WEB_DATASET)))
    assert source.kind == "tar"
    assert source.labels_known
    assert summary(source) == [
        ("a.tar/000.png", "train", 3),
        ("a.tar/001.png", "train", 5),
        ("a.tar/003.png", "train", None),
    ]
    assert list(contents(source).values()) == IMAGES[:3]


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("a.cls", b" 7 \n", 7),
        ("a.cls", b"-1", None),
        ("a.cls", b"cat\n", "cat"),
        ("a.cls", b"", None),
        ("a.cls", b"\xff\xfe", None),
        ("a.json", b'{"label": "cat"}', "cat"),
        ("a.json", b'{"label": -1}', None),
        ("a.json", b'{"label": true}', None),
        ("a.json", b'{"label": [1]}', None),
        ("a.json", b'{"other": 1}', None),
        ("a.json", b"[" * 100_000, None),
        ("a.json", b"not json", None),
        ("a.json", b"3", None),
    ],
)
@pytest.mark.parametrize("image_first", [True, False])
def test_labels_are_numbers_or_text_and_anything_else_costs_no_image(
    tmp_path: Path, name: str, content: bytes, label: object, image_first: bool
) -> None:
    members = [("a.png", IMAGES[0]), (name, content)]
    file = archive(tmp_path / "a.tar", members if image_first else members[::-1])
    assert summary(open_source(str(file))) == [("a.tar/a.png", "train", label)]


def test_a_label_of_another_key_is_another_samples(tmp_path: Path) -> None:
    members = [
        ("x/a.png", IMAGES[0]),
        ("y/a.cls", b"1"),
        ("y/a.jpg", IMAGES[1]),
        ("ab.cls", b"2"),
        ("a.png", IMAGES[2]),
    ]
    assert [label for _, _, label in summary(open_source(str(archive(tmp_path / "a.tar", members))))] == [None, 1, None]


def test_a_folder_that_was_packed_gives_the_records_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, name in enumerate(["b.png", "test/x.png", "train/cat/y.z.png", "notes.csv", ".hidden.png", "._b.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGES[number])
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        opened.add(root, ".")
    packed = {(r.source.removeprefix("a.tar/"), r.split, r.data) for r in records(open_source(f"{tmp_path}/a.tar"))}
    assert packed == {(r.source, r.split, r.data) for r in records(open_source(str(root)))}
    assert len(packed) == 3


def test_an_image_beside_the_samples_own_is_listed_with_the_reason(tmp_path: Path) -> None:
    members = [("a.mask.png", IMAGES[0]), ("a.png", IMAGES[1]), ("a.jpg", IMAGES[2]), ("a.cls", b"1")]
    source = open_source(str(archive(tmp_path / "a.tar", members)))
    reason = "it belongs to the image a.png, of which one is taken"
    assert contents(source) == {
        "a.tar/a.mask.png": Unreadable(reason),
        "a.tar/a.png": IMAGES[1],
        "a.tar/a.jpg": Unreadable(reason),
    }
    assert {label for _, _, label in summary(source)} == {1}


def test_photographs_with_dots_in_their_names_all_count(tmp_path: Path) -> None:
    members = [(f"IMG.2024.{number:03d}.png", IMAGES[number % 10]) for number in range(40)]
    found = contents(open_source(str(archive(tmp_path / "a.tar", members))))
    assert found == {f"a.tar/{name}": data for name, data in members}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst"])
def test_compressed_archives_give_the_same_records(tmp_path: Path, suffix: str) -> None:
    plain = tar_bytes(WEB_DATASET)
    packed = {"r": plain, "z": gzip.compress(plain), "t": pa.compress(plain, "zstd", asbytes=True)}
    kind = "r" if suffix == ".tar" else "z" if suffix.endswith("gz") else "t"
    (tmp_path / f"a{suffix}").write_bytes(packed[kind])
    found = records(open_source(str(tmp_path / f"a{suffix}")))
    assert [(record.label, record.data) for record in found] == [(3, IMAGES[0]), (5, IMAGES[1]), (None, IMAGES[2])]
    assert found[0].source == f"a{suffix}/000.png"


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_header_gives_the_same_names(tmp_path: Path, format_: int) -> None:
    name = "folder/" * 13 + "x.png"
    (tmp_path / "a.tar").write_bytes(tar_bytes([(name, IMAGES[0]), ("y.png", IMAGES[1])], format_=format_))
    assert list(contents(open_source(f"{tmp_path}/a.tar"))) == [f"a.tar/{name}", "a.tar/y.png"]


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    archive(tmp_path / "a.tar", [(os.fsdecode(b"caf\xe9.png"), IMAGES[0])])
    assert contents(open_source(f"{tmp_path}/a.tar")) == {"a.tar/caf\\xe9.png": IMAGES[0]}


def test_each_archive_is_a_chunk_of_unknown_length(tmp_path: Path) -> None:
    for name in ("train-0", "test-0", "train-1"):
        archive(tmp_path / f"{name}.tar", [("0.png", IMAGES[0]), ("1.png", IMAGES[1])])
    source = open_source(f"{tmp_path}/*.tar")
    assert [chunk.num_rows for chunk in source.chunks(1)] == [None, None, None]
    assert [(name, split) for name, split, _ in summary(source)] == [
        ("test-0.tar/0.png", "test"),
        ("test-0.tar/1.png", "test"),
        ("train-0.tar/0.png", "train"),
        ("train-0.tar/1.png", "train"),
        ("train-1.tar/0.png", "train"),
        ("train-1.tar/1.png", "train"),
    ]
    assert source.encoded_bytes() == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_the_listing_digest_follows_the_archives(tmp_path: Path) -> None:
    file = archive(tmp_path / "a.tar", WEB_DATASET)
    digest = open_source(str(file)).listing_digest()
    assert open_source(str(tmp_path)).listing_digest() == digest
    os.utime(file, ns=(10**18, 10**18))
    assert open_source(str(file)).listing_digest() != digest
