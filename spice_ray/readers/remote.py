"""Files on servers, through the file systems of pyarrow (s3, gs, hdfs, abfs) and fsspec (all others).

Credentials and endpoints are those that the libraries find in the environment, or stand in the URL as they take them.
"""

import io
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from spice_ray.readers import web
from spice_ray.readers.places import Place, explain

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.fs import FileInfo, FileSystem

_ARROW_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")
_OBJECT_STORES = ("s3://", "gs://", "gcs://", "abfs://", "abfss://")
# A request costs as much time as some megabytes.
_BUFFER_BYTES = 8 << 20


class RemoteError(OSError):
    """A server that did not give what it was asked for; the message says why, without naming the file."""


class RemoteFile(NamedTuple):
    """What a server says of a file or a folder."""

    name: str
    """Relative to the folder that was listed, with slashes; of a single file its path on the server."""
    is_folder: bool
    size: int | None
    mtime_ns: int | None


def stat(place: Place) -> RemoteFile | None:
    """What is at ``place``; None where there is nothing.

    Raises:
        RemoteError: The server cannot be asked, or refuses.
    """
    with reporting():
        if place.is_web:
            return _stat_web(place)
        system, path = locate(place)
        info = system.get_file_info(path)
        return None if info.type.name == "NotFound" else _described(info, info.path)


def list_files(folder: Place, *, nested: bool) -> list[RemoteFile]:
    """All files of a folder, in no order; none where there is no such folder.

    Raises:
        RemoteError: The server cannot be asked, or refuses.
    """
    from pyarrow.fs import FileSelector

    with reporting():
        if folder.is_web:
            raise RemoteError("files on a web server cannot be listed; give a list of their URLs")
        system, path = locate(folder)
        found = system.get_file_info(FileSelector(path, allow_not_found=True, recursive=nested))
    # Some file systems write a leading slash here and not there.
    start = path.strip("/")
    names = (info.path.lstrip("/").removeprefix(start).lstrip("/") for info in found)
    return [_described(info, name) for info, name in zip(found, names, strict=True) if info.type.name == "File"]


def list_names(folder: Place) -> list[str]:
    """The names of the files and folders in a folder, sorted; none where there is no such folder.

    Raises:
        RemoteError: The server cannot be asked, or refuses.
    """
    from pyarrow.fs import FileSelector

    with reporting():
        system, path = locate(folder)
        found = system.get_file_info(FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found)


def open_input(place: Place) -> "pa.NativeFile":
    """The file for reading at any position.

    Raises:
        RemoteError: It cannot be opened.
    """
    import pyarrow as pa

    with reporting():
        if place.is_web:
            size, _ = web.stat_url(_web_url(place))
            # Not every web server gives parts of a file.
            if size is not None and size <= _BUFFER_BYTES:
                return pa.BufferReader(web.read_url(_web_url(place), _BUFFER_BYTES))
        system, path = locate(place)
        return system.open_input_file(path)


def open_stream(place: Place) -> "pa.NativeFile":
    """The file for reading from its beginning to its end.

    Raises:
        RemoteError: It cannot be opened.
    """
    import pyarrow as pa

    with reporting():
        if place.is_web:
            return pa.PythonFile(web.open_url(_web_url(place)), mode="r")
        system, path = locate(place)
        return system.open_input_stream(path, compression=None, buffer_size=_BUFFER_BYTES)


def read(place: Place, max_bytes: int) -> bytes:
    """The content of a file; of one that is longer than ``max_bytes`` a little more than that.

    Raises:
        RemoteError: It cannot be read.
    """
    with reporting():
        if place.is_web:
            return web.read_url(_web_url(place), max_bytes)
        with open_input(place) as file:
            # Not simply max_bytes + 1: so much memory would be asked for at once.
            content: bytes = file.read(min(file.size(), max_bytes + 1))
            return content


def write(place: Place, content: bytes) -> None:
    """Make a file, or replace one.

    Raises:
        RemoteError: It cannot be written.
    """
    _write(place, io.BytesIO(content))


def upload(file: Path, place: Place) -> None:
    """Make a copy of a local file, or replace what is there by one.

    Raises:
        RemoteError: It cannot be written.
        OSError: ``file`` cannot be opened.
    """
    with file.open("rb") as content:
        _write(place, content)


def download(place: Place, file: Path) -> None:
    """Make a local copy of a file.

    Raises:
        RemoteError: It cannot be read.
        OSError: ``file`` cannot be written.
    """
    with open_stream(place) as content, file.open("wb") as stream:
        while piece := _piece_of(content):
            stream.write(piece)


def _piece_of(content: "pa.NativeFile") -> bytes:
    with reporting():
        piece: bytes = content.read(_BUFFER_BYTES)
        return piece


def delete(place: Place) -> None:
    """Delete a file, or a folder with all that is in it; nothing where there is none.

    Raises:
        RemoteError: It cannot be deleted.
    """
    with reporting():
        system, path = locate(place)
        found = system.get_file_info(path).type.name
        if found == "Directory":
            system.delete_dir(path)
        elif found != "NotFound":
            system.delete_file(path)


def _write(place: Place, content: IO[bytes]) -> None:
    """Write a file that nobody sees before it is whole."""
    with reporting(), ThreadPoolExecutor(1) as pool:
        # An interrupt would end the file where it is, and reaches the main thread alone.
        pool.submit(_copy, *locate(place), content, place.server.startswith(_OBJECT_STORES)).result()


def _copy(system: "FileSystem", path: str, content: IO[bytes], is_object_store: bool) -> None:
    if is_object_store:  # which has no folders, and shows what is complete
        with system.open_output_stream(path, compression=None) as stream:
            shutil.copyfileobj(content, stream, _BUFFER_BYTES)
        return
    folder, _, name = path.rpartition("/")
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}"
    system.create_dir(folder, recursive=True)
    with system.open_output_stream(temporary, compression=None) as stream:
        shutil.copyfileobj(content, stream, _BUFFER_BYTES)
    system.move(temporary, path)


def _stat_web(place: Place) -> RemoteFile | None:
    try:
        size, mtime_ns = web.stat_url(_web_url(place))
    except FileNotFoundError:
        return None
    return RemoteFile(place.path, False, size, mtime_ns)


def _web_url(place: Place) -> str:
    return f"{place.server}/{place.path}"


def _described(info: "FileInfo", name: str) -> RemoteFile:
    return RemoteFile(name, info.type.name == "Directory", info.size, info.mtime_ns)


def locate(place: Place) -> tuple["FileSystem", str]:
    """The file system and the path in it."""
    system, root = _connect(place.server)
    return system, f"{root.rstrip('/')}/{place.path}".rstrip("/") if root else place.path


@lru_cache(maxsize=64)
def _connect(server: str) -> tuple["FileSystem", str]:
    """The file system of a server and the path of its root; one for each server in a process."""
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    scheme, _, rest = server.partition("://")
    if scheme in _ARROW_SCHEMES:
        host, mark, settings = rest.partition("?")
        system, root = FileSystem.from_uri(f"{scheme}://{host}/{mark}{settings}")
        return system, root
    from fsspec.core import url_to_fs

    system, root = url_to_fs(server, use_listings_cache=False)
    return PyFileSystem(FSSpecHandler(system)), root


@contextmanager
def reporting() -> Iterator[None]:
    """Whatever a storage library raises within becomes a ``RemoteError`` that says why."""
    try:
        yield
    except RemoteError:
        raise
    except Exception as error:
        # Each storage library has errors of its own. Whatever they are, the caller has to say one sentence to the user,
        # or to list one file as a reject and go on.
        raise RemoteError(explain(error)) from None
