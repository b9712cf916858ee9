"""Benchmarks in their published layouts on servers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from spice_ray.errors import ConfigError
from spice_ray.readers.source import open_source, read_chunk
from spice_ray.recipe import load_recipe
from spice_ray.workflow import prepare
from tests.readers.cifar_files import put_binary_cifar10, put_cifar100, put_python_cifar10
from tests.readers.counting_server import counting
from tests.readers.reading import reasons, records, same_source
from tests.readers.sample_files import png, refused
from tests.readers.stl10_files import put_stl10
from tests.readers.synset_files import IMAGENET10, jpeg, put_imagenet, put_tiny_imagenet
from tests.servers import S3

LAYOUTS = [put_python_cifar10, put_binary_cifar10, put_cifar100, put_stl10, put_tiny_imagenet]


@pytest.mark.parametrize("put", LAYOUTS)
def test_a_benchmark_in_a_bucket_gives_the_records_of_the_local_one(
    s3: S3, tmp_path: Path, put: Callable[[Path], Path]
) -> None:
    put(tmp_path)
    (tmp_path / ".hidden").write_text("no part of it")
    url = s3.put_folder(tmp_path, "published")
    assert same_source(url, tmp_path) >= 5


def test_a_subset_of_imagenet_in_a_bucket_gives_the_records_of_the_local_one(s3: S3, tmp_path: Path) -> None:
    put_imagenet(tmp_path, [*IMAGENET10, "n01440764"], splits=("train",))
    url = s3.put_folder(tmp_path, "imagenet")
    assert same_source(f"imagenet10:{url}", f"imagenet10:{tmp_path}") == 20


@pytest.mark.parametrize(
    ("put", "name"), [(put_stl10, "unlabeled_X.bin"), (put_tiny_imagenet, "train/n02124075/images/n02124075_1.JPEG")]
)
def test_the_digest_of_a_benchmark_on_a_server_follows_the_sizes_of_its_files(
    tmp_path: Path, put: Callable[[Path], Path], name: str
) -> None:
    put(tmp_path)
    contents = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    digests = []
    for content in (contents[name], contents[name] * 2):
        with counting({f"data/{other}": contents[other] for other in contents} | {f"data/{name}": content}):
            digests.append(open_source("counting://host/data").listing_digest())
    assert digests[0] != digests[1]


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.mark.parametrize("put", LAYOUTS)
def test_a_file_system_of_fsspec_has_benchmarks(
    memory: fsspec.AbstractFileSystem, tmp_path: Path, put: Callable[[Path], Path]
) -> None:
    memory.put(str(put(tmp_path / "local")), "/store/published", recursive=True)
    assert same_source("memory://store/published", tmp_path / "local") >= 5


# --- what is missing, damaged or lost


@pytest.mark.parametrize(
    ("put", "lost", "sentence"),
    [
        (put_python_cifar10, "data_batch_4", "looks like CIFAR-10 but lacks data_batch_4; unpack"),
        (put_cifar100, "test", "looks like CIFAR-100 but lacks test; unpack"),
        (put_stl10, "train_y.bin", "looks like STL-10 but lacks train_y.bin; unpack"),
        (put_tiny_imagenet, "val/val_annotations.txt", "/val/val_annotations.txt cannot be read as text (the file can"),
        (put_tiny_imagenet, "train/n01443537", "/train lacks 1 of 2 folders of images (n01443537); unpack"),
        (put_tiny_imagenet, "val/images", "lacks the folder val/images; unpack"),
    ],
)
def test_a_part_that_is_missing_on_a_server_is_named_without_the_keys(
    tmp_path: Path, put: Callable[[Path], Path], lost: str, sentence: str
) -> None:
    put(tmp_path)
    contents = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    kept = {f"data/{name}": content for name, content in contents.items() if not name.startswith(lost)}
    with counting({**kept, "data/notes": b""}):
        found = refused("counting://user:SECRET@host/data")
    assert found.startswith("counting://host/data")
    assert sentence in found
    assert "SECRET" not in found


def test_a_folder_on_a_server_that_lacks_a_class_of_imagenet_is_refused(tmp_path: Path) -> None:
    with counting({f"data/train/{synset}/0.JPEG": jpeg(0) for synset in IMAGENET10[:6]} | {"other/x": b""}):
        assert "counting://host/data/train lacks 4 of 10 folders" in refused("imagenet10:counting://host/data")
        assert "counting://host/other has no folder train" in refused("imagenet10:counting://host/other")
        assert "ImageNet and counting://host/none is none" in refused("imagenet10:counting://u:SECRET@host/none")


@pytest.mark.parametrize(
    ("put", "lost", "rows"),
    [
        (put_python_cifar10, "data_batch_2", 2),
        (put_binary_cifar10, "data_batch_2.bin", 2),
        (put_stl10, "unlabeled_X.bin", 5),
        (put_stl10, "test_y.bin", 4),
        (put_tiny_imagenet, "val/images/val_1.JPEG", 1),
    ],
)
def test_rows_of_an_object_that_vanished_after_listing_are_rejects(
    s3: S3, tmp_path: Path, put: Callable[[Path], Path], lost: str, rows: int
) -> None:
    source = open_source(s3.put_folder(put(tmp_path), "published"))
    expected = len(records(source))
    s3.system.delete_file(f"{s3.bucket}/published/{lost}")
    assert len(records(source)) == expected
    assert len(reasons(source)) == rows
    assert {reason.partition(" cannot be read: ")[2] for reason in reasons(source)} == {"No such file or directory"}


def test_a_binary_batch_that_shrank_in_its_bucket_keeps_its_whole_rows(s3: S3, tmp_path: Path) -> None:
    source = open_source(s3.put_folder(put_binary_cifar10(tmp_path), "published"))
    source.chunks(10)
    s3.put("published/data_batch_1.bin", (tmp_path / "data_batch_1.bin").read_bytes()[:3100])
    assert reasons(source) == ["the file of this row cannot be read: it has changed since the start"]


# --- what a server is asked for


@pytest.mark.parametrize("put", LAYOUTS)
def test_a_folder_on_a_server_is_listed_once(tmp_path: Path, put: Callable[[Path], Path]) -> None:
    put(tmp_path)
    names = {f"data/{file.relative_to(tmp_path)}": file for file in tmp_path.rglob("*") if file.is_file()}
    with counting({name: file.read_bytes() for name, file in names.items()}) as server:
        source = open_source("counting://host/data")
        records(source)
        source.listing_digest()
    assert server.listed == ["data"]


def test_a_folder_of_images_is_listed_once_and_of_imagenet_only_the_classes_asked_for() -> None:
    with counting({"photos/a.png": png(0), "photos/b/c.png": png(1)}) as server:
        assert len(records(open_source("counting://host/photos"))) == 2
        assert server.listed == ["photos"]
    synsets = [*IMAGENET10, "n01440764"]
    names = [f"imagenet/{split}/{synset}/{synset}_0.JPEG" for split in ("train", "val") for synset in synsets]
    with counting({name: jpeg(0) for name in names}) as server:
        assert len(records(open_source("imagenet10:counting://host/imagenet"))) == 20
    assert sorted(server.listed) == [f"imagenet/{split}/{name}" for split in ("train", "val") for name in IMAGENET10]


def test_of_the_unlabelled_images_of_stl10_only_those_asked_for_are_fetched() -> None:
    image = 3 * 96 * 96
    files: dict[str, bytes | int] = {
        "stl10/train_X.bin": 5000 * image,
        "stl10/train_y.bin": b"\1" * 5000,
        "stl10/test_X.bin": 8000 * image,
        "stl10/test_y.bin": b"\2" * 8000,
        "stl10/unlabeled_X.bin": 100_000 * image,
    }
    with counting(files) as server:
        chunks = open_source("counting://host/stl10").chunks(500)
        assert sum(chunk.num_rows or 0 for chunk in chunks) == 113_000
        assert sorted(server.fetched) == [("stl10/test_y.bin", 8000), ("stl10/train_y.bin", 5000)]
        server.fetched.clear()
        assert len(list(read_chunk(chunks[-1]))) == 500
    assert {name for name, _ in server.fetched} == {"stl10/unlabeled_X.bin"}
    assert sum(size for _, size in server.fetched) == 500 * image
    assert max(size for _, size in server.fetched) <= 8 << 20


def test_pickled_batches_of_a_server_are_one_chunk_each(tmp_path: Path) -> None:
    put_python_cifar10(tmp_path, 20)
    with counting({f"data/{file.name}": file.read_bytes() for file in tmp_path.iterdir()}):
        assert [chunk.num_rows for chunk in open_source("counting://host/data").chunks(1)] == [20] * 6


def test_a_run_names_a_subset_on_a_server_without_the_keys(tmp_path: Path) -> None:
    with (
        counting({f"data/train/{synset}/0.JPEG": jpeg(0) for synset in IMAGENET10}),
        pytest.raises(ConfigError, match="imagenet10:counting://host/data") as caught,
    ):
        prepare(
            load_recipe("embeddings", ["num_clusters=10"]),
            "imagenet10:counting://user:SECRET@host/data",
            tmp_path / "run",
        )
    assert "SECRET" not in str(caught.value)
