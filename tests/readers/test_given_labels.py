from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spice_ray.errors import DataError
from spice_ray.readers.given_labels import read_given_labels


def write(folder: Path, **columns: Any) -> str:
    pq.write_table(pa.table(columns), folder / "labels.parquet")
    return str(folder / "labels.parquet")


def test_labels_are_named_by_sample_id_or_by_source(tmp_path: Path) -> None:
    by_id = read_given_labels(write(tmp_path, sample_id=pa.array([7, 3], pa.int32()), label=[1, 0]), 2)
    assert (by_id.by_source, by_id.images.to_pylist(), by_id.labels.tolist()) == (False, [7, 3], [1, 0])
    by_source = read_given_labels(write(tmp_path, source=["b.png", "a.png"], label=pa.array([2, 0], pa.uint8())), 3)
    assert (by_source.by_source, by_source.images.to_pylist(), by_source.labels.tolist()) == (
        True,
        ["b.png", "a.png"],
        [2, 0],
    )
    both = read_given_labels(write(tmp_path, sample_id=[4, 5], source=["b", "a"], label=[0, 1]), 2)
    assert not both.by_source


def test_texts_may_be_stored_as_a_dictionary(tmp_path: Path) -> None:
    file = write(tmp_path, source=pa.array(["b", "a"]).dictionary_encode(), label=[0, 1])
    assert read_given_labels(file, 2).images.to_pylist() == ["b", "a"]


def test_the_digest_is_that_of_the_labels_in_any_order(tmp_path: Path) -> None:
    first = read_given_labels(write(tmp_path, sample_id=[1, 2, 10], label=[0, 1, 1]), 2)
    same = read_given_labels(write(tmp_path, sample_id=[10, 1, 2], label=[1, 0, 1]), 2)
    other = read_given_labels(write(tmp_path, sample_id=[10, 1, 2], label=[0, 0, 1]), 2)
    assert first.digest() == same.digest() != other.digest()


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"image": [1, 2], "label": [0, 1]}, r"has the columns image, label; give a Parquet file with a column label"),
        ({"sample_id": [1, 2]}, r"has the columns sample_id; give"),
        ({"sample_id": [1, 2], "label": [0, 2]}, r"holds the label 2, and with num_clusters=2 labels are 0 to 1"),
        ({"sample_id": [1, 2], "label": [0, -1]}, r"holds the label -1"),
        ({"sample_id": [1, 1], "label": [0, 1]}, r"labels sample_id 1 more than once"),
        ({"source": ["a", "a", "b"], "label": [0, 1, 1]}, r"labels source a more than once"),
        ({"sample_id": [1, 2], "label": [1, 1]}, r"holds 1 different labels, and 2 are needed"),
        ({"sample_id": pa.array([], pa.int64()), "label": pa.array([], pa.int64())}, r"holds 0 different labels"),
        ({"sample_id": [1, None], "label": [0, 1]}, r"sample_id of .* is of type int64, or has gaps"),
        ({"sample_id": [1, 2], "label": ["cat", "dog"]}, r"the column label of .* is of type string"),
        ({"sample_id": ["1", "2"], "label": [0, 1]}, r"the column sample_id of .* is of type string"),
        ({"source": [1, 2], "label": [0, 1]}, r"the column source of .* is of type int64"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_given_labels(write(tmp_path, **columns), 2)


def test_a_file_that_is_missing_or_something_else_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reliable.labels=.*none.parquet does not exist; give"):
        read_given_labels(str(tmp_path / "none.parquet"), 2)
    (tmp_path / "labels.csv").write_text("sample_id,label")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_given_labels(str(tmp_path / "labels.csv"), 2)
