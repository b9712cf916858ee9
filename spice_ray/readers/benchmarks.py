"""The paper's six benchmarks in the layouts in which they are published."""

from spice_ray.errors import DataError
from spice_ray.readers.cifar import open_cifar
from spice_ray.readers.files import find
from spice_ray.readers.places import place_of
from spice_ray.readers.records import Source
from spice_ray.readers.stl10 import open_stl10
from spice_ray.readers.synset_folders import SynsetSource, open_imagenet_subset, open_tiny_imagenet
from spice_ray.readers.tree import Tree


def open_benchmark(folder: Tree) -> Source | None:
    """A source of a benchmark, where ``folder`` holds one.

    CIFAR-10 (Python or binary version), CIFAR-100 (its 20 superclasses), STL-10 (binary) and Tiny-ImageNet are known by
    the files in the folder that their archive unpacks to.

    Returns:
        The source; its rows are all images of the benchmark, its labels the classes that papers score by. None where
        the folder holds anything else.

    Raises:
        DataError: It is a benchmark, but a part of it is missing or cannot be used.
    """
    for open_layout in (open_cifar, open_stl10, open_tiny_imagenet):
        source: Source | None = open_layout(folder)
        if source is not None:
            return source
    return None


def open_subset(subset: str, folder: str) -> SynsetSource:
    """A source of ImageNet-10 or ImageNet-Dog, which are parts of a larger folder and are asked for by name.

    Args:
        subset: A key of ``SUBSETS``.
        folder: Path or URL of a folder that holds train/<synset>/*.JPEG.

    Raises:
        DataError: There is no such folder, or a class of the subset is missing in it.
    """
    place = place_of(folder)
    if place.is_web:
        raise DataError(
            f"{subset}: needs a folder, and {place} is on a web server, which lists none; make a local copy"
        )
    found = find(place) if folder else None
    if found is None or not found.is_folder:
        raise DataError(
            f"{subset}: needs the folder of ImageNet and {place if folder else 'an empty path'} is none; "
            f"give {subset}:FOLDER where FOLDER holds train/<synset>/*.JPEG"
        )
    return open_imagenet_subset(subset, Tree(place))
