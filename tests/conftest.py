import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from spice_ray.config import Scale
from spice_ray.runtime.cluster import connected
from tests.end_to_end.small_runs import NUM_IMAGES, Corpus, cluster, small_recipe
from tests.servers import S3, free_port, process


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for all tests that run in this process, started as the product starts it."""
    with connected(Scale(), verbose=False):
        yield


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """Host and port of an S3 server that is a process of its own."""
    address = f"127.0.0.1:{free_port()}"
    with process("moto.server", "-H", "127.0.0.1", "-p", address.split(":")[1], url=f"http://{address}/moto-api/"):
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
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    digits = load_digits()
    images = [_png(pixels) for pixels in digits.images[:NUM_IMAGES]]
    labels = digits.target[:NUM_IMAGES].tolist()
    noise = np.random.default_rng(0).integers(0, 10, NUM_IMAGES).tolist()
    found = Corpus(root / "true" / "train.parquet", root / "noise" / "train.parquet", root / "folder")
    for file, column in ((found.parquet, labels), (found.poisoned, noise)):
        file.parent.mkdir()
        pq.write_table(pa.table({"image": images, "label": column}), file)
    for number, image in enumerate(images):
        file = found.folder / f"{number % 7}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    return found


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(yaml.safe_dump(small_recipe().model_dump(mode="json")), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def finished(corpus: Corpus, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the Parquet file with true labels; not to be changed."""
    return cluster(corpus.parquet, tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.round(pixels * 255 / 16).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
