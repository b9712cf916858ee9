from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from spice_ray.errors import DataError
from spice_ray.readers.embeddings import holds_embeddings, open_embeddings
from spice_ray.readers.records import Unreadable
from tests.readers.embedding_files import FIXED, counted, lists, saved, table, vectors
from tests.readers.reading import listed, reasons, records, summary

# --- .npy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
@pytest.mark.parametrize("rows_per_chunk", [1, 2, 5, 6])
def test_rows_of_an_array_come_in_32_bits(tmp_path: Path, dtype: Any, rows_per_chunk: int) -> None:
    source = open_embeddings([listed(saved(tmp_path / "x.npy", np.array(counted(5)).astype(dtype)))])
    assert (source.kind, source.dim, source.labels_known) == ("embeddings", 3, False)
    found = vectors(source, rows_per_chunk)
    assert found.dtype == np.dtype(np.float32)
    assert found.tolist() == [[1.0, 0.5, 0.0], [2.0, 0.5, -1.0], [3.0, 0.5, -2.0], [4.0, 0.5, -3.0], [5.0, 0.5, -4.0]]
    assert summary(source)[4] == ("x.npy#4", "train", None)


def test_integers_beside_an_array_of_embeddings_are_its_labels(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.npy", np.array(counted(2)))
    saved(tmp_path / "x.labels.npy", np.array([4, -1]))
    source = open_embeddings([listed(file)])
    assert source.labels_known
    assert [label for _, _, label in summary(source)] == [4, None]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1.0, np.nan, 2.0], "the embedding holds a number that is not finite in 32 bits"),
        ([np.inf, 1.0, 2.0], "the embedding holds a number that is not finite in 32 bits"),
        ([-np.inf, 0.0, 0.0], "the embedding holds a number that is not finite in 32 bits"),
        ([1e39, 1.0, 2.0], "the embedding holds a number that is not finite in 32 bits"),
        ([0.0, 0.0, 0.0], "the embedding is all zeros in 32 bits"),
        ([-0.0, 0.0, 0.0], "the embedding is all zeros in 32 bits"),
        ([1e-60, 0.0, 0.0], "the embedding is all zeros in 32 bits"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_row_without_a_direction_is_a_reject(tmp_path: Path, row: list[float], reason: str, kind: str) -> None:
    rows = [[1.0, 2.0, 3.0], row, [0.0, 0.0, 1e-30]]
    if kind == "npy":
        source = open_embeddings([listed(saved(tmp_path / "x.npy", np.array(rows)))])
    else:
        column = lists(rows, pa.list_(pa.float64(), 3))
        source = open_embeddings([listed(table(tmp_path / "x.parquet", {"embedding": column}))])
    found = records(source)
    assert [isinstance(record.data, Unreadable) for record in found] == [False, True, False]
    assert reasons(source) == [reason]


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 3), np.int64), r"int64 of shape \(2, 3\)"),
        (np.zeros((2, 3), complex), r"complex128 of shape \(2, 3\)"),
        (np.zeros((2, 3), np.longdouble), r"\w+ of shape \(2, 3\)"),
        (np.zeros(3), r"float64 of shape \(3,\)"),
        (np.zeros((2, 3, 1)), r"float64 of shape \(2, 3, 1\)"),
        (np.zeros((2, 0)), r"float64 of shape \(2, 0\)"),
    ],
)
def test_an_array_of_something_else_is_named(tmp_path: Path, array: Any, found: str) -> None:
    file = saved(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=rf"x\.npy holds {found}, needed are embeddings in float16, float32 or float64"):
        open_embeddings([listed(file)])


def test_an_array_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.npy holds no rows"):
        open_embeddings([listed(saved(tmp_path / "x.npy", np.zeros((0, 3))))])


# --- several files


def test_files_of_the_same_width_make_one_source(tmp_path: Path) -> None:
    files = [
        table(tmp_path / "train-0.parquet", {"embedding": lists(counted(2), FIXED)}),
        table(tmp_path / "train-1.parquet", {"embedding": lists(counted(1), pa.list_(pa.float64()))}),
        saved(tmp_path / "more.npy", np.array(counted(1))),
    ]
    source = open_embeddings([listed(file) for file in files])
    assert [name for name, _, _ in summary(source)] == [
        "train-0.parquet#0",
        "train-0.parquet#1",
        "train-1.parquet#0",
        "more.npy#0",
    ]
    assert source.encoded_bytes() is None
    assert source.listing_digest() != open_embeddings([listed(file) for file in files[:2]]).listing_digest()


def test_files_of_different_widths_are_refused_with_both(tmp_path: Path) -> None:
    files = [
        table(tmp_path / "a.parquet", {"embedding": lists(counted(2), FIXED)}),
        table(tmp_path / "b.parquet", {"embedding": lists(counted(2, 5), pa.list_(pa.float32()))}),
    ]
    source = open_embeddings([listed(file) for file in files])
    with pytest.raises(DataError, match=r"b\.parquet holds embeddings of 5 numbers and .*a\.parquet of 3; give files"):
        source.chunks(10)


# --- telling embeddings from images


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 3), np.float32), True),
        (np.zeros((2, 3), np.uint8), False),
        (np.zeros((2, 3, 3), np.float32), False),
        (np.zeros((2, 3, 3), np.uint8), False),
        (np.array([None, {}], object), False),
    ],
)
def test_an_array_of_floating_point_rows_holds_embeddings(tmp_path: Path, array: Any, expected: bool) -> None:
    assert holds_embeddings(listed(saved(tmp_path / "x.npy", array))) is expected


def test_a_file_that_cannot_be_read_holds_none(tmp_path: Path) -> None:
    assert not holds_embeddings(listed(tmp_path / "x.npy"))
    (tmp_path / "x.npy").write_bytes(b"text")
    assert not holds_embeddings(listed(tmp_path / "x.npy"))
