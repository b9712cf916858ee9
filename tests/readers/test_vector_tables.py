from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spice_ray.errors import DataError
from spice_ray.readers.embeddings import open_embeddings
from spice_ray.readers.records import Unreadable, read_chunk
from tests.readers.embedding_files import FIXED, counted, lists, table, vectors
from tests.readers.reading import listed, numbers, reasons, records, summary


@pytest.mark.parametrize(
    "type_",
    [
        FIXED,
        pa.list_(pa.float16(), 3),
        pa.list_(pa.float64(), 3),
        pa.list_(pa.float32()),
        pa.large_list(pa.float64()),
    ],
)
@pytest.mark.parametrize("rows_per_group", [1, 3, 4, 7, 100])
def test_rows_of_a_table_come_in_32_bits(tmp_path: Path, type_: pa.DataType, rows_per_group: int) -> None:
    rows = [[np.float16(number) for number in row] for row in counted(7)] if type_.value_type == pa.float16() else None
    file = table(tmp_path / "x.parquet", {"embedding": lists(rows or counted(7), type_)}, rows_per_group)
    source = open_embeddings([listed(file)])
    assert (source.kind, source.dim, source.labels_known) == ("embeddings", 3, False)
    assert vectors(source).tolist() == counted(7)
    assert vectors(source).dtype == np.dtype(np.float32)
    assert len(source.chunks(2)) == -(-7 // rows_per_group)
    assert [name for name, _, _ in summary(source)] == [f"x.parquet#{row}" for row in range(7)]


@pytest.mark.parametrize("name", ["embedding", "embeddings", "feature", "features"])
def test_a_column_of_a_known_name_is_preferred(tmp_path: Path, name: str) -> None:
    columns = {"a": lists(counted(2, 5), pa.list_(pa.float32())), name: lists(counted(2), FIXED)}
    assert open_embeddings([listed(table(tmp_path / "x.parquet", columns))]).dim == 3


def test_the_only_column_of_vectors_needs_no_name(tmp_path: Path) -> None:
    columns = {"id": pa.array([3, 4]), "clip": lists(counted(2), FIXED), "box": lists([[1], [2]], pa.list_(pa.int64()))}
    source = open_embeddings([listed(table(tmp_path / "x.parquet", columns))])
    assert summary(source) == [("3", "train", None), ("4", "train", None)]


def test_two_columns_of_vectors_without_a_known_name_are_refused(tmp_path: Path) -> None:
    columns = {"clip": lists(counted(2), FIXED), "dino": lists(counted(2), FIXED)}
    with pytest.raises(DataError, match=r"has 2 columns of float lists \(clip, dino\); name the one of the embeddings"):
        open_embeddings([listed(table(tmp_path / "x.parquet", columns))])


def test_a_table_without_vectors_is_refused(tmp_path: Path) -> None:
    columns = {"embedding": pa.array([1.0, 2.0]), "id": pa.array([1, 2])}
    with pytest.raises(DataError, match="has no column of float lists; name the one of the embeddings embedding or"):
        open_embeddings([listed(table(tmp_path / "x.parquet", columns))])


def test_names_labels_and_splits_are_taken_from_their_columns(tmp_path: Path) -> None:
    splits = ["train", "test", "val", "validation", "unlabeled", None, "Train"]
    columns = {
        "path": pa.array(["a.png", "b.png", None, "d.png", "e.png", "f.png", "g.png"]),
        "embedding": lists(counted(7), FIXED),
        "label": pa.array(["cat", None, "dog", "cat", "cat", "cat", "cat"]).dictionary_encode(),
        "split": pa.array(splits),
    }
    source = open_embeddings([listed(table(tmp_path / "x_test.parquet", columns, rows_per_group=3))])
    assert source.labels_known
    assert summary(source) == [
        ("a.png", "train", "cat"),
        ("b.png", "test", None),
        ("x_test.parquet#2", "test", "dog"),
        ("d.png", "test", "cat"),
        ("e.png", "unlabeled", "cat"),
        ("f.png", "test", "cat"),
        ("g.png", "train", "cat"),
    ]


@pytest.mark.parametrize(
    ("name", "split"),
    [("x", "train"), ("test-00000-of-00002", "test"), ("validation", "test"), ("unlabeled-0", "unlabeled")],
)
def test_the_name_of_a_file_gives_the_split_of_its_rows(tmp_path: Path, name: str, split: str) -> None:
    source = open_embeddings([listed(table(tmp_path / f"{name}.parquet", {"embedding": lists(counted(1), FIXED)}))])
    assert [record.split for record in records(source)] == [split]


def test_the_first_of_the_naming_columns_counts_and_one_of_another_type_does_not(tmp_path: Path) -> None:
    columns = {
        "id": pa.array([7, 8]),
        "path": pa.array([[1], [2]]),
        "embedding": lists(counted(2), FIXED),
        "label": pa.array([5, -1]),
    }
    source = open_embeddings([listed(table(tmp_path / "x.parquet", columns))])
    assert summary(source) == [("7", "train", 5), ("8", "train", None)]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", pa.array([0.5, 1.5]), "a column label of type double, needed are integers or strings"),
        ("label", pa.array([[1], [2]]), r"a column label of type list<.*>, needed are integers or strings"),
        ("split", pa.array([0, 1]), "a column split of type int64, needed are strings"),
    ],
)
def test_a_label_or_split_of_the_wrong_type_is_refused(
    tmp_path: Path, column: str, values: pa.Array, message: str
) -> None:
    file = table(tmp_path / "x.parquet", {"embedding": lists(counted(2), FIXED), column: values})
    with pytest.raises(DataError, match=message):
        open_embeddings([listed(file)])


def test_an_unknown_split_is_a_reject(tmp_path: Path) -> None:
    columns = {"embedding": lists(counted(2), FIXED), "split": pa.array(["train", "dev"])}
    source = open_embeddings([listed(table(tmp_path / "x.parquet", columns))])
    assert reasons(source) == ["its split is 'dev', which is none of train, test, val, validation, unlabeled"]
    assert [isinstance(record.data, Unreadable) for record in records(source)] == [False, True]


def test_rows_of_another_length_or_without_a_vector_are_rejects(tmp_path: Path) -> None:
    rows = [None, [1.0, 2.0, 3.0], [1.0, 2.0], [], [1.0, None, 2.0], [1.0, 2.0, 4.0]]
    source = open_embeddings(
        [listed(table(tmp_path / "x.parquet", {"embedding": lists(rows, pa.list_(pa.float32()))}, 2))]
    )
    assert source.dim == 3
    assert reasons(source) == [
        "the row holds no embedding",
        "the embedding has 2 numbers, others have 3",
        "the embedding has 0 numbers, others have 3",
        "the embedding holds a number that is not finite in 32 bits",
    ]


def test_empty_cells_of_a_fixed_size_column_are_rejects_and_shift_nothing(tmp_path: Path) -> None:
    rows = [None, [1.0, 2.0, 3.0], None, [4.0, 5.0, None], [7.0, 8.0, 9.0], None]
    found = records(open_embeddings([listed(table(tmp_path / "x.parquet", {"embedding": lists(rows, FIXED)}))]))
    assert [isinstance(record.data, Unreadable) for record in found] == [True, False, True, True, False, True]
    assert [numbers(found[row]).tolist() for row in (1, 4)] == [[1.0, 2.0, 3.0], [7.0, 8.0, 9.0]]


def test_a_column_of_nothing_but_empty_cells_is_refused(tmp_path: Path) -> None:
    file = table(tmp_path / "x.parquet", {"embedding": lists([None, None], pa.list_(pa.float32()))})
    with pytest.raises(DataError, match="has no embedding in its column embedding"):
        open_embeddings([listed(file)])


def test_a_name_that_is_no_text_does_not_cost_the_row(tmp_path: Path) -> None:
    raw = pa.array([b"\xff\xfe", b"ok"]).cast(pa.binary())
    names = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    source = open_embeddings(
        [listed(table(tmp_path / "x.parquet", {"id": names, "embedding": lists(counted(2), FIXED)}))]
    )
    assert [name for name, _, _ in summary(source)] == ["x.parquet#0", "ok"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"text"])
def test_a_damaged_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet is not a readable Parquet file"):
        open_embeddings([listed(tmp_path / "x.parquet")])


def test_rows_of_a_table_lost_after_listing_are_rejects(tmp_path: Path) -> None:
    file = table(tmp_path / "x.parquet", {"embedding": lists(counted(5), FIXED)}, rows_per_group=2)
    chunks = open_embeddings([listed(file)]).chunks(10)
    # As many row groups as before, of fewer rows.
    table(file, {"embedding": lists(counted(3), FIXED)}, rows_per_group=1)
    found = [record for chunk in chunks for record in read_chunk(chunk)]
    assert [record.source for record in found] == [f"x.parquet#{row}" for row in range(5)]
    assert [isinstance(record.data, Unreadable) for record in found] == [False, True, False, True, False]
    file.unlink()
    lost = [record.data for chunk in chunks for record in read_chunk(chunk)]
    assert lost == [Unreadable("the Parquet file cannot be read: No such file or directory")] * 5


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    source = open_embeddings([listed(table(tmp_path / "x.parquet", {"embedding": lists([], FIXED)}))])
    with pytest.raises(DataError, match=r"x\.parquet holds no embedding; give a file with at least one row"):
        source.chunks(10)


def test_a_row_group_is_read_some_rows_at_a_time(tmp_path: Path) -> None:
    numbers_in_all = pa.array(np.random.default_rng(0).standard_normal(1 << 23, np.float32))
    column = pa.FixedSizeListArray.from_arrays(numbers_in_all, 1 << 8)
    file = table(tmp_path / "x.parquet", {"embedding": column}, rows_per_group=1 << 15)
    size = file.stat().st_size
    assert size > 30_000_000
    del numbers_in_all, column
    before = pa.total_allocated_bytes()
    read = iter(read_chunk(open_embeddings([listed(file)]).chunks(10)[0]))
    assert numbers(next(read)).shape == (1 << 8,)
    assert pa.total_allocated_bytes() - before < size / 4
