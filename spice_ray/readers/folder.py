"""A folder of image files, nested as deep as one likes."""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from spice_ray.errors import DataError
from spice_ray.readers.records import TEST, TRAIN, UNLABELED, Chunk, Record, Unreadable

# More than the largest image that is decoded takes uncompressed; a sparse or mislabelled giant must not fill memory.
MAX_FILE_BYTES = 1 << 30
_SPLIT_FOLDERS = {"train": TRAIN, "test": TEST, "val": TEST, "unlabeled": UNLABELED}
_log = logging.getLogger(__name__)


class Listing(NamedTuple):
    """What is in a folder; names are relative to it, in byte order."""

    names: tuple[str, ...]
    num_others: int
    num_linked_folders: int


@dataclass(frozen=True)
class FolderChunk:
    """Some files of a folder."""

    root: str
    names: tuple[str, ...]
    label_from_folder: bool

    @property
    def num_rows(self) -> int:
        """How many files the chunk holds."""
        return len(self.names)

    def read(self) -> Iterator[Record]:
        """The bytes of each file; a file that is gone or may not be read carries the reason."""
        for name in self.names:
            label = _label(name) if self.label_from_folder else None
            yield Record(_printable(name), _split(name), label, _read(os.path.join(self.root, name)))


@dataclass(frozen=True)
class FolderSource:
    """An image folder; a first-level folder named train, test, val or unlabeled is a split, all else is train."""

    root: Path
    labels_known: bool
    kind: str = "folder"

    @cached_property
    def listing(self) -> Listing:
        """All image files, found once."""
        listing = list_images(self.root)
        if listing.num_others:
            _log.info("%s: %d files were ignored, their names are not those of images", self.root, listing.num_others)
        if listing.num_linked_folders:
            _log.info("%s: %d linked folders were not followed", self.root, listing.num_linked_folders)
        return listing

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the image files."""
        digest = hashlib.blake2b(f"{self.kind} {self.labels_known}".encode(), digest_size=16)
        for name in self.listing.names:
            digest.update(file_stamp(self.root, name))
        return digest.hexdigest()

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The image files in chunks of at most ``rows_per_chunk``.

        Raises:
            DataError: A folder cannot be listed.
        """
        names = self.listing.names
        return [
            FolderChunk(str(self.root), names[start : start + rows_per_chunk], self.labels_known)
            for start in range(0, len(names), rows_per_chunk)
        ]


def has_images(root: Path) -> bool:
    """Whether there is an image file anywhere in the folder; stops at the first."""
    return any(kind == "image" for kind, _ in _walk(root))


def list_images(root: Path) -> Listing:
    """All image files of a folder, and the number of everything else that is not hidden.

    Raises:
        DataError: A folder cannot be listed.
    """
    counts = {"other": 0, "link": 0}
    names: list[str] = []
    for kind, name in _walk(root):
        if kind == "image":
            names.append(name)
        else:
            counts[kind] += 1
    return Listing(tuple(sorted(names, key=os.fsencode)), counts["other"], counts["link"])


def file_stamp(root: Path, name: str) -> bytes:
    """Name, size and modification time of a file, for a listing digest; a file that is gone keeps its name."""
    encoded = os.fsencode(name)
    try:
        stat = os.stat(root / name)
    except OSError:
        # Reading it will list it as a reject; the digest must only differ from that of the whole file.
        return encoded + b"\0gone\0"
    return encoded + f"\0{stat.st_size} {stat.st_mtime_ns}\0".encode()


def _walk(root: Path) -> Iterator[tuple[str, str]]:
    """Every visible entry under ``root`` as (image, other or link; name relative to ``root``)."""
    pending = [""]
    while pending:
        folder = pending.pop()
        for entry in _entries(root, folder):
            name = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                pending.append(name)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                # A link may lead back up: following it might never end.
                yield "link", name
            else:
                yield ("image" if _is_candidate(entry) else "other"), name


def _entries(root: Path, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"the folder {_printable(str(root / folder))} cannot be listed ({error.strerror}); "
            "make it readable or move it out of the source"
        ) from None


def _is_candidate(entry: os.DirEntry[str]) -> bool:
    if os.path.splitext(entry.name)[1].lower() not in _extensions():
        return False
    # A broken link counts, so that it is listed as a reject; a pipe or a device does not: reading it could hang.
    return os.path.isfile(entry.path) or (entry.is_symlink() and not os.path.exists(entry.path))


@cache
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    # Pillow writes PDF but cannot read it.
    return frozenset(extension for extension, format_ in known.items() if format_ in Image.OPEN)


def _read(path: str) -> bytes | Unreadable:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                return Unreadable(f"the file has {size} bytes, more than the {MAX_FILE_BYTES} that are read")
            return file.read()
    except OSError as error:
        # One lost file must not end the ingest of millions: it is listed with the reason.
        return Unreadable(f"the file cannot be read: {error.strerror}")


def _split(name: str) -> str:
    first, nested, _ = name.partition(os.sep)
    return _SPLIT_FOLDERS.get(first, TRAIN) if nested else TRAIN


def _label(name: str) -> str | None:
    """The parent folder's name; None where that is the source itself or a split."""
    folders = name.split(os.sep)[:-1]
    if not folders or (len(folders) == 1 and folders[0] in _SPLIT_FOLDERS):
        return None
    return _printable(folders[-1])


def _printable(name: str) -> str:
    """The name as valid text with forward slashes; bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace(os.sep, "/")
