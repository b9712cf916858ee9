"""Files wherever they are: found, listed and read in the same way on a local file system and on a server."""

import glob
import hashlib
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from spice_ray.errors import DataError
from spice_ray.readers import remote
from spice_ray.readers.places import Place, explain, printable
from spice_ray.readers.records import Unreadable

if TYPE_CHECKING:
    import pyarrow as pa

# More than the largest image that is decoded takes uncompressed; a sparse or mislabelled giant must not fill memory.
MAX_FILE_BYTES = 1 << 30
# A server answers many requests at a time in about the time of one; the results wait in memory for their turn.
_REQUESTS_AT_A_TIME = 16
_FILES_AHEAD = 32
# Rows are read so many bytes at a time; a request to a server costs as much time as some megabytes.
_PIECE_BYTES = 1 << 20
_REMOTE_PIECE_BYTES = 8 << 20
_WILDCARDS = "*?["
_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Found(NamedTuple):
    """A file or a folder that is there."""

    place: Place
    is_folder: bool
    size: int | None
    """Bytes; None where a server does not say."""
    mtime_ns: int | None
    """Last change in nanoseconds since 1970; None where a server does not say."""


def find(place: Place) -> Found | None:
    """What is at ``place``; None where there is nothing.

    Raises:
        DataError: A server cannot be asked, or refuses.
    """
    if place.server:
        try:
            info = remote.stat(place)
        except remote.RemoteError as error:
            raise DataError(_refused(place, error)) from None
        return None if info is None else Found(place, info.is_folder, info.size, info.mtime_ns)
    try:
        info_ = os.stat(place.path)
    except (OSError, ValueError):
        # Not there, in a folder that is closed to us, or no path at all: a zero byte or far too long.
        return None
    if not (stat.S_ISREG(info_.st_mode) or stat.S_ISDIR(info_.st_mode)):
        raise DataError(f"{place} is a pipe or a device; give a regular file or a folder")
    return Found(place, stat.S_ISDIR(info_.st_mode), info_.st_size, info_.st_mtime_ns)


def list_remote(folder: Place, *, nested: bool = True) -> list[remote.RemoteFile]:
    """All files of a folder on a server, none where there is no such folder; names are relative to it.

    Raises:
        DataError: The server cannot be asked, or refuses.
    """
    try:
        return remote.list_files(folder, nested=nested)
    except remote.RemoteError as error:
        raise DataError(_refused(folder, error)) from None


def has_wildcard(place: Place) -> bool:
    """Whether the path has a ``*``, a ``?`` or a ``[``."""
    return not place.is_web and any(sign in place.path for sign in _WILDCARDS)


def expand(pattern: Place) -> list[Found]:
    """The files that match a pattern of the shell, ``**`` for any number of folders, in byte order; no hidden ones.

    Raises:
        DataError: A server cannot be asked, or refuses.
    """
    if pattern.server:
        return _expand_remote(pattern)
    names = sorted(glob.glob(pattern.path, recursive=True), key=os.fsencode)
    found = [find(Place(name)) for name in names]
    return [file for file in found if file is not None and not file.is_folder]


def is_hidden(name: str) -> bool:
    """Whether a file or one of the folders on the way to it is hidden; ``name`` is relative, with slashes."""
    return any(part.startswith(".") for part in name.split("/"))


def open_input(place: Place) -> "pa.NativeFile":
    """The file for reading at any position.

    Raises:
        OSError: It cannot be opened.
    """
    if place.server:
        return remote.open_input(place)
    import pyarrow as pa

    return pa.OSFile(place.path)


def file_size(file: Found) -> int:
    """Bytes of a file, asked for where the listing did not say.

    Raises:
        OSError: It cannot be opened.
    """
    if file.size is not None:
        return file.size
    with remote.reporting(), open_input(file.place) as opened:
        return int(opened.size())


def open_stream(place: Place) -> "pa.NativeFile":
    """The file for reading from its beginning to its end.

    Raises:
        OSError: It cannot be opened.
    """
    return remote.open_stream(place) if place.server else open_input(place)


def read_whole(place: Place) -> bytes:
    """The content of a file.

    Raises:
        OSError: It cannot be read, or is larger than what is read of one file.
        ValueError: The place is no path at all.
    """
    if not place.server:
        return _read_local(place.path)
    data = remote.read(place, MAX_FILE_BYTES)
    if len(data) > MAX_FILE_BYTES:
        raise OSError(f"it has more than the {MAX_FILE_BYTES} bytes that are read")
    return data


def read_file(place: Place) -> bytes | Unreadable:
    """The content of a file, or why there is none; one lost file must not end the ingest of millions."""
    try:
        return read_whole(place)
    except (OSError, ValueError) as error:
        return Unreadable(f"the file cannot be read: {explain(error)}")


def read_files(places: Sequence[Place]) -> Iterator[bytes | Unreadable]:
    """What ``read_file`` gives for each, in order; files of servers are fetched some ahead."""
    if not any(place.server for place in places):
        yield from map(read_file, places)
        return
    waiting: deque[Future[bytes | Unreadable]] = deque()
    pool = ThreadPoolExecutor(_REQUESTS_AT_A_TIME)
    try:
        for place in places:
            waiting.append(pool.submit(read_file, place))
            if len(waiting) == _FILES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Who stops reading early does not wait for what was not begun.
        pool.shutdown(wait=False, cancel_futures=True)


def read_rows(place: Place, first_byte: int, row_bytes: int, num_rows: int) -> Iterator[bytes]:
    """Rows of equal length that lie one after the other in a file, some whole ones at a time.

    Args:
        place: The file; of one on a server nothing but these rows is fetched.
        first_byte: Where the first of them begins.
        row_bytes: Length of a row, > 0.
        num_rows: How many follow each other.

    Raises:
        DataError: The file ends before the last row; what is whole was given before.
        OSError: It cannot be read.
    """
    rows_per_piece = max(1, (_REMOTE_PIECE_BYTES if place.server else _PIECE_BYTES) // row_bytes)
    with remote.reporting() if place.server else nullcontext(), open_input(place) as file:
        # Some file systems refuse to go beyond the end.
        file.seek(min(first_byte, file.size()))
        while num_rows > 0:
            asked = min(rows_per_piece, num_rows)
            piece: bytes = file.read(asked * row_bytes)
            whole = len(piece) // row_bytes
            if whole:
                yield piece if whole == asked else piece[: whole * row_bytes]
            num_rows -= whole
            if whole < asked:
                break
    if num_rows > 0:
        raise DataError(f"{place} has become shorter; write or unpack it again")


def ask_each(ask: Callable[[_Item], _Answer], items: Sequence[_Item], *, on_server: bool) -> list[_Answer]:
    """What ``ask`` says of each, in order; a server is asked many questions at a time."""
    if not on_server:
        return [ask(item) for item in items]
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as pool:
        return list(pool.map(ask, items))


def stamp(name: str, size: int | None, mtime_ns: int | None) -> bytes:
    """What a listing digest takes in of a file; without size and time it is one that is gone."""
    encoded = os.fsencode(name)
    if size is None and mtime_ns is None:
        return encoded + b"\0gone\0"
    return encoded + f"\0{size} {mtime_ns}\0".encode()


def relative_names(files: Sequence[Found]) -> list[str]:
    """A printable name for each: relative to the innermost folder that holds them all."""
    folders = {os.path.dirname(file.place.path) for file in files}
    if len(folders) == 1 or len({file.place.server for file in files}) > 1:
        return [printable(file.place.name) for file in files]
    common = os.path.commonpath(folders)
    return [printable(os.path.relpath(file.place.path, common or ".")) for file in files]


def digest_files(kind: str, files: Sequence[Found]) -> str:
    """The listing digest of a source of ``files``: 32 hex digits over their names, sizes and modification times."""
    named = zip(relative_names(files), files, strict=True)
    return digest_stamps(kind, (stamp(name, file.size, file.mtime_ns) for name, file in named))


def digest_stamps(kind: str, stamps: Iterable[bytes]) -> str:
    """The listing digest of a source whose files have these stamps, in this order."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for line in stamps:
        digest.update(line)
    return digest.hexdigest()


def sum_sizes(sizes: Sequence[int | None]) -> int | None:
    """The sizes of files together; None where one is not known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _expand_remote(pattern: Place) -> list[Found]:
    from fsspec.utils import glob_translate

    # The longest part without wildcards is the folder to list.
    parts = pattern.path.split("/")
    depth = next(index for index, part in enumerate(parts) if any(sign in part for sign in _WILDCARDS))
    folder, rest = Place("/".join(parts[:depth]), pattern.server), "/".join(parts[depth:])
    try:
        matches = re.compile(glob_translate(rest)).match
    except ValueError:
        raise DataError(f"{pattern} has a ** beside other letters; write **/ for any number of folders") from None
    files = list_remote(folder, nested="/" in rest or "**" in rest)
    return [
        Found(folder / file.name, False, file.size, file.mtime_ns)
        for file in sorted(files)
        if matches(file.name) and not is_hidden(file.name)
    ]


def _refused(place: Place, error: remote.RemoteError) -> str:
    return f"{place} cannot be reached ({error}); check the URL, the network and the credentials"


def _read_local(path: str) -> bytes:
    with open(path, "rb", opener=_open_at_once) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise OSError("it is a pipe or a device")
        if info.st_size > MAX_FILE_BYTES:
            raise OSError(f"it has {info.st_size} bytes, more than the {MAX_FILE_BYTES} that are read")
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    # A list may name a pipe: opening one that nobody writes to would wait for ever.
    return os.open(path, flags | os.O_NONBLOCK)
