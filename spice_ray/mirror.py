"""Run folders on a server: every node keeps what it has written or read of them in a local folder, the mirror.

A path in the mirror names its URL, so that each process which is given one knows what it is a copy of, on any node:
``<cache>/spice-ray-mirror/s3%3A%2F%2Fbucket/runs/one`` is ``s3://bucket/runs/one``. What is on the server counts. Large
files are fetched when they are asked for, once by each node, and mapped from there; records and lists of names are
asked of the server every time. Of any other path, what is here does what the file system does.

``<cache>`` is the folder that SPICE_RAY_CACHE names, else one in the folder for temporary files; the process that
starts a run settles it for all nodes.
"""

import errno
import fcntl
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from spice_ray.errors import StorageError, UnreachableError

if TYPE_CHECKING:
    import pyarrow as pa

    from spice_ray.readers.places import Place
    from spice_ray.readers.remote import RemoteFile

_MIRROR, _STAGING = "spice-ray-mirror", "spice-ray-staging"
_MIRRORED = re.compile(rf"(?:/[^/\s]*)*/{_MIRROR}/([^/\s]+%3A%2F%2F[^/\s]*)")
_OF_KEYS = ("s3://", "gs://", "gcs://")
"""Before an @ these have a key, and others the name of a user or a container."""
_LARGEST_RECORD = 1 << 30
_SPARE = 0.1
"""Of a disk, which copies of what is read again and again leave free."""


def path_of(text: str | Path) -> Path:
    """The path of a local folder, or the one in the mirror that stands for a URL; of a path itself.

    Raises:
        StorageError: A web server, which nobody can write to, or a URL that holds a key or leads out of its bucket.
    """
    from spice_ray.readers.places import is_url, place_of

    text = str(text)
    if not is_url(text):
        return Path(text)
    place = place_of(text)
    if not place.server:
        return Path(place.path)
    if place.is_web:
        raise StorageError(f"{place} is on a web server, which takes no files; give a folder or a URL such as s3://")
    user = place.server.partition("://")[2].rpartition("@")[0]
    if ":" in user or (user and place.server.startswith(_OF_KEYS)):
        raise StorageError(f"the URL of {place} holds a key; leave it out and give it by the environment")
    path = posixpath.normpath(place.path or ".")
    if path.startswith(("..", "/")):
        raise StorageError(f"{place} leads out of its server's folders; give the URL of a folder in it")
    return _cache() / _MIRROR / quote(place.server, safe="") / path


def url_of(path: Path) -> str:
    """The URL that a path stands for, of which :func:`path_of` makes the path again; of any other path its text."""
    if not is_mirrored(path):
        return str(path)
    place = _place(path)
    server, mark, settings = place.server.partition("?")
    return f"{server}/{place.path}{mark}{settings}"


def joined(folder: Path, text: str) -> Path:
    """The path or URL ``text``, seen from a folder."""
    return Path(os.path.normpath(folder / path_of(text)))


def is_mirrored(path: Path) -> bool:
    """Whether the path stands for a URL."""
    return _index(path.parts) is not None


def shown(text: object) -> str:
    """A path or a sentence as users read it: with URLs, but for their settings, in the place of paths in the mirror."""
    short = str(text).replace(f"{_cache()}/{_MIRROR}/", f"/{_MIRROR}/")  # the name of the cache may hold spaces
    return _MIRRORED.sub(lambda found: _show(unquote(found[1])), short)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder.

    Raises:
        UnreachableError: The server does not answer, as of all that is here.
    """
    return _stat(path) is not None if is_mirrored(path) else path.exists()


def is_file(path: Path) -> bool:
    """Whether there is something there that is no folder."""
    if is_mirrored(path):
        found = _stat(path)
        return found is not None and not found.is_folder
    return os.path.lexists(path) and not os.path.isdir(path)


def make_here(folder: Path) -> None:
    """Make the folder on this node if it stands for a URL; any other was made by one node and is seen by all."""
    if is_mirrored(folder):
        folder.mkdir(parents=True, exist_ok=True)


def names(folder: Path) -> list[str]:
    """The names of all that is in a folder, sorted; none where there is no such folder."""
    if not is_mirrored(folder):
        try:
            return sorted(os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
    from spice_ray.readers import remote

    with _reporting(folder):
        return remote.list_names(_place(folder))


def read_bytes(file: Path) -> bytes:
    """What is in a file now; nothing of it is kept here.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_mirrored(file):
        return file.read_bytes()
    from spice_ray.readers import remote

    _stat_file(file)
    with _reporting(file):
        return remote.read(_place(file), _LARGEST_RECORD)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of it."""
    if is_mirrored(file):
        from spice_ray.readers import remote

        with _reporting(file):
            remote.write(_place(file), content)
        return
    with _temporary(file) as temporary:
        temporary.write_bytes(content)
        os.replace(temporary, file)


def temporary_of(file: Path) -> Path:
    """A name beside the file that no other process has."""
    return file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")


def local(file: Path) -> Path:
    """The file itself, fetched where this node lacks it or has an older one; it is not there if the server has none."""
    if not is_mirrored(file):
        return file
    found = _stat(file)
    if found is None or found.is_folder:
        file.unlink(missing_ok=True)
    elif not _is_copy(file, found):
        with _reporting(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.with_name(f".{file.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # what other processes of this node wait for is fetched once
                if not _is_copy(file, found):
                    _fetch(file, found)
    return file


def read_copy(file: Path) -> bytes:
    """What is in a file that is written once: by this node's copy, which is made where the disk has room for it.

    Raises:
        FileNotFoundError: There is none.
    """
    if not is_mirrored(file):
        return file.read_bytes()
    from spice_ray.readers import remote

    found = _stat_file(file)
    if _is_copy(file, found):
        return file.read_bytes()
    with _reporting(file):
        content = remote.read(_place(file), found.size or _LARGEST_RECORD)
    # One that cannot be kept is read from the server every time.
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        if has_room(file.parent, len(content)):
            with _temporary(file) as temporary:
                temporary.write_bytes(content)
                _keep(temporary, file, found)
    return content


def has_room(folder: Path, num_bytes: int) -> bool:
    """Whether the disk has so much room that a tenth of it stays free."""
    disk = shutil.disk_usage(folder)
    return disk.free - num_bytes > _SPARE * disk.total


def open_input(file: Path) -> "pa.NativeFile":
    """The file for reading at any position, mapped or on the server."""
    import pyarrow as pa

    if not is_mirrored(file):
        return pa.memory_map(str(file))
    from spice_ray.readers import remote

    with _reporting(file):
        return remote.open_input(_place(file))


def deliver(temporary: Path, file: Path, *, keep: bool = True) -> None:
    """Give a file that is complete its own name; of one on a server a copy stays here, unless that is not wanted."""
    if not is_mirrored(file):
        os.replace(temporary, file)
        return
    from spice_ray.readers import remote

    try:
        with _reporting(file):
            remote.upload(temporary, _place(file))
            if keep:
                file.parent.mkdir(parents=True, exist_ok=True)
                _keep(temporary, file, remote.stat(_place(file)))
    finally:
        temporary.unlink(missing_ok=True)


def deliver_folder(staging: Path, folder: Path, last: str) -> None:
    """Give the files of a folder on a server their names, the file ``last`` after all others."""
    for file in sorted(staging.iterdir(), key=lambda found: (found.name == last, found.name)):
        deliver(file, folder / file.name)
    staging.rmdir()


def send(file: Path) -> None:
    """Put a file that was written here on its server."""
    if is_mirrored(file):
        from spice_ray.readers import remote

        with _reporting(file):
            remote.upload(file, _place(file))


def remove(path: Path) -> None:
    """Remove a file or a folder, and the server's as far as it lets one: what is over needs no more than room."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if is_mirrored(path):
        from spice_ray.readers import remote

        with suppress(remote.RemoteError):
            remote.delete(_place(path))


def staging_of(root: Path) -> Path:
    """Where what will be in the folder ``root`` is made, on the same disk."""
    at = _index(root.parts)
    return root if at is None else Path(*root.parts[:at], _STAGING, *root.parts[at + 1 :])


def storage_of(folder: Path) -> dict[str, Any]:
    """The folder as Ray Train and Ray Tune take it: ``storage_path``, and ``storage_filesystem`` of a server."""
    if not is_mirrored(folder):
        return {"storage_path": str(folder.resolve())}
    from spice_ray.readers import remote

    with _reporting(folder):
        system, path = remote.locate(_place(folder))
    return {"storage_path": path, "storage_filesystem": system}


def _cache() -> Path:
    named = os.environ.get("SPICE_RAY_CACHE")
    # Not tempfile's, which writes a file to try it.
    folder = named or f"{os.environ.get('TMPDIR', '/tmp')}/spice-ray-{os.getuid()}"
    return Path(os.path.abspath(folder))


def _index(parts: tuple[str, ...]) -> int | None:
    """Where the mirror is in a path, None in one that stands for no URL: the folder of a server is behind it."""
    found = (at for at in range(len(parts) - 1) if parts[at] == _MIRROR and "%3A%2F%2F" in parts[at + 1])
    return next(found, None)


def _place(path: Path) -> "Place":
    from spice_ray.readers.places import Place

    parts = Path(os.path.normpath(path)).parts
    at = _index(parts)
    assert at is not None
    return Place("/".join(parts[at + 2 :]), unquote(parts[at + 1]))


def _show(server: str) -> str:
    from spice_ray.readers.places import Place

    return str(Place("", server))


def _stat(path: Path) -> "RemoteFile | None":
    from spice_ray.readers import remote

    with _reporting(path):
        return remote.stat(_place(path))


def _stat_file(file: Path) -> "RemoteFile":
    found = _stat(file)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    return found


def _is_copy(file: Path, found: "RemoteFile") -> bool:
    try:
        held = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    # Some servers tell no times: then nobody knows.
    return held.st_size == found.size and held.st_mtime_ns == found.mtime_ns


def _fetch(file: Path, found: "RemoteFile") -> None:
    from spice_ray.readers import remote

    with _temporary(file) as temporary:
        remote.download(_place(file), temporary)
        if found.size is not None and temporary.stat().st_size != found.size:
            raise remote.RemoteError("it changed or ended while it was read")
        _keep(temporary, file, found)


@contextmanager
def _temporary(file: Path) -> Iterator[Path]:
    """A file beside another, gone afterwards unless it was given that one's name."""
    temporary = temporary_of(file)
    try:
        yield temporary
    finally:
        with suppress(OSError):  # what could not be written may not be there to remove
            temporary.unlink()


def _keep(temporary: Path, file: Path, found: "RemoteFile | None") -> None:
    """Take a local file for a copy of the server's; by its time it is known whether it still is one."""
    time = 0 if found is None else found.mtime_ns or 0
    os.utime(temporary, ns=(time, time))
    os.replace(temporary, file)


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    from spice_ray.readers.remote import RemoteError

    try:
        yield
    except RemoteError as error:
        raise UnreachableError(
            f"{path} cannot be reached ({error}); see that every node reaches the server and may write there, then run "
            "the same command again"
        ) from error
    except OSError as error:
        at = _index(path.parts)
        raise StorageError(
            f"{Path(*path.parts[:at])} cannot hold the copy of {path} ({error.strerror or error}); free some space "
            "there, or name another folder of every node by SPICE_RAY_CACHE"
        ) from error
