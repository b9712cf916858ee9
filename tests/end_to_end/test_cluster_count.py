"""Runs whose number of clusters is chosen by the embedding."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spice_ray import workflow
from spice_ray.errors import StorageError
from spice_ray.evaluate import evaluate
from spice_ray.recipe import load_recipe
from spice_ray.run_folder import science
from spice_ray.runtime.progress import SilentReporter
from spice_ray.sweep import Sweep
from tests.end_to_end.small_runs import Corpus, Notes, small_recipe
from tests.made_runs import change_record

SETTINGS = ["heads.count=2", "heads.epochs=2", "heads.repeats=2"]


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .npy file of embeddings in six clusters, with labels."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(6), [60, 60, 50, 40, 40, 30]))
    file = tmp_path_factory.mktemp("six") / "six.npy"
    np.save(file, (np.eye(12)[labels] + 0.1 * rng.normal(size=(len(labels), 12))).astype(np.float32))
    np.save(file.with_name("six.labels.npy"), labels)
    return file


def cluster(data: Path, out: Path, asked: str, *more: str) -> Notes:
    reporter = Notes()
    recipe = load_recipe("embeddings", [f"num_clusters={asked}", *SETTINGS, *more])
    workflow.run(workflow.prepare(recipe, str(data), out), reporter)
    return reporter


def read(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def test_the_command_chooses_k_within_a_range_and_says_what_came_second(six: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "spice_ray", "run", "embeddings", "--data", str(six), "--out", str(out)]
    done = subprocess.run([*command, "num_clusters=3-9", *SETTINGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = read(out / "cluster_count.json")
    assert [row["num_clusters"] for row in table["candidates"]] == list(range(3, 10))
    scores = {row["num_clusters"]: row["score"] for row in table["candidates"]}
    first, second = sorted(scores, key=lambda k: -scores[k])[:2]
    assert (first, table["num_clusters"], table["runner_up"]) == (6, 6, second)
    (said,) = [line for line in done.stderr.splitlines() if "clusters are chosen" in line]
    assert said.startswith(f"6 clusters are chosen out of 3-9, by the eigengap times the silhouette: {scores[6]:.4f}, ")
    assert f"then {second} with {scores[second]:.4f}" in said
    assert set(pq.read_table(out / "assignments.parquet")["cluster"].to_pylist()) <= set(range(6))
    (sizes,) = [line for line in done.stdout.splitlines() if line.startswith("cluster sizes")]
    assert sizes.count(":") == 1 + 6


def test_a_run_goes_on_with_the_k_that_it_chose(six: Path, local_ray: None, tmp_path: Path) -> None:
    out = tmp_path / "run"
    notes = cluster(six, out, "auto").notes
    record = read(out / "run.json")
    assert record["recipe"]["num_clusters"] == 6
    assert record["asked"] == {"num_clusters": 50, "min_clusters": 2}
    assert evaluate(out)["rows"][1]["method"] == "SPICE_s"
    kept = {file: file.stat().st_mtime_ns for file in (out / "artifacts").glob("*/*")}
    assert any(file.parent.name.startswith("cluster_count-") for file in kept)
    (out / "cluster_count.json").unlink()
    assert cluster(six, out, "2-50").notes == notes
    assert {file: file.stat().st_mtime_ns for file in (out / "artifacts").glob("*/*")} == kept
    assert read(out / "run.json") == record
    assert (out / "cluster_count.json").exists()
    with pytest.raises(StorageError, match=r"min_clusters is 2 there and 3 here"):
        cluster(six, out, "3-50")


def test_heads_are_those_of_a_run_that_is_given_the_same_k(six: Path, local_ray: None, tmp_path: Path) -> None:
    for name, asked in (("chosen", "5-7"), ("given", "6")):
        cluster(six, tmp_path / name, asked)
    chosen, given = (read(tmp_path / name / "run.json")["artifacts"] for name in ("chosen", "given"))
    assert chosen.pop("cluster_count")
    assert chosen == given
    assert not (tmp_path / "given" / "cluster_count.json").exists()


def test_rows_of_the_test_split_have_no_say_in_k(six: Path, local_ray: None, tmp_path: Path) -> None:
    rows, labels = np.load(six), np.load(six.with_name("six.labels.npy"))
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    table = pa.table({"embedding": column, "split": np.where(labels < 4, "train", "test")})
    pq.write_table(table, tmp_path / "a.parquet")
    cluster(tmp_path / "a.parquet", tmp_path / "run", "2-9", "protocol=split")
    found = read(tmp_path / "run" / "cluster_count.json")
    assert (found["num_clusters"], found["num_rows"]) == (4, int((labels < 4).sum()))


def test_stage_3_and_a_sweep_go_by_the_chosen_k_and_the_estimated_prior(copied: Path, corpus: Corpus) -> None:
    recipe = small_recipe("num_clusters=2-12", "heads.prior=estimate")
    change_record(copied, recipe=science(recipe))  # stage 1 and the embedding do not depend on K
    prepared = workflow.prepare(recipe, str(corpus.parquet), copied)
    sweep = Sweep(recipe="digits", space={"joint.confidence": [0.95]})
    workflow.sweep(prepared, sweep, "one", SilentReporter())
    chosen = read(copied / "cluster_count.json")["num_clusters"]
    assert read(copied / "sweeps" / "one" / "run.json")["recipe"]["num_clusters"] == chosen
    winner = load_recipe(str(copied / "sweeps" / "one" / "winner.yaml"), [])
    assert winner.num_clusters == chosen
    (prior,) = (copied / "artifacts").glob("prior-*/prior.json")
    assert winner.heads.prior == tuple(read(prior)["shares"])
    artifacts = set((copied / "artifacts").iterdir())
    workflow.run(workflow.prepare(recipe, str(corpus.parquet), copied), SilentReporter())
    assert set((copied / "artifacts").iterdir()) == artifacts  # the trial was of the run's own settings
    record = read(copied / "run.json")
    assert record["recipe"]["num_clusters"] == chosen
    joint = read(copied / "artifacts" / f"joint-{record['artifacts']['joint']}" / "manifest.json")
    assert joint["num_clusters"] == chosen
