import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spice_ray.readers.source import Unreadable, open_source, read_chunk
from tests.readers.sample_files import IMAGES, parquet, put, reasons, records, refused, summary

OFFSETS = pa.py_buffer(np.arange(4, dtype=np.int32))
NOT_UTF8 = pa.StringArray.from_buffers(3, OFFSETS, pa.py_buffer(b"a\xffb"))
STRUCT = pa.array([{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(IMAGES)])


@pytest.mark.parametrize("name", ["image", "img", "bytes", "jpg", "png"])
@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()])
def test_a_binary_column_gives_one_record_per_row(tmp_path: Path, name: str, type_: pa.DataType) -> None:
    file = parquet(tmp_path / "all.parquet", {"x": pa.array(range(10)), name: pa.array(IMAGES, type_)}, 4)
    source = open_source(str(file))
    assert [record.data for record in records(source)] == IMAGES
    assert summary(source) == [(f"all.parquet#{row}", "train", None) for row in range(10)]
    assert not source.labels_known


@pytest.mark.parametrize("name", ["image", "img"])
def test_the_hugging_face_struct_gives_its_bytes(tmp_path: Path, name: str) -> None:
    source = open_source(str(parquet(tmp_path / "a.parquet", {name: STRUCT, "label": pa.array(range(10))})))
    assert [record.data for record in records(source)] == IMAGES
    assert [record.label for record in records(source)] == list(range(10))


def test_the_first_usable_image_column_wins(tmp_path: Path) -> None:
    columns = {"png": pa.array(IMAGES), "img": pa.array(IMAGES[::-1]), "image": pa.array(range(10))}
    source = open_source(str(parquet(tmp_path / "a.parquet", columns)))
    assert [record.data for record in records(source)] == IMAGES[::-1]


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"id": pa.array(range(100, 110))}, [str(i) for i in range(100, 110)]),
        (
            {"id": pa.array(range(10)), "path": pa.array([f"p/{i}.jpg" for i in range(10)])},
            [f"p/{i}.jpg" for i in range(10)],
        ),
        ({"path": pa.array(["p"] * 10), "source": pa.array(list("abcdefghij"))}, list("abcdefghij")),
        ({"id": pa.array([None, *range(1, 10)])}, ["a.parquet#0", *map(str, range(1, 10))]),
        ({"id": pa.array([0.5] * 10)}, [f"a.parquet#{i}" for i in range(10)]),
        ({"path": pa.array(list("aabbccddee")).dictionary_encode()}, list("aabbccddee")),
    ],
)
def test_rows_are_called_by_their_source_path_or_id(tmp_path: Path, beside: dict, expected: list[str]) -> None:
    file = parquet(tmp_path / "a.parquet", {**beside, "image": pa.array(IMAGES)}, 3)
    for rows_per_chunk in (2, 100):
        found = records(open_source(str(file)), rows_per_chunk)
        assert [record.source for record in found] == expected
        assert [record.data for record in found] == IMAGES


@pytest.mark.parametrize("rows_per_group", [1, 7, 300])
@pytest.mark.parametrize("rows_per_chunk", [1, 64, 1000])
def test_chunks_cover_every_row_once(tmp_path: Path, rows_per_group: int, rows_per_chunk: int) -> None:
    cells = [str(row).encode() for row in range(300)]
    file = parquet(tmp_path / "a.parquet", {"image": pa.array(cells)}, rows_per_group)
    found = records(open_source(str(file)), rows_per_chunk)
    assert [(record.source, record.data) for record in found] == [(f"a.parquet#{i}", cells[i]) for i in range(300)]


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train-00000", "train"),
        ("test-00000", "test"),
        ("Validation", "test"),
        ("unlabeled", "unlabeled"),
        ("unlabelled-test", "unlabeled"),
        ("stuff", "train"),
    ],
)
def test_the_file_name_gives_the_split(tmp_path: Path, stem: str, split: str) -> None:
    parquet(tmp_path / f"{stem}.parquet", {"image": pa.array(IMAGES[:1])})
    assert summary(open_source(str(tmp_path))) == [(f"{stem}.parquet#0", split, None)]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array(["a", None, "b"]), ["a", None, "b"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([2, -1, 0]), [2, None, 0]),
        (pa.nulls(3), [None, None, None]),
        (NOT_UTF8, ["a", None, "b"]),
    ],
    ids=["text", "dictionary", "withheld", "empty", "not-utf8"],
)
def test_labels_are_integers_or_text_or_unknown(tmp_path: Path, labels: pa.Array, expected: list[object]) -> None:
    file = parquet(tmp_path / "a.parquet", {"image": pa.array(IMAGES[:3]), "label": labels})
    assert [record.label for record in records(open_source(str(file)))] == expected


def test_rows_without_an_image_carry_a_reason(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": IMAGES[0]}, {"bytes": None}, None], pa.struct([("bytes", pa.binary())]))
    found = records(open_source(str(parquet(tmp_path / "a.parquet", {"image": cells}))))
    assert [record.data for record in found] == [IMAGES[0], *[Unreadable("the row holds no image")] * 2]


def test_a_parquet_file_that_vanishes_or_is_damaged_loses_its_own_rows_alone(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        parquet(tmp_path / f"{name}.parquet", {"image": pa.array(IMAGES)})
    chunks = open_source(str(tmp_path)).chunks(5)
    (tmp_path / "a.parquet").unlink()
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    found = [record for chunk in chunks for record in read_chunk(chunk)]
    assert [record.source for record in found] == [f"{name}.parquet#{row}" for name in "abc" for row in range(10)]
    assert all(isinstance(record.data, Unreadable) for record in found[:20])
    assert [record.data for record in found[20:]] == IMAGES


def test_several_files_are_named_below_the_folder_that_holds_them_all(tmp_path: Path) -> None:
    for name in ("train/0", "test/0", "more/0", ".hidden/0"):
        parquet(tmp_path / f"{name}.parquet", {"image": pa.array(IMAGES[:1])})
    expected = [
        ("more/0.parquet#0", "train", None),
        ("test/0.parquet#0", "test", None),
        ("train/0.parquet#0", "train", None),
    ]
    assert summary(open_source(str(tmp_path))) == expected
    assert summary(open_source(f"{tmp_path}/*/0.parquet")) == expected
    assert summary(open_source(f"{tmp_path}/**/*.parquet")) == expected


def test_a_pattern_gives_the_files_that_match_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train-0", "train-1", "test-0"):
        parquet(tmp_path / f"{name}.parquet", {"image": pa.array(IMAGES[:1])})
    (tmp_path / "train-2.parquet").mkdir()
    monkeypatch.chdir(tmp_path)
    for pattern in ("train-*.parquet", "train-[01].parquet", "./train-?.parquet", f"{tmp_path}/tr*"):
        source = open_source(pattern)
        # A worker has a working directory of its own.
        monkeypatch.chdir("/")
        assert [name for name, _, _ in summary(source)] == ["train-0.parquet#0", "train-1.parquet#0"]
        monkeypatch.chdir(tmp_path)


def test_a_pattern_without_files_or_with_files_of_several_kinds_is_refused(tmp_path: Path) -> None:
    assert f"no file matches {tmp_path}/*.parquet" in refused(f"{tmp_path}/*.parquet")
    parquet(tmp_path / "a.parquet", {"image": pa.array(IMAGES[:1])})
    put(tmp_path, "b.txt")
    assert "of several kinds; give files of one kind" in refused(f"{tmp_path}/*")


def test_a_split_column_comes_before_the_file_name(tmp_path: Path) -> None:
    splits = ["train", "test", "val", "Validation", "unlabeled", None]
    columns = {"image": pa.array(IMAGES[:6]), "split": pa.array(splits)}
    expected = ["train", "test", "test", "test", "unlabeled", "test"]
    assert [split for _, split, _ in summary(open_source(str(parquet(tmp_path / "test.parquet", columns))))] == expected
    columns["split"] = columns["split"].dictionary_encode()
    assert [split for _, split, _ in summary(open_source(str(parquet(tmp_path / "test.parquet", columns))))] == expected


def test_a_row_with_an_unknown_split_is_listed_with_the_reason(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"image": pa.array(IMAGES[:2]), "split": pa.array(["train", "holdout"])})
    assert reasons(open_source(str(file))) == [
        ("a.parquet#1", "its split is 'holdout', which is none of train, test, val, validation, unlabeled")
    ]


@pytest.mark.parametrize(
    ("column", "cells", "type_"),
    [
        ("label", pa.array([0.5, 1.5]), "double"),
        ("label", pa.array([[1], [2]]), "list<element: int64>"),
        ("label", pa.array([{"id": 1}, {"id": 2}]), "struct<id: int64>"),
        ("label", pa.array([True, False]), "bool"),
        ("label", pa.array([b"a", b"b"]), "binary"),
        ("split", pa.array([0, 1]), "int64"),
    ],
)
def test_a_label_or_split_of_a_wrong_type_is_refused_by_name(
    tmp_path: Path, column: str, cells: pa.Array, type_: str
) -> None:
    file = parquet(tmp_path / "a.parquet", {"image": pa.array(IMAGES[:2]), column: cells})
    needed = "integers or strings" if column == "label" else "strings"
    assert refused(file) == f"{file} has a column {column} of type {type_}, needed are {needed}; convert or rename it"


def test_the_second_file_is_held_against_the_first_when_chunks_are_made(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"image": pa.array(IMAGES[:1])})

    def second(**columns: pa.Array) -> str:
        file = parquet(tmp_path / "b.parquet", columns)
        source = open_source(str(tmp_path))
        assert source.kind == "parquet"
        return refused(tmp_path).replace(str(file), "b")

    assert "b has its images in the column img and" in second(img=pa.array(IMAGES[:1]))
    assert "b has no column of encoded images, only text" in second(text=pa.array(["x"]))
    assert "b has a column label of type double" in second(image=pa.array(IMAGES[:1]), label=pa.array([0.5]))
    (tmp_path / "b.parquet").write_bytes(b"not Parquet")
    assert "b.parquet is not a readable Parquet file" in refused(tmp_path)


def test_files_with_and_without_labels_go_together(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"image": pa.array(IMAGES[:1]), "label": pa.array([3])})
    parquet(tmp_path / "b.parquet", {"image": pa.array(IMAGES[:1])})
    assert [label for _, _, label in summary(open_source(str(tmp_path)))] == [3, None]


def test_the_listing_digest_and_the_size_are_those_of_the_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        os.utime(parquet(tmp_path / f"{name}.parquet", {"image": pa.array(IMAGES)}), ns=(10**18, 10**18))
    source = open_source(str(tmp_path))
    assert source.encoded_bytes() == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert source.listing_digest() == open_source(f"{tmp_path}/*.parquet").listing_digest()
    os.utime(tmp_path / "b.parquet", ns=(10**18, 10**18 + 1))
    assert source.listing_digest() != open_source(str(tmp_path)).listing_digest()
    assert source.listing_digest() != open_source(str(tmp_path / "a.parquet")).listing_digest()


def test_a_row_group_that_became_shorter_loses_its_missing_rows_alone(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"image": pa.array(IMAGES)})
    [chunk] = open_source(str(file)).chunks(10)
    parquet(file, {"image": pa.array(IMAGES[:4])})
    found = list(read_chunk(chunk))
    assert [record.data for record in found[:4]] == IMAGES[:4]
    assert [record.source for record in found[4:]] == [f"a.parquet#{row}" for row in range(4, 10)]
    assert all(isinstance(record.data, Unreadable) for record in found[4:])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 100])
def test_a_file_that_only_claims_to_be_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    assert "is not a readable Parquet file" in refused(tmp_path / "a.parquet")


def test_parquet_without_images_names_its_columns(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": pa.array(["x"]), "image": pa.array(["not binary"])})
    assert "no column of encoded images, only text, image" in refused(file)


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    assert "holds no rows" in refused(parquet(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())}))
