"""A server for fsspec that counts what it is asked for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class CountingServer(AbstractFileSystem):
    """The files of ``counting://host``; a number in the place of a content stands for so many zeros."""

    protocol = "counting"
    files: ClassVar[dict[str, bytes | int]] = {}
    listed: ClassVar[list[str]] = []
    """Folders, relative to the host."""
    fetched: ClassVar[list[tuple[str, int]]] = []
    """Name of the file and number of bytes of each request."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return re.sub("^counting://[^/]*", "", path).strip("/")

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name in self.files:
            content = self.files[name]
            size = content if isinstance(content, int) else len(content)
            return {"name": name, "type": "file", "size": size}
        if any(file.startswith(f"{name}/") for file in self.files):
            return {"name": name, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[dict[str, Any]]:
        inside = f"{self._strip_protocol(path)}/"
        parts = {file.removeprefix(inside).split("/")[0] for file in self.files if file.startswith(inside)}
        return [self.info(f"{inside}{part}") for part in sorted(parts)]

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.listed.append(self._strip_protocol(path))
        return super().find(path, *args, **kwargs)

    def _open(self, path: str, **_: Any) -> AbstractBufferedFile:
        return _CountedFile(self, path, cache_type="none", size=self.info(path)["size"])


class _CountedFile(AbstractBufferedFile):  # type: ignore[misc]
    def _fetch_range(self, start: int, stop: int) -> bytes:
        name = self.path
        CountingServer.fetched.append((name, stop - start))
        content = CountingServer.files[name]
        return bytes(stop - start) if isinstance(content, int) else content[start:stop]


@contextmanager
def counting(files: dict[str, bytes | int]) -> Iterator[type[CountingServer]]:
    fsspec.register_implementation("counting", CountingServer, clobber=True)
    CountingServer.files = files
    CountingServer.listed.clear()
    CountingServer.fetched.clear()
    yield CountingServer
