"""Files that are fetched by http or https, one request each."""

import errno
import os
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import cast
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

# A server that is silent for so long is given up.
_TIMEOUT_SECONDS = 10
# One that sends a few bytes now and then is too.
_MAX_SECONDS_PER_FILE = 600
_PIECE_BYTES = 1 << 18
_SECONDS_BEFORE_RETRY = (1, 3)
_BUSY = (429, 500, 502, 503, 504)
_GONE = (404, 410)
# What may stand in a URL as it is; blanks and letters beyond ASCII are quoted.
_SAFE = "%/:=&?~#+!$,;'@()*[]"


class WebError(OSError):
    """A file that a web server does not give; the message says why, without naming the file."""


class BusyError(WebError):
    """A web server that asks to come back later."""


def open_url(url: str) -> HTTPResponse:
    """The file at ``url``, to be read as a stream; asks again where the server is busy.

    Raises:
        FileNotFoundError: The server knows no such file.
        WebError: Anything else that comes between.
    """
    for seconds in _SECONDS_BEFORE_RETRY:
        with suppress(BusyError):
            return _open_once(url)
        time.sleep(seconds)
    return _open_once(url)


def read_url(url: str, max_bytes: int) -> bytes:
    """The file at ``url``; of one that is longer than ``max_bytes`` a little more than that.

    Raises:
        FileNotFoundError: The server knows no such file.
        WebError: It cannot be fetched, or the connection ended before it was whole.
    """
    with open_url(url) as response:
        try:
            data = _read(response, max_bytes)
        except WebError:
            raise
        except (OSError, HTTPException) as error:
            raise _plain(error) from None
        announced = response.headers.get("Content-Length")
    if announced is not None and len(data) <= max_bytes and len(data) != int(announced):
        raise WebError(f"the connection ended after {len(data)} of {int(announced)} bytes")
    return data


def stat_url(url: str) -> tuple[int | None, int | None]:
    """Size in bytes and time of the last change in nanoseconds, as far as the server tells them.

    Raises:
        FileNotFoundError: The server knows no such file.
        WebError: It cannot be asked.
    """
    # Not by HEAD: a signed URL may allow GET alone. Nothing of the body is read.
    with open_url(url) as response:
        size, changed = response.headers.get("Content-Length"), response.headers.get("Last-Modified")
    try:
        seconds = None if changed is None else int(parsedate_to_datetime(changed).timestamp())
    except ValueError:
        # Not a date: as good as none, the size still tells most changes.
        seconds = None
    return None if size is None else int(size), None if seconds is None else seconds * 10**9


def _open_once(url: str) -> HTTPResponse:
    if "@" in urlsplit(url).netloc:
        raise WebError("user names and passwords in http addresses are not supported")
    # Some hosts turn away clients that do not say what they are.
    request = Request(quote(url, safe=_SAFE), headers={"User-Agent": "spice-ray"})
    try:
        return cast(HTTPResponse, urlopen(request, timeout=_TIMEOUT_SECONDS))
    except HTTPError as error:
        error.close()
        if error.code in _GONE:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        kind = BusyError if error.code in _BUSY else WebError
        raise kind(f"the server answered with status {error.code}, {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise _plain(error) from None


def _read(response: HTTPResponse, max_bytes: int) -> bytes:
    end, pieces, size = time.monotonic() + _MAX_SECONDS_PER_FILE, list[bytes](), 0
    while size <= max_bytes and (piece := response.read1(_PIECE_BYTES)):
        pieces.append(piece)
        size += len(piece)
        if time.monotonic() > end:
            raise WebError(f"the server did not send the file within {_MAX_SECONDS_PER_FILE} seconds")
    return b"".join(pieces)


def _plain(error: Exception) -> WebError:
    # urlopen wraps what went wrong in an error of its own.
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return WebError("the server did not answer in time")
    return WebError(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__)
