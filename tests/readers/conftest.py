from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import free_port, process


@pytest.fixture(scope="session")
def web_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the web server serves."""
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="session")
def web(web_root: Path) -> Iterator[str]:
    """The URL of a web server that is a process of its own; it knows no ranges."""
    port = str(free_port())
    url = f"http://127.0.0.1:{port}"
    with process("http.server", port, "--bind", "127.0.0.1", "--directory", str(web_root), url=url):
        yield url
