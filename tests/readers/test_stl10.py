from pathlib import Path

import pytest

from spice_ray.errors import DataError
from spice_ray.readers.records import Unreadable, read_chunk
from tests.readers.reading import numbers, opened, records
from tests.readers.stl10_files import put_stl10


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 4, 100])
def test_stl10_has_labels_1_to_10_and_a_part_without(tmp_path: Path, rows_per_chunk: int) -> None:
    source = opened(put_stl10(tmp_path))
    found = records(source, rows_per_chunk)
    # Pixels: no shard can hold them as encoded files.
    assert (source.kind, source.encoded_bytes()) == ("stl10", None)
    assert [(record.source, record.split, record.label) for record in found] == [
        ("stl10/train/00000", "train", 1),
        ("stl10/train/00001", "train", 10),
        ("stl10/train/00002", "train", 5),
        ("stl10/test/00000", "test", 7),
        ("stl10/test/00001", "test", 7),
        ("stl10/test/00002", "test", 2),
        ("stl10/test/00003", "test", 9),
        *[(f"stl10/unlabeled/{row:05d}", "unlabeled", None) for row in range(5)],
    ]
    assert [int(numbers(record)[50, 50, 0]) for record in found] == list(range(12))


def test_an_stl10_image_is_stored_column_by_column(tmp_path: Path) -> None:
    image = numbers(records(opened(put_stl10(tmp_path)))[4])
    assert image.shape == (96, 96, 3)
    # Third column, sixth row; first column, last row; last of both.
    assert image[5, 2].tolist() == [201, 4, 4]
    assert image[95, 0].tolist() == [4, 102, 4]
    assert image[95, 95].tolist() == [4, 4, 53]
    assert image[2, 5].tolist() == [4, 4, 4]


def test_a_missing_file_of_stl10_is_named(tmp_path: Path) -> None:
    (put_stl10(tmp_path) / "unlabeled_X.bin").unlink()
    (tmp_path / "test_y.bin").unlink()
    with pytest.raises(DataError, match=r"looks like STL-10 but lacks unlabeled_X\.bin, test_y\.bin; unpack"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("unlabeled_X.bin", bytes(27647), "unlabeled_X.bin has 27647 bytes, which is not a multiple of the 27648"),
        ("train_X.bin", bytes(2 * 27648), "train_X.bin holds 2 images but 3 labels are beside it"),
        ("test_y.bin", bytes([7, 7, 2]), "test_X.bin holds 4 images but 3 labels are beside it"),
        ("train_y.bin", bytes([0, 1, 2]), "are 0 to 2 instead of 1 to 10"),
        ("train_y.bin", bytes([1, 11, 2]), "are 1 to 11 instead of 1 to 10"),
    ],
)
def test_a_file_of_stl10_of_the_wrong_size_or_range_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (put_stl10(tmp_path) / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path).chunks(10)


def test_stl10_images_cut_off_after_listing_are_rejects(tmp_path: Path) -> None:
    chunks = opened(put_stl10(tmp_path)).chunks(10)
    with open(tmp_path / "unlabeled_X.bin", "r+b") as file:
        file.truncate(2 * 27648 + 5)
    found = [record for chunk in chunks for record in read_chunk(chunk)]
    assert len(found) == 12
    assert [record.source for record in found if isinstance(record.data, Unreadable)] == [
        "stl10/unlabeled/00002",
        "stl10/unlabeled/00003",
        "stl10/unlabeled/00004",
    ]


def test_the_labels_of_stl10_have_no_part_in_its_digest(tmp_path: Path) -> None:
    before = opened(put_stl10(tmp_path)).listing_digest()
    (tmp_path / "train_y.bin").write_bytes(bytes([3, 3, 3]))
    assert opened(tmp_path).listing_digest() == before
