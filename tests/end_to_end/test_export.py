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
from spice_ray.errors import ConfigError, StorageError
from spice_ray.export import _traced, export
from spice_ray.readers.parts import format_of, images_of, read_part
from spice_ray.run_folder import open_made, read_finished
from spice_ray.runtime.data import open_shards
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


def test_what_cannot_be_exported_is_said(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"run.json does not exist"):
        export(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file"):
        export(finished, tmp_path / "file" / "classifier.pt2")

    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = Artifact(tmp_path, "joint", "a", {"arch": "timm/undecided"})
    with pytest.raises(ConfigError, match=r"timm/undecided cannot be exported \(.*; use the command predict"):
        _traced(Undecided(), torch.ones(2, 3), model)
