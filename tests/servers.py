"""Servers on loopback that are processes of their own."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import pyarrow.fs


@dataclass(frozen=True)
class S3:
    """An S3 server and a bucket on it that is the test's own."""

    address: str
    bucket: str
    system: pyarrow.fs.FileSystem

    def put(self, key: str, content: bytes) -> str:
        """Upload a file; gives its URL."""
        # One request, where pyarrow makes several; nobody checks who signs it, and everyone may read what it brings.
        headers = {
            "Content-Type": "application/octet-stream",
            "Authorization": "AWS key:signature",
            "x-amz-acl": "public-read",
        }
        url = f"http://{self.address}/{self.bucket}/{quote(key)}"
        urlopen(Request(url, content, headers, method="PUT")).close()
        return f"s3://{self.bucket}/{key}"

    def put_folder(self, folder: Path, key: str) -> str:
        """Upload all files of a folder; gives its URL."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder)}", file.read_bytes())
        return f"s3://{self.bucket}/{key}"


@contextmanager
def process(module: str, *arguments: str, url: str) -> Iterator[None]:
    """A Python module as a server, for as long as the context lasts."""
    silent = subprocess.DEVNULL
    server = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=silent, stderr=silent)
    try:
        _wait_for(url, server)
        yield
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urlopen(url, timeout=10).close()
            return
        except OSError:
            # Not yet listening.
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)


def free_port() -> int:
    """A port of the loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
