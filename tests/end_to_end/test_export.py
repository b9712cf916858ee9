"""The classifier of a run as one file that torch alone can load."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from spice_ray.contracts import SHARDS
from spice_ray.core.heads import ClusterHead
from spice_ray.core.joint import JointModel
from spice_ray.errors import ConfigError, StorageError
from spice_ray.export import ImageClassifier, VectorClassifier, _traced, export
from spice_ray.readers.parts import format_of, images_of, read_part
from spice_ray.recipe import load_recipe
from spice_ray.run_folder import open_made, read_finished
from spice_ray.runtime.data import open_shards
from spice_ray.runtime.weights import build
from spice_ray.storage import Artifact

ELSEWHERE = """
import json, sys
import numpy as np, torch
read = {"spice_ray.json": ""}
classify = torch.export.load(sys.argv[1], extra_files=read).module()
rows = torch.from_numpy(np.load(sys.argv[2]))
np.save(sys.argv[3], torch.cat([classify(rows[:1]), classify(rows[1:])]).numpy())
assert "spice_ray" not in sys.modules
print(read["spice_ray.json"])
"""


def classify_elsewhere(program: Path, rows: np.ndarray, folder: Path) -> tuple[dict[str, object], np.ndarray]:
    """What is said of the program, and the probabilities, in a process that has torch and no spice-ray."""
    np.save(folder / "rows.npy", rows)
    files = [str(file) for file in (program, folder / "rows.npy", folder / "probabilities.npy")]
    told = subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *files], capture_output=True, text=True, check=True)
    return json.loads(told.stdout), np.load(folder / "probabilities.npy")


def images_by_id(run: Path) -> np.ndarray:
    shards = open_shards(open_made(run, read_finished(run), SHARDS), None)
    format_ = format_of(open_made(run, read_finished(run), SHARDS).manifest)
    return np.concatenate([images_of(read_part(shards.path, file, format_), format_.size) for file in shards.files])


def test_the_images_of_the_run_get_their_clusters_elsewhere(finished: Path, tmp_path: Path) -> None:
    file = export(finished, tmp_path / "classifier.pt2")
    assert file == tmp_path / "classifier.pt2"
    told, probabilities = classify_elsewhere(file, images_by_id(finished), tmp_path)
    own = sorted(pq.read_table(finished / "assignments.parquet").to_pylist(), key=lambda row: row["sample_id"])
    assert probabilities.argmax(axis=1).tolist() == [row["cluster"] for row in own]
    assert probabilities.max(axis=1).tolist() == pytest.approx([row["confidence"] for row in own], abs=1e-5)
    assert told["num_clusters"] == 10
    assert told["shape"] == ["rows", 3, 16, 16]
    assert told["dtype"] == "uint8"


def test_without_a_place_the_file_is_in_the_run(finished: Path) -> None:
    file = export(finished)
    assert file == finished / "classifier.pt2"
    file.unlink()


@pytest.mark.parametrize("name", ["resnet18_small", "wrn28_2", "torchvision/regnet_y_400mf", "timm/test_resnet"])
def test_every_kind_of_encoder_can_be_exported(name: str, tmp_path: Path) -> None:
    model = JointModel(build(name, 64), ClusterHead(build(name, 64).embed_dim, 3, 0)).eval()
    classifier = ImageClassifier(model, load_recipe("images", ["num_clusters=3"]).image).eval()
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    program = _traced(classifier.requires_grad_(False), images[:2], Artifact(tmp_path, "joint", "a", {}))
    assert torch.allclose(program.module()(images), classifier(images), atol=1e-5)


def test_vectors_of_any_length_have_the_clusters_of_their_direction() -> None:
    classifier = VectorClassifier(ClusterHead(8, 3, 0), 8)
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    expected = classifier(vectors)
    for length in (1e-30, 1e30):
        assert torch.allclose(classifier(vectors * length), expected, atol=1e-5)


def test_what_cannot_be_exported_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"run.json does not exist"):
        export(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        export(finished, tmp_path / "file" / "classifier.pt2")
    with pytest.raises(ConfigError, match=r"--out .* is a folder; name a file in it"):
        export(finished, tmp_path)

    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = Artifact(tmp_path, "joint", "a", {"arch": "timm/undecided"})
    with pytest.raises(ConfigError, match=r"timm/undecided cannot be exported \(.*; use the command predict"):
        _traced(Undecided(), torch.ones(2, 3), model)
