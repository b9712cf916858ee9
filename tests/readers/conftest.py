import os
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
import pytest


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


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """Host and port of an S3 server that is a process of its own."""
    address = f"127.0.0.1:{_free_port()}"
    with _process("moto.server", "-H", "127.0.0.1", "-p", address.split(":")[1], url=f"http://{address}/moto-api/"):
        yield address


@pytest.fixture
def s3(s3_address: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A new bucket, and the environment of a user who may use it."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_address}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    system = pyarrow.fs.S3FileSystem(
        access_key="key",
        secret_key="secret",
        region="us-east-1",
        endpoint_override=s3_address,
        scheme="http",
        allow_bucket_creation=True,
    )
    bucket = f"b{abs(hash(request.node.nodeid))}"
    system.create_dir(bucket)
    return S3(s3_address, bucket, system)


@pytest.fixture(scope="session")
def web_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the web server serves."""
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="session")
def web(web_root: Path) -> Iterator[str]:
    """The URL of a web server that is a process of its own; it knows no ranges."""
    port = str(_free_port())
    url = f"http://127.0.0.1:{port}"
    with _process("http.server", port, "--bind", "127.0.0.1", "--directory", str(web_root), url=url):
        yield url


@contextmanager
def _process(module: str, *arguments: str, url: str) -> Iterator[None]:
    silent = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=silent, stderr=silent)
    try:
        _wait_for(url, process)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urlopen(url, timeout=10).close()
            return
        except OSError:
            # Not yet listening.
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
