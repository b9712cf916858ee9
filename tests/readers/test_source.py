import io
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spice_ray.errors import DataError
from spice_ray.readers import folder as folder_reader
from spice_ray.readers.source import Record, Source, Unreadable, open_source, read_chunk


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "PNG")
    return buffer.getvalue()


def put(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(value))
    return root


def records(source: Source, rows_per_chunk: int = 3) -> list[Record]:
    chunks = pickle.loads(pickle.dumps(source.chunks(rows_per_chunk)))
    for chunk in chunks:
        assert len(list(read_chunk(chunk))) == chunk.num_rows
    return [record for chunk in chunks for record in read_chunk(chunk)]


def summary(source: Source) -> list[tuple[str, str, object]]:
    return [(record.source, record.split, record.label) for record in records(source)]


def parquet(file: Path, columns: dict[str, pa.Array], rows_per_group: int = 100) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=rows_per_group)
    return file


# --- digits


def test_digits_are_scaled_to_the_whole_range_and_carry_labels() -> None:
    found = records(open_source("digits"), 500)
    assert len(found) == 1797
    assert found[0].source == "digits/0000"
    assert found[1796].source == "digits/1796"
    assert [record.label for record in found[:5]] == [0, 1, 2, 3, 4]
    assert {record.split for record in found} == {"train"}
    # scikit-learn's first digit begins 0 0 5 13 9 1; 13 * 255 / 16 = 207.19.
    images = np.stack([record.data for record in found if isinstance(record.data, np.ndarray)])
    assert images[0, 0, :6].tolist() == [0, 0, 80, 207, 143, 16]
    assert (images.shape, images.dtype, images.max()) == ((1797, 8, 8), np.dtype(np.uint8), 255)


# --- image folders


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
    assert "4 files were ignored" in caplog.text


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path: Path) -> None:
    root = put(tmp_path / "root", "sub/a.png")
    outside = put(tmp_path / "outside", "b.png")
    (root / "loop").symlink_to(root)
    (root / "linked").symlink_to(outside)
    (root / "b.png").symlink_to(outside / "b.png")
    found = records(open_source(str(root)))
    assert [(record.source, record.data) for record in found] == [("b.png", png(0)), ("sub/a.png", png(0))]


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
    os.truncate(tmp_path / "giant.png", folder_reader.MAX_FILE_BYTES + 1)
    [record] = records(open_source(str(tmp_path)))
    assert isinstance(record.data, Unreadable)
    assert str(folder_reader.MAX_FILE_BYTES + 1) in record.data.reason


def test_names_that_are_not_utf8_are_told_apart_and_read(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", "caf\u00e9.png".encode(), b"new\nline.png"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(png(7))
    found = records(open_source(str(tmp_path)))
    assert [record.source for record in found] == ["caf\u00e9.png", "caf\\xe9.png", "new\nline.png"]
    assert all(record.data == png(7) for record in found)


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
    assert len(set(seen)) == 4


# --- Parquet

IMAGES = [png(value) for value in range(10)]
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
        (pa.array([0.5, 1.5, 2.5]), [None, None, None]),
        (NOT_UTF8, ["a", None, "b"]),
    ],
    ids=["text", "dictionary", "withheld", "float", "not-utf8"],
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


def test_an_image_folder_with_a_metadata_table_is_an_image_folder(tmp_path: Path) -> None:
    put(tmp_path, "train/a.png")
    parquet(tmp_path / "metadata.parquet", {"x": pa.array([1])})
    assert open_source(str(tmp_path)).kind == "folder"


# --- what cannot be used


def refused(path: object) -> str:
    with pytest.raises(DataError) as caught:
        open_source(str(path)).chunks(10)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("")
    assert "does not exist" in refused("a" * 5000)


@pytest.mark.parametrize("url", ["s3://bucket/images", "https://example.org/a.parquet", "file:///tmp"])
def test_a_url_is_refused_with_what_to_do(url: str) -> None:
    assert f"{url} is a URL, which is not supported yet; give a mounted path or a local copy" == refused(url)


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    assert "is empty" in refused(tmp_path)
    put(tmp_path, "a.txt", "b/c.csv")
    assert "holds no image, only 2 other files" in refused(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    assert "is neither a folder nor a .parquet file" in refused(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all" * 100])
def test_a_file_that_only_claims_to_be_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    assert "is not a readable Parquet file" in refused(tmp_path / "a.parquet")


def test_parquet_without_images_names_its_columns(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": pa.array(["x"]), "image": pa.array(["not binary"])})
    assert "no column of encoded images, only text, image" in refused(file)


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    assert "holds no rows" in refused(parquet(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())}))


def test_opening_imports_neither_torch_nor_ray_nor_scikit_learn() -> None:
    code = (
        "import sys; from spice_ray.readers.source import open_source; open_source('digits');"
        "print([m for m in ('torch', 'ray', 'sklearn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
