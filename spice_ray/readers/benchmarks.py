"""The paper's six benchmarks in the layouts in which they are published."""

from pathlib import Path
from typing import TYPE_CHECKING

from spice_ray.errors import DataError
from spice_ray.readers.synset_folders import SUBSETS, open_imagenet_subset, open_tiny_imagenet

if TYPE_CHECKING:
    from spice_ray.readers.records import Source


def open_benchmark(path: str) -> "Source | None":
    """A source of a benchmark, where ``path`` is one.

    CIFAR-10 (Python or binary version), CIFAR-100 (its 20 superclasses), STL-10 (binary) and Tiny-ImageNet are known by
    the files in the folder that their archive unpacks to. ImageNet-10 and ImageNet-Dog are parts of a larger folder and
    are asked for by name: ``imagenet10:FOLDER`` and ``imagenet_dog:FOLDER``.

    Returns:
        The source; its rows are all images of the benchmark, its labels the classes that papers score by. None where
        ``path`` is anything else.

    Raises:
        DataError: It is a benchmark, but a part of it is missing or cannot be used.
    """
    name, colon, folder = path.partition(":")
    if colon and name in SUBSETS:
        return _open_subset(name, folder)
    if "://" in path or not Path(path).is_dir():
        return None
    return _open_folder(Path(path))


def _open_subset(name: str, folder: str) -> "Source":
    if "://" in folder:
        raise DataError(f"{name}: needs a local folder, not the URL {folder}; give a mounted path or a local copy")
    if not folder or not Path(folder).is_dir():
        raise DataError(
            f"{name}: needs the folder of ImageNet and {folder or 'an empty path'} is none; "
            f"give {name}:FOLDER where FOLDER holds train/<synset>/*.JPEG"
        )
    return open_imagenet_subset(name, Path(folder))


def _open_folder(folder: Path) -> "Source | None":
    # Imported here: only these two need NumPy.
    from spice_ray.readers.cifar import open_cifar
    from spice_ray.readers.stl10 import open_stl10

    for open_layout in (open_cifar, open_stl10, open_tiny_imagenet):
        source = open_layout(folder)
        if source is not None:
            return source
    return None
