"""What Ray is asked for where there are GPUs: this machine has none, and its processor computes in their place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from spice_ray.errors import ResourceError
from spice_ray.runtime.memory import device_of
from tests.end_to_end.small_runs import Corpus
from tests.made_shards import NUM_IMAGES as NUM_ROWS
from tests.made_shards import make_shards

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and nothing to pretend")
GPUS = ["scale.gpus_per_worker=0.5", "scale.head_gpus=0.25"]


def called(*args: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.pretended_gpu", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def clusters(file: Path) -> np.ndarray:
    table = pq.read_table(file).sort_by("sample_id")
    return table["cluster"].to_numpy()


@pytest.fixture(scope="module")
def run(finished: Path, recipe_file: Path, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "run"
    called("run", recipe_file, "--data", corpus.parquet, "--out", out, *GPUS)
    return out


def test_images_are_handed_to_actors_with_a_part_of_a_gpu(tmp_path: Path) -> None:
    make_shards(tmp_path, "a")
    assert json.loads(called("map", tmp_path)) == [[number, number] for number in range(NUM_ROWS)]


@pytest.mark.faults
def test_the_embedding_of_a_run_on_gpus_is_that_of_any_other(run: Path, finished: Path) -> None:
    (embedding,) = (run / "artifacts").glob("embedding-*")
    for file in embedding.glob("*.npy"):
        assert file.read_bytes() == (finished / "artifacts" / embedding.name / file.name).read_bytes(), file.name
    # Heads are trained side by side on a GPU, which sums up in another order.
    agreeing = clusters(run / "assignments.parquet") == clusters(finished / "assignments.parquet")
    assert agreeing.mean() > 0.95


@pytest.mark.faults
def test_new_images_are_classified(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    called("predict", run, "--data", corpus.parquet, "--out", tmp_path / "new", GPUS[0])
    assert np.array_equal(clusters(tmp_path / "new" / "assignments.parquet"), clusters(run / "assignments.parquet"))


@pytest.mark.faults
def test_trials_share_a_gpu(run: Path, recipe_file: Path, corpus: Corpus, tmp_path: Path) -> None:
    sweep = tmp_path / "small.yaml"
    space = {"joint.confidence": [0.5, 0.9], "pretrain.temperature": [0.2]}
    sweep.write_text(yaml.safe_dump({"recipe": str(recipe_file), "space": space, "trial": {"joint.steps": 10}}))
    called("tune", sweep, "--data", corpus.parquet, "--out", run, *GPUS)
    trials = pq.read_table(run / "sweeps" / "small" / "trials.parquet").to_pylist()
    assert [trial["note"] for trial in trials] == ["", ""]
    assert (run / "sweeps" / "small" / "assignments.parquet").is_file()


def test_a_gpu_that_torch_does_not_find_is_an_error_of_one_sentence() -> None:
    assert device_of(0) == torch.device("cpu")
    with pytest.raises(ResourceError, match="was given a GPU and torch finds none"):
        device_of(0.5)
