import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spice_ray.errors import DataError
from spice_ray.readers.arrays import open_array
from spice_ray.readers.records import Unreadable, read_chunk
from tests.readers.reading import listed, numbers, records, summary


def saved(file: Path, array: Any) -> Path:
    np.save(file, array)
    return file


def counted(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (np.arange(np.prod(shape)) % 251).astype(np.uint8).reshape(shape)


@pytest.mark.parametrize("shape", [(7, 5, 6), (7, 5, 6, 1), (7, 5, 6, 3), (7, 5, 6, 4), (7, 4, 4, 3), (7, 1, 6)])
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 8])
def test_rows_come_as_they_were_saved(tmp_path: Path, shape: tuple[int, ...], rows_per_chunk: int) -> None:
    source = open_array(listed(saved(tmp_path / "x.npy", counted(*shape))))
    found = records(source, rows_per_chunk)
    assert [record.source for record in found] == [f"x.npy#{row}" for row in range(7)]
    assert {(record.split, record.label) for record in found} == {("train", None)}
    assert (source.kind, source.labels_known) == ("array", False)
    assert np.array_equal(np.stack([numbers(record) for record in found]), counted(*shape))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_can_only_be_second_are_moved_last(tmp_path: Path, channels: int) -> None:
    found = records(open_array(listed(saved(tmp_path / "x.npy", counted(2, channels, 5, 6)))))
    image = numbers(found[1])
    assert image.shape == (5, 6, channels)
    # Row 2, column 4 of the last channel of the second image.
    assert image[2, 4, -1] == (channels * 30 + (channels - 1) * 30 + 2 * 6 + 4) % 251


@pytest.mark.parametrize("shape", [(2, 3, 9, 3), (2, 3, 9, 4), (2, 1, 9, 1), (2, 3, 3, 3)])
def test_channels_that_could_be_at_both_ends_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = saved(tmp_path / "x.npy", counted(*shape))
    with pytest.raises(DataError, match=r"uint8 of shape \(2, .* both the second and the last axis .* transpose\(0, 2"):
        open_array(listed(file))


@pytest.mark.parametrize("shape", [(2, 2, 9, 9), (2, 4, 9, 9), (2, 9, 9, 2), (2, 9, 9, 5)])
def test_a_shape_without_channels_is_refused_with_the_advice_to_transpose(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    file = saved(tmp_path / "x.npy", counted(*shape))
    with pytest.raises(DataError, match=r"no axis can be the channels: needed are .*transpose\(0, 2, 3, 1\)"):
        open_array(listed(file))


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"float32 of shape \(2, 4, 4, 3\)"),
        (np.zeros((2, 4, 4), np.int64), r"int64 of shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4), np.int8), r"int8 of shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4), bool), r"bool of shape \(2, 4, 4\)"),
        (np.zeros((2, 16), np.uint8), r"uint8 of shape \(2, 16\)"),
        (np.zeros((2, 1, 4, 4, 3), np.uint8), r"uint8 of shape \(2, 1, 4, 4, 3\)"),
        (np.uint8(3), r"uint8 of shape \(\)"),
        (np.array(["cat", "dog"]), r"str\d+ of shape \(2,\)"),
    ],
)
def test_another_type_or_shape_is_named_with_what_is_needed(tmp_path: Path, array: Any, found: str) -> None:
    file = saved(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=rf"x\.npy holds {found}, needed are uint8 images of shape \(N, H, W\)"):
        open_array(listed(file))


@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 4, 0, 3)])
def test_images_without_pixels_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = saved(tmp_path / "x.npy", counted(*shape))
    with pytest.raises(DataError, match="whose images have no pixels"):
        open_array(listed(file))


def test_an_array_without_images_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.npy", counted(0, 4, 4))
    with pytest.raises(DataError, match=r"x\.npy holds no rows; give a file with at least one"):
        open_array(listed(file))


def header(text: str) -> bytes:
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("latin1")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04 an archive of arrays",
        b"\x89PNG\r\n\x1a\n",
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 4, 4)}") + bytes(31),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775807, 4, 4)}") + bytes(32),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 4, 4)}") + bytes(32),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -4, 4)}") + bytes(32),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': 'many'}") + bytes(32),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 4, 4)}") + bytes(256),
        header("__import__('os').mkdir('trap')") + bytes(32),
        header("{'descr': '|u1'"),
    ],
)
def test_a_damaged_or_hostile_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npy (is not a whole \.npy file|holds) .*; .*save"):
        open_array(listed(tmp_path / "x.npy"))


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.npy", np.array([{"a": 1}, None], dtype=object))
    assert np.load(file, allow_pickle=True)[0] == {"a": 1}
    with pytest.raises(DataError, match=r"not a whole .* file of plain numbers"):
        open_array(listed(file))


def test_a_missing_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.npy cannot be read \(No such file or directory\)"):
        open_array(listed(tmp_path / "x.npy"))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i4"])
def test_integers_beside_the_array_are_its_labels(tmp_path: Path, dtype: Any) -> None:
    file = saved(tmp_path / "x.v2.npy", counted(3, 4, 4))
    saved(tmp_path / "x.v2.labels.npy", np.array([2, 0, 101]).astype(dtype))
    source = open_array(listed(file))
    assert source.labels_known
    assert summary(source) == [("x.v2.npy#0", "train", 2), ("x.v2.npy#1", "train", 0), ("x.v2.npy#2", "train", 101)]


def test_a_negative_label_is_withheld(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.npy", counted(2, 4, 4))
    saved(tmp_path / "x.labels.npy", np.array([-1, 3]))
    assert [label for _, _, label in summary(open_array(listed(file)))] == [None, 3]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.zeros(2, np.int64), r"int64 of shape \(2,\)"),
        (np.zeros((3, 1), np.int64), r"int64 of shape \(3, 1\)"),
        (np.zeros(3), r"float64 of shape \(3,\)"),
        (np.zeros(3, bool), r"bool of shape \(3,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: Any, found: str) -> None:
    file = saved(tmp_path / "x.npy", counted(3, 4, 4))
    saved(tmp_path / "x.labels.npy", labels)
    with pytest.raises(DataError, match=rf"x\.labels\.npy holds {found}, needed are integers of shape \(3,\)"):
        open_array(listed(file))


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_labels_are_never_unpickled(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.npy", counted(1, 4, 4))
    saved(tmp_path / "x.labels.npy", np.array([Payload(tmp_path / "trap")], dtype=object))
    with pytest.raises(DataError, match=r"x\.labels\.npy is not a whole .* file of plain numbers"):
        open_array(listed(file))
    assert not (tmp_path / "trap").exists()


def test_labels_have_no_part_in_the_digest_and_images_have(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.npy", counted(3, 4, 4))
    before = open_array(listed(file)).listing_digest()
    saved(tmp_path / "x.labels.npy", np.array([1, 2, 3]))
    assert open_array(listed(file)).listing_digest() == before
    saved(file, counted(3, 4, 5))
    assert open_array(listed(file)).listing_digest() != before
    # Pixels: no shard can hold them as encoded files.
    assert open_array(listed(file)).encoded_bytes() is None


def test_an_array_in_fortran_order_gives_the_same_rows(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.npy", np.asfortranarray(counted(5, 4, 6, 3)))
    found = records(open_array(listed(file)), 2)
    assert np.array_equal(np.stack([numbers(record) for record in found]), counted(5, 4, 6, 3))


@pytest.mark.parametrize("lost", [None, (1, 4, 4)])
def test_rows_lost_after_listing_are_rejects(tmp_path: Path, lost: tuple[int, ...] | None) -> None:
    file = saved(tmp_path / "x.npy", counted(3, 4, 4))
    chunks = open_array(listed(file)).chunks(2)
    file.unlink()
    if lost is not None:
        saved(file, counted(*lost))
    found = [record for chunk in chunks for record in read_chunk(chunk)]
    assert [record.source for record in found] == ["x.npy#0", "x.npy#1", "x.npy#2"]
    assert all(isinstance(record.data, Unreadable) for record in found)


def test_a_range_of_a_large_file_is_read_without_the_rest(tmp_path: Path) -> None:
    # 64 GB that are not there: a sparse file of zeros whose last row alone was written.
    rows, side = (1 << 16) + 1, 1024
    with open(tmp_path / "x.npy", "wb") as file:
        file.write(header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({rows}, {side}, {side})}}"))
        file.seek((rows - 1) * side * side, os.SEEK_CUR)
        file.write(bytes([7]) * side * side)
    chunks = open_array(listed(tmp_path / "x.npy")).chunks(1 << 15)
    assert [chunk.num_rows for chunk in chunks] == [1 << 15, 1 << 15, 1]
    assert numbers(next(iter(read_chunk(chunks[0])))).tolist()[0][0] == 0
    assert numbers(next(iter(read_chunk(chunks[2])))).tolist()[0][0] == 7
