"""The place of a file or a folder: a local path, or a path on a server that a URL names; and how both are shown."""

import errno
import os
import re
from dataclasses import dataclass, replace
from posixpath import normpath
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# Settings of a file system, such as ?region=eu-west-1&endpoint_override=host:9000; a single ? is part of a glob.
_SETTINGS = re.compile(r"\?(?=[a-z_]+=)")
_USER = re.compile(r"//[^/@\s]*@")
# Name, status of a nameless error, and details; what follows in brackets is the number of the request.
_AWS_ERROR = re.compile(r"AWS Error (?:UNKNOWN \((HTTP status \d+)\)|([A-Z_]+))(?:.*?Details: ([^(]*))?", re.DOTALL)
_MAX_REASON = 200


@dataclass(frozen=True)
class Place:
    """Where something is; small and picklable, and nothing is asked of a server to make one.

    ``str`` shows it without passwords, keys and settings.
    """

    path: str
    """An absolute local path, or what follows the host or bucket in the URL, with slashes."""
    server: str = ""
    """The URL without its path, empty for a local place; it may hold secrets."""

    @property
    def is_web(self) -> bool:
        """Whether it is fetched by http or https, where nothing can be listed."""
        return self.server.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        """The last part of the path."""
        if self.is_web:
            return unquote(urlsplit(str(self)).path.rpartition("/")[2])
        return os.path.basename(self.path)

    @property
    def parent(self) -> "Place":
        """The folder that it is in."""
        path = self.path.partition("?")[0] if self.is_web else self.path
        return replace(self, path=os.path.dirname(path))

    def __truediv__(self, name: str) -> "Place":
        if not self.server:
            return Place(os.path.join(self.path, name))
        return replace(self, path=normpath(os.path.join(self.path, name)))

    def __str__(self) -> str:
        if not self.server:
            return printable(self.path)
        server = _SETTINGS.split(without_user(self.server))[0]
        return f"{server}/{self.path}" if self.path else server


def is_url(text: str) -> bool:
    """Whether ``text`` begins as a URL does."""
    return _URL.match(text) is not None


def place_of(text: str) -> Place:
    """What a path or a URL names.

    Args:
        text: A path; file:///path; or scheme://host/path, where host is the bucket in s3:// and gs://. The path is
            taken literally and not unquoted, but in http:// and file://. Settings that pyarrow takes in a URL may
            follow the path: ``s3://bucket/path?region=eu-west-1``.
    """
    match = _URL.match(text)
    if match is None:
        return Place(os.path.abspath(text))
    scheme, rest = match[1].lower(), match[2]
    if scheme == "file":
        return Place(os.path.abspath(url2pathname(urlsplit(text).path)))
    settings = ""
    found = None if scheme in ("http", "https") else _SETTINGS.search(rest)
    if found is not None:
        rest, settings = rest[: found.start()], rest[found.start() :]
    host, _, path = rest.partition("/")
    return Place(path.rstrip("/"), f"{scheme}://{host}{settings}")


def printable(name: str) -> str:
    """The name as valid text with forward slashes; bytes that are not UTF-8 become backslash escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace").replace(os.sep, "/")


def without_user(url: str) -> str:
    """The URL without user name, key and password."""
    return _USER.sub("//", url)


def explain(error: BaseException) -> str:
    """Why a file system or a server failed: one line, the same in every run, without secrets."""
    aws = _AWS_ERROR.search(str(error))
    if aws is not None:
        code = aws[1] or aws[2].lower().replace("_", " ")
        return f"{code}: {_one_line(aws[3])}" if aws[3] else code
    # fsspec gives nothing but the path or the URL here.
    number = errno.ENOENT if isinstance(error, FileNotFoundError) else getattr(error, "errno", None)
    if isinstance(number, int):
        return os.strerror(number)
    text = _one_line(without_user(str(error)))
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".removesuffix(": ")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON]
