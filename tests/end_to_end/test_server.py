"""Run folders on a server: the commands that a user gives, each on a machine that knows nothing but the URL."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import yaml

from tests.end_to_end.small_runs import NUM_IMAGES, Corpus
from tests.servers import S3

SPICE_RAY = Path(sys.executable).parent / "spice-ray"
Run = Callable[..., "subprocess.CompletedProcess[str]"]
"""Runs a command with the cache of that name, which is new unless it was named before."""


@pytest.fixture
def on_machine(s3: S3, tmp_path: Path) -> Run:
    def run(cache: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [SPICE_RAY, *words], env=environment(tmp_path / cache), capture_output=True, text=True, check=False
        )

    return run


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "SPICE_RAY_CACHE": str(cache), "AWS_REGION": "us-east-1"}


def table(s3: S3, path: str) -> pa.Table:
    return pq.read_table(f"{s3.bucket}/{path}", filesystem=s3.system)


def names(s3: S3, folder: str) -> set[str]:
    found = s3.system.get_file_info(pyarrow.fs.FileSelector(f"{s3.bucket}/{folder}", allow_not_found=True))
    return {info.base_name for info in found}


def test_a_run_on_a_server_is_that_on_a_disk_and_needs_no_disk_afterwards(
    on_machine: Run, s3: S3, corpus: Corpus, recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    url = f"s3://{s3.bucket}/runs/one"
    command = ("run", recipe_file, "--data", corpus.parquet, "--out", url, "scale.checkpoint_seconds=1")
    first = on_machine("a", *command)
    assert first.returncode == 0, first.stderr
    assert f"assignments: {url}/assignments.parquet" in first.stdout
    assert table(s3, "runs/one/assignments.parquet").equals(pq.read_table(finished / "assignments.parquet"))
    held = names(s3, "runs/one/artifacts")
    assert held == {entry.name for entry in (finished / "artifacts").iterdir()}
    assert names(s3, "runs/one/checkpoints") == set()

    again = on_machine("b", *command)
    assert again.returncode == 0, again.stderr
    assert "done in" not in again.stderr  # every stage is only opened
    scored = on_machine("c", "evaluate", url, "--json")
    assert scored.returncode == 0, scored.stderr
    shown = yaml.safe_load(scored.stdout)
    assert {row["method"] for row in shown["rows"]} >= {"SPICE", "SPICE_s", "k-means on pixels"}

    other = on_machine("d", *command, "seed=1")
    assert other.returncode == 2
    assert f"{url} holds another run's settings (seed is 0 there and 1 here)" in other.stderr


@pytest.mark.faults
def test_shards_on_a_server_feed_a_model_on_a_server(on_machine: Run, s3: S3, corpus: Corpus, finished: Path) -> None:
    run, shards, out = (f"s3://{s3.bucket}/{name}" for name in ("run", "shards", "predicted"))
    for file in finished.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            s3.put(f"run/{file.relative_to(finished)}", file.read_bytes())
    ingested = on_machine("a", "ingest", corpus.folder, shards, "--size", "16")
    assert ingested.returncode == 0, ingested.stderr
    assert f"{NUM_IMAGES} images in {shards}/shards-" in ingested.stdout
    assert not any(name.startswith(".ingest") for name in names(s3, "shards"))
    predicted = on_machine("b", "predict", run, "--data", shards, "--out", out)
    assert predicted.returncode == 0, predicted.stderr
    assert f"assignments: {out}/assignments.parquet" in predicted.stdout
    clusters = {file.rpartition("/")[2]: cluster for file, cluster in pairs(table(s3, "predicted/assignments.parquet"))}
    # The same images: those of the folder are named by their numbers, those of the file by their rows.
    known = dict(pairs(pq.read_table(finished / "assignments.parquet")))
    assert clusters == {f"{name.rpartition('#')[2]}.png": cluster for name, cluster in known.items()}


def pairs(found: pa.Table) -> Iterator[tuple[str, int]]:
    return zip(found["source"].to_pylist(), found["cluster"].to_pylist(), strict=True)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_whose_machine_is_gone_goes_on_from_the_last_checkpoint(
    on_machine: Run, s3: S3, corpus: Corpus, recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    url = f"s3://{s3.bucket}/run"
    command = ("run", recipe_file, "--data", corpus.parquet, "--out", url, "scale.checkpoint_seconds=0.5")
    lost = subprocess.Popen(
        [SPICE_RAY, *command], env=environment(tmp_path / "a"), stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not any(name.startswith("checkpoint_") for name in stages_under_way(s3)):
            assert time.monotonic() < deadline
            assert lost.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(lost.pid, signal.SIGKILL)
        lost.wait()
    before = names(s3, "run/artifacts")
    assert not any(name.startswith("encoder-") for name in before)
    on = on_machine("b", *command)
    assert on.returncode == 0, on.stderr
    assert "ingest" not in on.stderr
    assert table(s3, "run/assignments.parquet").equals(pq.read_table(finished / "assignments.parquet"))


def stages_under_way(s3: S3) -> set[str]:
    return {found for stage in names(s3, "run/checkpoints") for found in names(s3, f"run/checkpoints/{stage}")}


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_sweep_on_a_server(on_machine: Run, s3: S3, corpus: Corpus, recipe_file: Path, tmp_path: Path) -> None:
    settings = {
        "recipe": str(recipe_file),
        "search": "grid",
        "space": {"joint.confidence": [0.6, 0.9], "reliable.min_consistency": [0.4, 0.5]},
    }
    file = tmp_path / "four.yaml"
    file.write_text(yaml.safe_dump(settings))
    url = f"s3://{s3.bucket}/swept"
    command = ("tune", file, "--data", corpus.parquet, "--out", url)
    first = on_machine("a", *command)
    assert first.returncode == 0, first.stderr
    assert f"its recipe and assignments are in {url}/sweeps/four" in first.stdout
    assert {"trials.parquet", "report.html", "winner.yaml", "assignments.parquet"} <= names(s3, "swept/sweeps/four")
    trials = table(s3, "swept/sweeps/four/trials.parquet")
    assert trials.num_rows == 4
    held = names(s3, "swept/artifacts")
    again = on_machine("b", *command)
    assert again.returncode == 0, again.stderr
    assert names(s3, "swept/artifacts") == held
    assert table(s3, "swept/sweeps/four/trials.parquet")["objective"].equals(trials["objective"])
    scored = on_machine("c", "evaluate", f"{url}/sweeps/four", "--json")
    assert scored.returncode == 0, scored.stderr
