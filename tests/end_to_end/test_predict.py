"""New images, and new embeddings, classified by a finished run."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from spice_ray import prediction, workflow
from spice_ray.errors import ConfigError, DataError, StorageError
from spice_ray.export import export
from spice_ray.recipe import load_recipe
from spice_ray.runtime.progress import SilentReporter
from tests.end_to_end.small_runs import NUM_IMAGES, Corpus

JOBS = Path(__file__).parents[2] / "jobs"


def predict(run: Path, data: Path, out: Path, *settings: str) -> list[dict[str, object]]:
    prediction.predict(run, str(data), out, list(settings), SilentReporter())
    return pq.read_table(out / "assignments.parquet").to_pylist()


def test_the_images_of_the_run_get_the_clusters_that_it_gave_them(
    finished: Path, corpus: Corpus, tmp_path: Path
) -> None:
    rows = predict(finished, corpus.parquet, tmp_path / "out")
    own = {row["source"]: row for row in pq.read_table(finished / "assignments.parquet").to_pylist()}
    assert len(rows) == len(own) == NUM_IMAGES
    assert list(rows[0]) == ["sample_id", "source", "split", "cluster", "confidence"]
    assert [row["cluster"] for row in rows] == [own[row["source"]]["cluster"] for row in rows]
    expected = [own[row["source"]]["confidence"] for row in rows]
    assert [row["confidence"] for row in rows] == pytest.approx(expected, abs=1e-5)

    # The same call again finds all of it, and another one finds the folder taken.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "artifacts").rglob("*")}
    assert predict(finished, corpus.parquet, tmp_path / "out") == rows
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "artifacts").rglob("*")} == before
    with pytest.raises(StorageError, match=r"holds the predictions of another run or of other images"):
        predict(finished, corpus.folder, tmp_path / "out")


def test_a_few_files_one_of_which_is_no_image(finished: Path, corpus: Corpus, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    files = sorted(file for file in corpus.folder.rglob("*") if file.is_file())[:3]
    for number, file in enumerate(files):
        shutil.copyfile(file, new / f"{number}{file.suffix}")
    (new / "bad.png").write_bytes(b"no image")
    rows = predict(finished, new, tmp_path / "out")
    assert sorted(Path(str(row["source"])).stem for row in rows) == ["0", "1", "2"]
    (rejected,) = pq.read_table(tmp_path / "out" / "rejects.parquet").to_pylist()
    assert "bad.png" in rejected["source"]


@pytest.mark.usefixtures("local_ray")
def test_embeddings_go_to_the_clusters_of_a_run_on_embeddings(finished: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(3), 80))
    points = (np.eye(8)[labels] + 0.1 * rng.normal(size=(len(labels), 8))).astype(np.float32)
    np.save(tmp_path / "old.npy", points)
    np.save(tmp_path / "new.npy", points[::-1].copy() * 7)
    settings = ["num_clusters=3", "heads.count=1", "heads.epochs=2", "heads.repeats=2", "heads.more=0"]
    run = tmp_path / "run"
    prepared = workflow.prepare(load_recipe("embeddings", settings), str(tmp_path / "old.npy"), run)
    workflow.run(prepared, SilentReporter())

    def by_row(file: Path) -> list[int]:
        table = pq.read_table(file).to_pylist()
        return [row["cluster"] for row in sorted(table, key=lambda row: int(row["source"].rpartition("#")[2]))]

    predict(run, tmp_path / "new.npy", tmp_path / "out")
    assert by_row(tmp_path / "out" / "assignments.parquet") == by_row(run / "assignments.parquet")[::-1]
    classify = torch.export.load(export(run)).module()
    clusters = classify(torch.from_numpy(np.load(tmp_path / "new.npy"))).argmax(dim=1)
    assert clusters.tolist() == by_row(tmp_path / "out" / "assignments.parquet")
    np.save(tmp_path / "wide.npy", np.ones((5, 9), np.float32))
    with pytest.raises(
        DataError, match=r"have 9 numbers each and those of the run have 8; give embeddings of the same"
    ):
        predict(run, tmp_path / "wide.npy", tmp_path / "wide")
    with pytest.raises(ConfigError, match="embeddings"):
        predict(finished, tmp_path / "new.npy", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_predicted_is_refused_before_anything_is_made(
    finished: Path, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=r"run.json does not exist"):
        predict(tmp_path, corpus.folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"joint.steps is settled by the run; only settings of scale"):
        predict(finished, corpus.folder, tmp_path / "out", "joint.steps=3")
    with pytest.raises(ConfigError, match=r"unknown setting 'scale.worker'; did you mean 'scale.workers'"):
        predict(finished, corpus.folder, tmp_path / "out", "scale.worker=3")
    with pytest.raises(StorageError, match=r"holds files that are not a run's"):
        predict(finished, corpus.folder, finished)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("job", ["ingest", "run", "tune", "predict"])
def test_every_job_takes_the_arguments_of_its_command(job: str) -> None:
    help_ = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (
            [sys.executable, str(JOBS / f"{job}.py"), "--help"],
            [sys.executable, "-m", "spice_ray", job, "--help"],
        )
    ]
    assert help_[0].partition("--")[2] == help_[1].partition("--")[2] != ""
