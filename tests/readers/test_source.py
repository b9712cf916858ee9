import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from spice_ray.errors import DataError
from spice_ray.readers.records import split_of_container
from spice_ray.readers.source import open_source
from tests.readers.sample_files import IMAGES, contents, parquet, put, records, refused, tar_bytes

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


# --- what a path is


def test_a_folder_is_what_is_in_it_and_images_come_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.tar").write_bytes(tar_bytes([("x.png", IMAGES[0])]))
    assert open_source(str(tmp_path)).kind == "tar"
    parquet(tmp_path / "b.parquet", {"image": pa.array(IMAGES)})
    assert "holds Parquet files and tar archives; give a pattern such as" in refused(tmp_path)
    put(tmp_path, "train/a.png")
    assert open_source(str(tmp_path)).kind == "folder"


def test_a_parquet_file_is_read_for_images_then_embeddings_then_paths(tmp_path: Path) -> None:
    columns = {"path": pa.array(["x.png"])}
    file = parquet(tmp_path / "a.parquet", columns)
    assert open_source(str(file)).kind == "list"
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array([0.5, 1.5], pa.float32()), 2)
    parquet(file, columns)
    assert open_source(str(file)).kind == "embeddings"
    parquet(file, {**columns, "image": pa.array(IMAGES[:1])})
    assert open_source(str(file)).kind == "parquet"


def test_a_list_of_images_may_have_boxes_beside_its_paths(tmp_path: Path) -> None:
    boxes = pa.array([[0.1, 0.2, 0.3, 0.4]], pa.list_(pa.float64()))
    assert (
        open_source(str(parquet(tmp_path / "a.parquet", {"path": pa.array(["x.png"]), "bbox": boxes}))).kind == "list"
    )
    assert open_source(str(parquet(tmp_path / "b.parquet", {"bbox": boxes}))).kind == "embeddings"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test-00000-of-00001.parquet", "test"),
        ("cifar10_validation.tar", "test"),
        ("val.npy", "test"),
        ("retrieval.parquet", "train"),
        ("latest-contest.npy", "train"),
        ("stl10-unlabeled-3.parquet", "unlabeled"),
        ("test/a.parquet", "test"),
        ("train/test.parquet", "train"),
    ],
)
def test_a_file_is_of_the_split_that_a_word_of_its_name_says(name: str, split: str) -> None:
    assert split_of_container(name) == split


def test_a_npy_file_is_images_or_embeddings_by_its_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 4, 4), np.uint8))
    np.save(tmp_path / "vectors.npy", np.ones((2, 4), np.float32))
    assert open_source(str(tmp_path / "images.npy")).kind == "array"
    assert open_source(str(tmp_path / "vectors.npy")).kind == "embeddings"


def test_names_of_kinds_may_be_in_capitals(tmp_path: Path) -> None:
    parquet(tmp_path / "A.PARQUET", {"image": pa.array(IMAGES)})
    (tmp_path / "A.TAR").write_bytes(tar_bytes([("x.PNG", IMAGES[0])]))
    (tmp_path / "A.TXT").write_text("x.png")
    assert [open_source(str(tmp_path / f"A.{end}")).kind for end in ("PARQUET", "TAR", "TXT")] == [
        "parquet",
        "tar",
        "list",
    ]
    assert list(contents(open_source(str(tmp_path / "A.TAR")))) == ["A.TAR/x.PNG"]


# --- what cannot be used


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} does not exist" in refused(tmp_path / "nowhere")
    assert "does not exist" in refused("")
    assert "does not exist" in refused("a" * 5000)
    assert "does not exist" in refused("a\0b")


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    assert "is empty" in refused(tmp_path)
    put(tmp_path, "a.txt", "b/c.csv")
    assert "holds no image, only 2 other files" in refused(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    assert f"{tmp_path}/a.png is neither a folder nor a file of a kind that is read" in refused(tmp_path / "a.png")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    assert "is a pipe or a device; give a regular file or a folder" in refused(tmp_path / "a.tar")


def test_several_lists_or_arrays_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b.txt")
    assert "is one of 2 files of its kind, of which one is read" in refused(f"{tmp_path}/*.txt")


def test_opening_imports_neither_torch_nor_ray_nor_scikit_learn_nor_a_storage_library(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    unwanted = ("torch", "ray", "sklearn", "pandas", "fsspec", "aiohttp")
    code = (
        "import sys; from spice_ray.readers.source import open_source, read_chunk; open_source('digits');"
        f"[list(read_chunk(chunk)) for chunk in open_source({str(tmp_path)!r}).chunks(10)];"
        f"print([m for m in {unwanted} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_source_that_cannot_be_used_is_a_data_error_also_for_a_benchmark_prefix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="imagenet10"):
        open_source(f"imagenet10:{tmp_path}/nowhere")
