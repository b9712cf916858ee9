"""Local files by their paths: names, sizes and times, and nothing of their content."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from spice_ray.errors import DataError
from spice_ray.readers.places import printable


def digest_files(kind: str, files: Iterable[tuple[str, str]]) -> str:
    """32 hex digits over the names, sizes and modification times of files, in the order given.

    Args:
        kind: Of the source.
        files: (name that counts, path) of each; one that is gone counts by its name.
    """
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for name, path in files:
        digest.update(os.fsencode(name) + _stamp(path))
    return digest.hexdigest()


def sum_sizes(paths: Iterable[str]) -> int | None:
    """The sum of the sizes in bytes; None where one cannot be found."""
    try:
        return sum(os.path.getsize(path) for path in paths)
    except OSError:
        # Whoever reads the file will say what is wrong with it.
        return None


def looks_like(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether at least two of a benchmark's files are in a folder: one might bear such a name by chance."""
    return sum((folder / name).is_file() for name in names) >= 2


def require_files(folder: Path, names: tuple[str, ...], benchmark: str) -> None:
    """Check that a benchmark's files are there.

    Raises:
        DataError: Some are not; the sentence names them.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} looks like {benchmark} but lacks {', '.join(missing)}; unpack its archive again")


def row_prefix(file: Path) -> str:
    """What the names of the rows of a file of the user's own begin with: ``x.npy#``."""
    return printable(file.name) + "#"


def _stamp(path: str) -> bytes:
    try:
        stat = os.stat(path)
    except OSError:
        # Its rows will be listed as rejects; the digest must only differ from that of the whole file.
        return b"\0gone\0"
    return f"\0{stat.st_size} {stat.st_mtime_ns}\0".encode()
