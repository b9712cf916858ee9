import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spice_ray.errors import DataError
from spice_ray.readers.records import Unreadable
from tests.readers.reading import opened, reasons, records, summary
from tests.readers.synset_files import DOGS, IMAGENET10, jpeg, put, put_imagenet, put_tiny_imagenet


def test_tiny_imagenet_takes_val_for_test_and_leaves_the_unlabelled_test_out(tmp_path: Path) -> None:
    source = opened(put_tiny_imagenet(tmp_path))
    assert source.kind == "tiny_imagenet"
    assert summary(source) == [
        ("train/n01443537/images/n01443537_0.JPEG", "train", "n01443537"),
        ("train/n02124075/images/n02124075_0.JPEG", "train", "n02124075"),
        ("train/n02124075/images/n02124075_1.JPEG", "train", "n02124075"),
        ("val/images/val_0.JPEG", "test", "n01443537"),
        ("val/images/val_1.JPEG", "test", "n02124075"),
    ]
    assert records(source)[2].data == jpeg(1)
    assert source.encoded_bytes() == sum(len(jpeg(value)) for value in (0, 1, 2, 3, 4))


def test_tiny_imagenet_counts_its_images_and_not_its_labels_in_the_digest(tmp_path: Path) -> None:
    before = opened(put_tiny_imagenet(tmp_path)).listing_digest()
    (tmp_path / "val/val_annotations.txt").write_text("val_0.JPEG\tn02124075\t0\nval_1.JPEG\tn02124075\t0\n")
    assert opened(tmp_path).listing_digest() == before
    put(tmp_path, "val/images/val_2.JPEG")
    (tmp_path / "val/val_annotations.txt").write_text("".join(f"val_{row}.JPEG\tn02124075\t0\n" for row in range(3)))
    assert opened(tmp_path).listing_digest() != before


def remove_val_images(root: Path) -> None:
    for file in (root / "val/images").iterdir():
        file.unlink()
    (root / "val/images").rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "val/val_annotations.txt").unlink(), "val_annotations.txt cannot be read as text"),
        (
            lambda root: (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn01443537\t0\n"),
            r"val_1\.JPEG is not in val/val_annotations\.txt",
        ),
        (lambda root: (root / "val/val_annotations.txt").write_text("val_0.JPEG n01443537"), "a line without a tab"),
        (lambda root: (root / "val/val_annotations.txt").write_bytes(b"\xff\xfe\0"), "cannot be read as text"),
        (
            lambda root: (root / "wnids.txt").write_text("n02124075\nn09999999\n"),
            r"lacks 1 of 2 folders of images \(n09999999\)",
        ),
        (lambda root: (root / "wnids.txt").write_text("\n"), "is not a list of synsets"),
        (lambda root: (root / "wnids.txt").write_text("../../outside\n"), "is not a list of synsets"),
        (
            lambda root: (root / "train/n01443537/images/n01443537_0.JPEG").unlink(),
            r"n01443537/images holds no \.JPEG file",
        ),
        (remove_val_images, "lacks the folder val/images"),
    ],
)
def test_an_incomplete_tiny_imagenet_is_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(put_tiny_imagenet(tmp_path))
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


def test_a_lost_image_is_a_reject_and_a_pipe_is_not_opened(tmp_path: Path) -> None:
    put_tiny_imagenet(tmp_path)
    os.mkfifo(tmp_path / "train/n01443537/images/pipe.JPEG")
    (tmp_path / "train/n01443537/images/gone.JPEG").symlink_to(tmp_path / "nowhere")
    source = opened(tmp_path)
    (tmp_path / "train/n02124075/images/n02124075_1.JPEG").unlink()
    found = records(source)
    assert len(found) == 6
    assert [record.source for record in found if isinstance(record.data, Unreadable)] == [
        "train/n01443537/images/gone.JPEG",
        "train/n02124075/images/n02124075_1.JPEG",
    ]
    assert set(reasons(source)) == {"the file cannot be read: No such file or directory"}


# --- subsets of ImageNet


def test_imagenet10_takes_its_ten_classes_alone(tmp_path: Path) -> None:
    synsets = IMAGENET10
    put_imagenet(tmp_path, [*synsets, "n01440764"])
    source = opened(f"imagenet10:{tmp_path}")
    found = summary(source)
    assert source.kind == "imagenet10"
    assert len(found) == 40
    assert {label for _, _, label in found} == set(synsets)
    assert found[:2] == [
        ("train/n02056570/n02056570_10.JPEG", "train", "n02056570"),
        ("train/n02056570/n02056570_7.JPEG", "train", "n02056570"),
    ]
    assert found[-1] == ("val/n07747607/n07747607_7.JPEG", "test", "n07747607")


def test_imagenet_dog_has_fifteen_breeds_and_needs_no_validation_images(tmp_path: Path) -> None:
    synsets = DOGS
    put_imagenet(tmp_path, [*synsets, "n02099712"], splits=("train",))
    found = summary(opened(f"imagenet_dog:{tmp_path}"))
    assert {label for _, _, label in found} == set(synsets)
    assert {split for _, split, _ in found} == {"train"}
    assert len(found) == 30


def test_imagenet_without_a_class_of_the_subset_is_refused(tmp_path: Path) -> None:
    put_imagenet(tmp_path, IMAGENET10[:6])
    with pytest.raises(DataError, match=r"lacks 4 of 10 folders of images \(n04254680, n04285008, n04467665, \.\.\.\)"):
        opened(f"imagenet10:{tmp_path}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("imagenet10:", "an empty path is none; give imagenet10:FOLDER"),
        ("imagenet10:/no/such/folder", "/no/such/folder is none; give imagenet10:FOLDER"),
        ("imagenet_dog:https://host/imagenet", "https://host/imagenet is on a web server, which lists none; make a"),
    ],
)
def test_a_subset_of_no_folder_is_refused(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        opened(path)


def test_a_subset_of_a_folder_without_training_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder train; imagenet10: needs"):
        opened(f"imagenet10:{tmp_path}")
