"""Benchmarks that are image files in folders named by WordNet synsets: Tiny-ImageNet and subsets of ImageNet."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path

from spice_ray.errors import DataError
from spice_ray.readers.local import digest_files, sum_sizes
from spice_ray.readers.places import printable
from spice_ray.readers.records import TEST, TRAIN, Chunk, Record, Unreadable

# Name of the subset, as it stands before the colon, and the list of its synsets in the package.
SUBSETS = {"imagenet10": "imagenet10.txt", "imagenet_dog": "imagenet_dog15.txt"}
_TINY = "Tiny-ImageNet"
_ANNOTATIONS = os.path.join("val", "val_annotations.txt")
_SUFFIX = ".jpeg"
_SYNSET = re.compile(r"n[0-9]{8}")
_MAX_NAMED = 3


@dataclass(frozen=True)
class SynsetChunk:
    """Some image files and their synsets."""

    root: str
    names: tuple[str, ...]
    synsets: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """How many files the chunk holds."""
        return len(self.names)

    def read(self) -> Iterator[Record]:
        """The bytes of each file, split test below val and train below train; one that is lost carries the reason."""
        for name, synset in zip(self.names, self.synsets, strict=True):
            split = TEST if name.startswith("val" + os.sep) else TRAIN
            yield Record(printable(name), split, synset, _read(os.path.join(self.root, name)))


@dataclass(frozen=True)
class SynsetSource:
    """Image files below ``root``, each with the synset it belongs to as its label."""

    kind: str
    root: Path
    names: tuple[str, ...]
    """Relative to ``root``, in byte order; below train or val."""
    synsets: tuple[str, ...]
    labels_known: bool = True

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the image files."""
        return digest_files(self.kind, zip(self.names, self._paths(), strict=True))

    def encoded_bytes(self) -> int | None:
        """The sum of the files' sizes; None where one cannot be found."""
        return sum_sizes(self._paths())

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The image files in chunks of at most ``rows_per_chunk``."""
        ranges = [slice(start, start + rows_per_chunk) for start in range(0, len(self.names), rows_per_chunk)]
        return [SynsetChunk(str(self.root), self.names[rows], self.synsets[rows]) for rows in ranges]

    def _paths(self) -> Iterator[str]:
        return (os.path.join(self.root, name) for name in self.names)


def open_tiny_imagenet(folder: Path) -> SynsetSource | None:
    """A source of Tiny-ImageNet where ``folder`` holds its published layout.

    The 100,000 training images are split train, the 10,000 validation images split test with their annotated synsets.
    The 10,000 images of the folder test are left out: their labels were never published, so no score could count them,
    and the paper's 110,000 images are those of training and validation.

    Raises:
        DataError: It does, but a file or a folder of images is missing, or a validation image has no annotation.
    """
    if not ((folder / "wnids.txt").is_file() and (folder / "train").is_dir()):
        return None
    found = _by_synset(folder, "train", _synsets(folder / "wnids.txt"), "images")
    annotated = _annotations(folder / _ANNOTATIONS)
    for name in _images(folder, os.path.join("val", "images"), _TINY):
        synset = annotated.get(os.path.basename(name))
        if synset is None:
            raise DataError(f"{folder / name} is not in {_ANNOTATIONS}; unpack the archive of {_TINY} again")
        found.append((name, synset))
    return _source("tiny_imagenet", folder, found)


def open_imagenet_subset(subset: str, folder: Path) -> SynsetSource:
    """A source of the classes of ImageNet-10 or ImageNet-Dog in a folder of ImageNet.

    Args:
        subset: A key of ``SUBSETS``.
        folder: Holds train/<synset>/*.JPEG; where it holds val/<synset>/*.JPEG too, these are split test. The papers
            cluster the training images alone (13,000 of ImageNet-10): for their numbers name a folder without val.

    Raises:
        DataError: There is no such folder, or a class of the subset is missing in it.
    """
    if not (folder / "train").is_dir():
        raise DataError(f"{folder} has no folder train; {subset}: needs the folder that holds train/<synset>/*.JPEG")
    lines = package_files("spice_ray.readers") / "synsets" / SUBSETS[subset]
    synsets = _first_words(lines.read_text(encoding="ascii"))
    found = _by_synset(folder, "train", synsets, "")
    if (folder / "val").is_dir():
        found += _by_synset(folder, "val", synsets, "")
    return _source(subset, folder, found)


def _source(kind: str, root: Path, found: list[tuple[str, str]]) -> SynsetSource:
    found.sort(key=lambda image: os.fsencode(image[0]))
    return SynsetSource(kind, root, tuple(name for name, _ in found), tuple(synset for _, synset in found))


def _by_synset(root: Path, split: str, synsets: Sequence[str], inner: str) -> list[tuple[str, str]]:
    """(name relative to ``root``, synset) of every image in split/<synset>/inner."""
    missing = [synset for synset in synsets if not (root / split / synset / inner).is_dir()]
    if missing:
        named = ", ".join(missing[:_MAX_NAMED]) + (", ..." if len(missing) > _MAX_NAMED else "")
        raise DataError(
            f"{root / split} lacks {len(missing)} of {len(synsets)} folders of images ({named}); unpack ImageNet so "
            "that each synset has a folder of its own"
        )
    return [
        (name, synset)
        for synset in synsets
        for name in _images(root, os.path.join(split, synset, inner), f"the synset {synset}")
    ]


def _images(root: Path, folder: str, title: str) -> list[str]:
    """The images of ``folder`` by their names relative to ``root``."""
    if not (root / folder).is_dir():
        raise DataError(f"{root} lacks the folder {folder}; unpack the archive of {title} again")
    try:
        with os.scandir(root / folder) as entries:
            names = [os.path.join(folder, entry.name) for entry in entries if _is_image(entry)]
    except OSError as error:
        raise DataError(f"{root / folder} cannot be listed ({error.strerror}); make it readable") from None
    if not names:
        raise DataError(f"{root / folder} holds no {_SUFFIX.upper()} file; unpack the archive of {title} again")
    return names


def _is_image(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or not entry.name.lower().endswith(_SUFFIX):
        return False
    # A broken link counts, so that it is listed as a reject; a pipe does not: reading it could hang.
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def _read(path: str) -> bytes | Unreadable:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        # One lost file must not end the ingest: it is listed with the reason.
        return Unreadable(f"the file cannot be read: {error.strerror}")


def _synsets(file: Path) -> list[str]:
    synsets = list(dict.fromkeys(_first_words(_text(file))))
    # They become parts of paths, which must not lead out of the folder.
    if not synsets or not all(_SYNSET.fullmatch(synset) for synset in synsets):
        raise DataError(f"{file} is not a list of synsets such as n01443537; unpack the archive of {_TINY} again")
    return synsets


def _annotations(file: Path) -> dict[str, str]:
    """Synset by file name; a line is name, synset and a box, with tabs between."""
    rows = [line.split("\t") for line in _text(file).splitlines() if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{file} has a line without a tab, needed is name, synset and box; unpack the archive again")
    return {row[0]: row[1].strip() for row in rows}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read as text ({type(error).__name__}); unpack the archive of {_TINY} again"
        ) from None


def _first_words(text: str) -> list[str]:
    """The first word of every line that is neither empty nor a comment."""
    return [line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")]
