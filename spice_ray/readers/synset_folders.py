"""Benchmarks that are image files in folders named by WordNet synsets: Tiny-ImageNet and subsets of ImageNet."""

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as package_files

from spice_ray.errors import DataError
from spice_ray.readers.files import digest_stamps, read_file, read_files, stamp, sum_sizes
from spice_ray.readers.folder import Entry
from spice_ray.readers.places import Place, printable
from spice_ray.readers.records import TEST, TRAIN, Chunk, Record, Unreadable
from spice_ray.readers.tree import Tree

# Name of the subset, as it stands before the colon, and the list of its synsets in the package.
SUBSETS = {"imagenet10": "imagenet10.txt", "imagenet_dog": "imagenet_dog15.txt"}
_TINY = "Tiny-ImageNet"
_ANNOTATIONS = "val/val_annotations.txt"
_SUFFIX = ".jpeg"
_SYNSET = re.compile(r"n[0-9]{8}")
_MAX_NAMED = 3


@dataclass(frozen=True)
class SynsetChunk:
    """Some image files and their synsets."""

    root: Place
    names: tuple[str, ...]
    synsets: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """How many files the chunk holds."""
        return len(self.names)

    def read(self) -> Iterator[Record]:
        """The bytes of each file, split test below val and train below train; one that is lost carries the reason."""
        contents = read_files([self.root / name for name in self.names])
        for name, synset, data in zip(self.names, self.synsets, contents, strict=True):
            yield Record(printable(name), TEST if name.startswith("val/") else TRAIN, synset, data)


@dataclass(frozen=True)
class SynsetSource:
    """Image files below ``root``, each with the synset it belongs to as its label."""

    kind: str
    root: Place
    images: tuple[Entry, ...] = field(repr=False)
    """Below train or val, in byte order."""
    synsets: tuple[str, ...] = field(repr=False)
    labels_known: bool = True

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the image files."""
        return digest_stamps(self.kind, (stamp(image.name, image.size, image.mtime_ns) for image in self.images))

    def encoded_bytes(self) -> int | None:
        """The sum of the files' sizes; None where one cannot be found."""
        return sum_sizes([image.size for image in self.images])

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The image files in chunks of at most ``rows_per_chunk``."""
        names = tuple(image.name for image in self.images)
        ranges = [slice(start, start + rows_per_chunk) for start in range(0, len(names), rows_per_chunk)]
        return [SynsetChunk(self.root, names[rows], self.synsets[rows]) for rows in ranges]


def open_tiny_imagenet(folder: Tree) -> SynsetSource | None:
    """A source of Tiny-ImageNet where ``folder`` holds its published layout.

    The 100,000 training images are split train, the 10,000 validation images split test with their annotated synsets.
    The 10,000 images of the folder test are left out: their labels were never published, so no score could count them,
    and the paper's 110,000 images are those of training and validation.

    Raises:
        DataError: It does, but a file or a folder of images is missing, or a validation image has no annotation.
    """
    if folder.file("wnids.txt") is None or not folder.has_folder("train"):
        return None
    root = folder.place
    found = _by_synset(folder, "train", _synsets(root / "wnids.txt"), "images")
    annotated = _annotations(root / _ANNOTATIONS)
    [entries] = folder.files(["val/images"])
    if entries is None:
        raise DataError(f"{root} lacks the folder val/images; unpack the archive of {_TINY} again")
    for image in _images(entries, root / "val/images", _TINY):
        synset = annotated.get(posixpath.basename(image.name))
        if synset is None:
            raise DataError(f"{root / image.name} is not in {_ANNOTATIONS}; unpack the archive of {_TINY} again")
        found.append((image, synset))
    return _source("tiny_imagenet", root, found)


def open_imagenet_subset(subset: str, folder: Tree) -> SynsetSource:
    """A source of the classes of ImageNet-10 or ImageNet-Dog in a folder of ImageNet.

    Args:
        subset: A key of ``SUBSETS``.
        folder: Holds train/<synset>/*.JPEG; where it holds val/<synset>/*.JPEG too, these are split test. The papers
            cluster the training images alone (13,000 of ImageNet-10): for their numbers name a folder without val. Of
            a folder on a server only these classes are listed.

    Raises:
        DataError: There is no such folder, or a class of the subset is missing in it.
    """
    if not folder.has_folder("train"):
        raise DataError(
            f"{folder.place} has no folder train; {subset}: needs the folder that holds train/<synset>/*.JPEG"
        )
    lines = package_files("spice_ray.readers") / "synsets" / SUBSETS[subset]
    synsets = _first_words(lines.read_text(encoding="ascii"))
    found = _by_synset(folder, "train", synsets)
    if folder.has_folder("val"):
        found += _by_synset(folder, "val", synsets)
    return _source(subset, folder.place, found)


def _source(kind: str, root: Place, found: list[tuple[Entry, str]]) -> SynsetSource:
    found.sort(key=lambda image: os.fsencode(image[0].name))
    return SynsetSource(kind, root, tuple(image for image, _ in found), tuple(synset for _, synset in found))


def _by_synset(root: Tree, split: str, synsets: Sequence[str], inner: str = "") -> list[tuple[Entry, str]]:
    """Every image in split/<synset>/inner with its synset."""
    folders = [posixpath.join(split, synset, inner).rstrip("/") for synset in synsets]
    listed = root.files(folders)
    missing = [synset for synset, entries in zip(synsets, listed, strict=True) if entries is None]
    if missing:
        named = ", ".join(missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
        raise DataError(
            f"{root.place / split} lacks {len(missing)} of {len(synsets)} folders of images ({named}); unpack ImageNet "
            "so that each synset has a folder of its own"
        )
    return [
        (image, synset)
        for synset, folder, entries in zip(synsets, folders, listed, strict=True)
        for image in _images(entries or [], root.place / folder, f"the synset {synset}")
    ]


def _images(entries: Sequence[Entry], folder: Place, title: str) -> list[Entry]:
    """Those of the entries of ``folder`` that are images; a broken link is one, so that it is listed as a reject."""
    images = [entry for entry in entries if entry.kind == "image" and entry.name.lower().endswith(_SUFFIX)]
    if not images:
        raise DataError(f"{folder} holds no {_SUFFIX.upper()} file; unpack the archive of {title} again")
    return images


def _synsets(file: Place) -> list[str]:
    synsets = list(dict.fromkeys(_first_words(_text(file))))
    # They become parts of paths, which must not lead out of the folder.
    if not synsets or not all(_SYNSET.fullmatch(synset) for synset in synsets):
        raise DataError(f"{file} is not a list of synsets such as n01443537; unpack the archive of {_TINY} again")
    return synsets


def _annotations(file: Place) -> dict[str, str]:
    """Synset by file name; a line is name, synset and a box, with tabs between."""
    rows = [line.split("\t") for line in _text(file).splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{file} has a line without a tab, needed is name, synset and box; unpack the archive again")
    return {row[0]: row[1].strip() for row in rows}


def _text(file: Place) -> str:
    data = read_file(file)
    try:
        if not isinstance(data, Unreadable):
            return data.decode()
        reason = data.reason
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    raise DataError(f"{file} cannot be read as text ({reason}); unpack the archive of {_TINY} again")


def _first_words(text: str) -> list[str]:
    """The first word of every line that is neither empty nor a comment."""
    return [line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")]
