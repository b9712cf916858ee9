"""A folder of image files, nested as deep as one likes, local or on a server."""

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

from PIL import Image

from spice_ray.errors import DataError
from spice_ray.readers.files import digest_stamps, is_hidden, list_remote, read_files, stamp, sum_sizes
from spice_ray.readers.places import Place, place_of, printable
from spice_ray.readers.records import SPLIT_FOLDERS, TRAIN, Chunk, Record, split_of_folder

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A file of a folder that is not hidden, or a link to another folder."""

    name: str
    """Relative to the folder."""
    kind: str
    """image, other or link."""
    size: int | None
    mtime_ns: int | None


class Listing(NamedTuple):
    """What is in a folder; names are relative to it, in byte order."""

    names: tuple[str, ...]
    num_others: int
    num_linked_folders: int
    digest: str
    """Over names, sizes and modification times of the images."""
    num_bytes: int | None
    """The images' sizes together; None where one is not known."""


@dataclass(frozen=True)
class FolderChunk:
    """Some files of a folder."""

    root: str
    """Path or URL."""
    names: tuple[str, ...]
    label_from_folder: bool

    @property
    def num_rows(self) -> int:
        """How many files the chunk holds."""
        return len(self.names)

    def read(self) -> Iterator[Record]:
        """The bytes of each file; a file that is gone or may not be read carries the reason."""
        root = place_of(self.root)
        contents = read_files([root / name for name in self.names])
        for name, data in zip(self.names, contents, strict=True):
            shown = printable(name)
            label = _label(shown) if self.label_from_folder else None
            yield Record(shown, split_of_folder(shown) or TRAIN, label, data)


@dataclass(frozen=True)
class FolderSource:
    """An image folder; a first-level folder named train, test, val or unlabeled is a split, all else is train."""

    root: str
    """Path or URL."""
    labels_known: bool
    entries: tuple[Entry, ...] | None = field(default=None, repr=False)
    """What is in the folder, where that is known already; a server is not asked twice."""
    kind: str = "folder"

    @cached_property
    def listing(self) -> Listing:
        """All image files, found once."""
        root = place_of(self.root)
        listing = _listing(walk(root) if self.entries is None else self.entries)
        if listing.num_others:
            _log.warning(
                "%s: %d files are left out, their names have no extension of an image; a list of their paths (.txt) "
                "would have them read",
                root,
                listing.num_others,
            )
        if listing.num_linked_folders:
            _log.warning("%s: %d links to folders are not followed", root, listing.num_linked_folders)
        return listing

    def listing_digest(self) -> str:
        """32 hex digits over the names, sizes and modification times of the image files.

        Raises:
            DataError: A folder cannot be listed.
        """
        return self.listing.digest

    def encoded_bytes(self) -> int | None:
        """The sizes of all image files together; None where one of them cannot be found.

        Raises:
            DataError: A folder cannot be listed.
        """
        return self.listing.num_bytes

    def chunks(self, rows_per_chunk: int) -> list[Chunk]:
        """The image files in chunks of at most ``rows_per_chunk``.

        Raises:
            DataError: A folder cannot be listed.
        """
        names = self.listing.names
        return [
            FolderChunk(self.root, names[start : start + rows_per_chunk], self.labels_known)
            for start in range(0, len(names), rows_per_chunk)
        ]


def walk(root: Place) -> Iterator[Entry]:
    """Every file under ``root`` that is not hidden, in no order.

    Raises:
        DataError: A folder cannot be listed.
    """
    if not root.server:
        yield from _walk_local(root.path)
        return
    yield from _remote_entries(root, nested=True)


def list_folder(folder: Place) -> list[Entry] | None:
    """Every file directly in ``folder`` that is not hidden, in no order; None where there is no such folder.

    Raises:
        DataError: It cannot be listed.
    """
    if folder.server:
        # A server knows no empty folders.
        return list(_remote_entries(folder, nested=False)) or None
    if not os.path.isdir(folder.path):
        return None
    files = (entry for entry in _entries(folder.path, "") if not entry.is_dir(follow_symlinks=False))
    return [_described(entry, entry.name) for entry in files]


def has_image_name(name: str) -> bool:
    """Whether the extension is one of a format that Pillow reads."""
    return os.path.splitext(name)[1].lower() in _extensions()


def _listing(entries: Iterable[Entry]) -> Listing:
    # The stamps begin with the names and hold no zero byte before its end: they sort as the names do.
    stamps, sizes, num_others, num_links = list[bytes](), list[int | None](), 0, 0
    for name, kind, size, mtime_ns in entries:
        if kind == "image":
            stamps.append(stamp(name, size, mtime_ns))
            sizes.append(size)
        else:
            num_others += kind == "other"
            num_links += kind == "link"
    stamps.sort()
    names = tuple(os.fsdecode(line.partition(b"\0")[0]) for line in stamps)
    return Listing(names, num_others, num_links, digest_stamps("folder", stamps), sum_sizes(sizes))


def _remote_entries(folder: Place, *, nested: bool) -> Iterator[Entry]:
    for file in list_remote(folder, nested=nested):
        if not is_hidden(file.name):
            yield Entry(file.name, "image" if has_image_name(file.name) else "other", file.size, file.mtime_ns)


def _walk_local(root: str) -> Iterator[Entry]:
    pending = [""]
    while pending:
        folder = pending.pop()
        for entry in _entries(root, folder):
            name = f"{folder}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                pending.append(name + os.sep)
            else:
                yield _described(entry, name)


def _entries(root: str, folder: str) -> list[os.DirEntry[str]]:
    path = os.path.join(root, folder)
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"the folder {printable(path.rstrip(os.sep))} cannot be listed ({error.strerror}); "
            "make it readable or move it out of the source"
        ) from None


def _described(entry: os.DirEntry[str], name: str) -> Entry:
    kind = "image" if has_image_name(name) else "other"
    try:
        # Follows links. One system call for each file, and the only one.
        info = entry.stat()
    except OSError:
        # A broken link counts, so that it is listed as a reject.
        return Entry(name, kind, None, None)
    if stat.S_ISDIR(info.st_mode):
        # A link may lead back up: following it might never end.
        return Entry(name, "link", None, None)
    if not stat.S_ISREG(info.st_mode):
        # A pipe or a device: reading it could hang.
        return Entry(name, "other", None, None)
    return Entry(name, kind, info.st_size, info.st_mtime_ns)


@cache
def _extensions() -> frozenset[str]:
    known = Image.registered_extensions()
    # Pillow writes PDF but cannot read it.
    return frozenset(extension for extension, format_ in known.items() if format_ in Image.OPEN)


def _label(name: str) -> str | None:
    """The parent folder's name; None where that is the source itself or a split."""
    folders = name.split("/")[:-1]
    if not folders or (len(folders) == 1 and folders[0] in SPLIT_FOLDERS):
        return None
    return folders[-1]
