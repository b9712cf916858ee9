import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from spice_ray.errors import DataError
from spice_ray.readers.records import Unreadable, read_chunk
from tests.readers.cifar_files import cifar_rows, put_binary_cifar10, put_cifar100, put_python_cifar10, python2_pickle
from tests.readers.reading import numbers, opened, records, summary


def test_a_cifar_batch_is_pickled_as_python_2_did_it() -> None:
    # Protocol 2, an empty dictionary, and its first key as a short string: the first bytes of the published batches.
    assert python2_pickle({b"batch_label": b""})[:17] == b"\x80\x02}q\x00U\x0bbatch_labe"
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in python2_pickle(cifar_rows(0, 1))


@pytest.mark.parametrize("put", [put_python_cifar10, put_binary_cifar10])
def test_cifar10_has_five_batches_of_training_and_one_of_test(tmp_path: Path, put: Callable[[Path], Path]) -> None:
    source = opened(put(tmp_path))
    assert (source.kind, source.labels_known) == ("cifar10", True)
    assert summary(source) == [
        ("cifar10/train/00000", "train", 0),
        ("cifar10/train/00001", "train", 1),
        ("cifar10/train/00002", "train", 1),
        ("cifar10/train/00003", "train", 2),
        ("cifar10/train/00004", "train", 2),
        ("cifar10/train/00005", "train", 3),
        ("cifar10/train/00006", "train", 3),
        ("cifar10/train/00007", "train", 4),
        ("cifar10/train/00008", "train", 4),
        ("cifar10/train/00009", "train", 5),
        ("cifar10/test/00000", "test", 5),
        ("cifar10/test/00001", "test", 6),
    ]


@pytest.mark.parametrize("put", [put_python_cifar10, put_binary_cifar10])
def test_a_cifar_row_is_three_planes_of_rows(tmp_path: Path, put: Callable[[Path], Path]) -> None:
    image = numbers(records(opened(put(tmp_path)))[3])
    assert image.shape == (32, 32, 3)
    assert image[2, 5].tolist() == [201, 3, 3]
    assert image[0, 31].tolist() == [3, 102, 3]
    assert image[31, 0].tolist() == [3, 3, 53]
    assert image[5, 2].tolist() == [3, 3, 3]


def test_both_versions_of_cifar10_give_the_same_records(tmp_path: Path) -> None:
    python = records(opened(put_python_cifar10(tmp_path / "py", 5)))
    binary = records(opened(put_binary_cifar10(tmp_path / "bin", 5)))
    assert len(python) == 30
    for one, other in zip(python, binary, strict=True):
        assert (one.source, one.split, one.label) == (other.source, other.split, other.label)
        assert numbers(one).tobytes() == numbers(other).tobytes()


def test_cifar100_is_labelled_by_its_superclasses(tmp_path: Path) -> None:
    source = opened(put_cifar100(tmp_path))
    assert source.kind == "cifar100"
    assert summary(source) == [
        ("cifar100/train/00000", "train", 15),
        ("cifar100/train/00001", "train", 16),
        ("cifar100/train/00002", "train", 17),
        ("cifar100/train/00003", "train", 18),
        ("cifar100/train/00004", "train", 19),
        ("cifar100/test/00000", "test", 0),
        ("cifar100/test/00001", "test", 1),
    ]
    assert numbers(records(source)[6])[9, 9].tolist() == [6, 6, 6]


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 4, 5, 1000])
def test_chunks_cover_every_row_once_whatever_their_size(tmp_path: Path, rows_per_chunk: int) -> None:
    source = opened(put_binary_cifar10(tmp_path, 4))
    names = [record.source for record in records(source, rows_per_chunk)]
    assert names == [f"cifar10/train/{row:05d}" for row in range(20)] + [f"cifar10/test/{row:05d}" for row in range(4)]


def test_a_pickled_batch_is_loaded_eight_times_at_most(tmp_path: Path) -> None:
    chunks = opened(put_python_cifar10(tmp_path, 20)).chunks(1)
    # 20 rows in ranges of 3.
    assert [chunk.num_rows for chunk in chunks[:7]] == [3, 3, 3, 3, 3, 3, 2]
    assert len(chunks) == 6 * 7


def test_a_number_of_images_that_was_not_published_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        opened(put_binary_cifar10(tmp_path)).chunks(10)
    assert "10 train, 2 test images, published are 50000 train, 10000 test" in caplog.text


@pytest.mark.parametrize(
    ("put", "name"),
    [(put_python_cifar10, "data_batch_4"), (put_binary_cifar10, "test_batch.bin"), (put_cifar100, "test")],
)
def test_a_missing_file_of_cifar_is_named(tmp_path: Path, put: Callable[[Path], Path], name: str) -> None:
    (put(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=f"looks like CIFAR.* but lacks {name}; unpack"):
        opened(tmp_path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_binary_batch_of_a_broken_size_is_refused_with_both_sizes(tmp_path: Path, change: int) -> None:
    file = put_binary_cifar10(tmp_path) / "data_batch_5.bin"
    file.write_bytes(file.read_bytes()[:-1] if change < 0 else file.read_bytes() + b"\0")
    with pytest.raises(DataError, match=rf"data_batch_5.bin has {2 * 3073 + change} bytes, .* multiple of the 3073 of"):
        opened(tmp_path).chunks(10)


def test_a_binary_batch_with_a_label_beyond_the_classes_is_refused(tmp_path: Path) -> None:
    file = put_binary_cifar10(tmp_path) / "data_batch_1.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"data_batch_1\.bin holds labels 1 to 10 instead of 0 to 9"):
        opened(tmp_path).chunks(10)


@pytest.mark.parametrize("put", [put_python_cifar10, put_binary_cifar10])
def test_batches_without_a_single_image_are_refused(tmp_path: Path, put: Callable[[Path, int], Path]) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        opened(put(tmp_path, 0)).chunks(10)


@pytest.mark.parametrize(("put", "suffix"), [(put_python_cifar10, ""), (put_binary_cifar10, ".bin")])
def test_rows_of_a_batch_that_is_lost_after_listing_are_rejects(
    tmp_path: Path, put: Callable[[Path], Path], suffix: str
) -> None:
    source = opened(put(tmp_path))
    chunks = source.chunks(10)
    (tmp_path / f"data_batch_1{suffix}").unlink()
    (tmp_path / f"data_batch_2{suffix}").write_bytes((tmp_path / f"data_batch_3{suffix}").read_bytes()[:3100])
    found = [record for chunk in chunks for record in read_chunk(chunk)]
    lost = {record.source[-2:]: record.data.reason for record in found if isinstance(record.data, Unreadable)}
    assert len(found) == 12
    assert lost["00"] == lost["01"] == "the file of this row cannot be read: No such file or directory"
    assert lost["03"] == "the file of this row cannot be read: it has changed since the start"
    assert set(lost) == ({"00", "01", "03"} if suffix else {"00", "01", "02", "03"})


def test_the_digest_follows_the_images_and_not_the_place(tmp_path: Path) -> None:
    source = opened(put_binary_cifar10(tmp_path / "a"))
    before = source.listing_digest()
    (tmp_path / "a").rename(tmp_path / "b")
    assert opened(tmp_path / "b").listing_digest() == before
    (tmp_path / "b" / "test_batch.bin").write_bytes(bytes(3 * 3073))
    assert opened(tmp_path / "b").listing_digest() != before
    assert len(before) == 32
